"""The same conditioning for every block of a batch, where a conditioning holds a batch of its own.

ComfyUI repeats or cuts such a batch to the length of a model call. A call of several blocks is longer than that of one
run, so that a block after the first would begin somewhere in the middle: two prompts for three images, for instance.
"""

from __future__ import annotations

from typing import Any

import comfy.conds
import comfy.utils
from torch import Tensor

from ...errors import MedSteerError


def fit_to_block(conds: dict[str, list[dict[str, Any]]], images: int, blocks: int) -> None:
    """Give each block what one run of ``images`` would get; changes the entries of a run's own processed ``conds``.

    Raises MedSteerError for the images of a ControlNet, which fits them to the call by itself, if they don't divide
    ``images``; and for images that the model takes beside the latents (inpainting and image-to-video models), which
    ComfyUI has spread over all blocks already, if they differ.
    """
    for entry in (entry for entries in conds.values() for entry in entries or ()):
        entry["model_conds"] = {
            name: _fitted(cond, images, blocks) for name, cond in entry.get("model_conds", {}).items()
        }
        if "mask" in entry:
            entry["mask"] = entry["mask"][:images]
        control = entry.get("control")
        while control is not None:
            _check_hint(getattr(control, "cond_hint_original", None), images)
            control = control.previous_controlnet


def _fitted(cond: Any, images: int, blocks: int) -> Any:
    values = getattr(cond, "cond", None)
    is_batch = isinstance(cond, comfy.conds.CONDRegular) and not isinstance(cond, comfy.conds.CONDConstant)
    if not is_batch or not isinstance(values, Tensor) or len(values) in (1, images):
        return cond
    spread = isinstance(cond, comfy.conds.CONDNoiseShape) and blocks > 1 and len(values) == images * blocks
    if spread and not bool((values == values[:1]).all()):
        raise MedSteerError(
            f"This model takes an image beside each of the {images} latents, which Counterfactual Sampler can't give "
            "to both images of a pair. Make one pair at a time (batch_size 1)."
        )
    return cond._copy_with(comfy.utils.repeat_to_batch_size(values, images))


def _check_hint(hint: Any, images: int) -> None:
    if isinstance(hint, Tensor) and images % len(hint):
        raise MedSteerError(
            f"The ControlNet has {len(hint)} images, and there are {images} latents. Give it 1 image or {images}."
        )
