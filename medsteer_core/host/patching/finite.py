"""Latents that are not finite, and whose fault that is: the steering's, or the model's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import MedSteerError


def is_finite(latents: Any) -> bool:
    """Whether every value is finite; what is no tensor is not looked at."""
    return not isinstance(latents, Tensor) or bool(torch.isfinite(latents).all())


def ends_finite(run: Callable[[Callable], Any]) -> bool:
    """Whether ``run``, given a sampler's callback, ends in finite latents; it is left at the first step that does not.

    A run that can't be repeated (it is answered from a record, which is finite) counts as finite.
    """

    def look(_step: int, denoised: Tensor, _x: Tensor, _steps: int) -> None:
        if not is_finite(denoised):
            raise _Found

    try:
        return is_finite(run(look))
    except _Found:
        return False
    except MedSteerError:
        return True


class _Found(Exception):
    """A step that is not finite."""


def not_finite(model: Any, finite_without: bool) -> MedSteerError:
    """The error for a steered run of ``model`` (a ModelPatcher); ``finite_without``: it is none without steering."""
    half = model.model_dtype() == torch.float16
    if not finite_without:
        return model_not_finite(model)
    return MedSteerError(
        "The steered run gave NaN or infinite latents, and without steering it does not. Lower the strength, or narrow "
        "the window." + (" float16 ends at 65,504: bfloat16 or float32 reach further." if half else "")
    )


def model_not_finite(model: Any) -> MedSteerError:
    """The error for a model that gives NaN by itself."""
    dtype = str(model.model_dtype()).removeprefix("torch.")
    return MedSteerError(
        f"The model itself gives NaN or infinite latents here, without any steering, in {dtype}: a black image. The "
        "strength is not to blame. A dtype that the model can't do is the usual reason: start ComfyUI with --bf16-unet "
        "or --fp32-unet, or look at the nodes and LoRAs before Steer."
    )
