"""Sampling runs as ComfyUI's own sampler nodes make them: same schedule, same noise, same progress and cancelling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.nested_tensor import NestedTensor
from torch import Tensor

from ...errors import MedSteerError

SAMPLERS: list[str] = comfy.samplers.SAMPLER_NAMES
SCHEDULERS: list[str] = comfy.samplers.SCHEDULER_NAMES
OTHER = "other"  # the conditioning that `sample_beside` evaluates beside its run


@dataclass(frozen=True, eq=False)
class Schedule:
    """A sampler and its noise levels. ``sigmas (steps + 1,)`` end where sampling ends, mostly at 0."""

    sampler: Any
    sigmas: Tensor
    sampler_name: str
    scheduler: str

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


def schedule(
    model: ModelPatcher,
    steps: int,
    sampler_name: str,
    scheduler: str,
    sampler: Any = None,
    sigmas: Tensor | None = None,
) -> Schedule:
    """What KSampler would use for these names; a ``sampler`` object and ``sigmas`` override one name each."""
    if sigmas is None:
        device = model.load_device
        named = comfy.samplers.KSampler(model, steps=steps, device=device, sampler=sampler_name, scheduler=scheduler)
        sigmas = named.sigmas
    else:
        scheduler = "sigmas input"
    if sampler is None:
        sampler = comfy.samplers.sampler_object(sampler_name)
    else:
        sampler_name = getattr(getattr(sampler, "sampler_function", sampler), "__name__", "sampler input")
    if len(sigmas) < 2:
        raise MedSteerError(
            f"A schedule needs at least one step; sigmas has {len(sigmas)} value(s), at least 2 wanted."
        )
    return Schedule(sampler, sigmas.float().cpu(), sampler_name, scheduler)


def empty_latent(model: ModelPatcher, latent: dict) -> Tensor:
    """A zero latent ``(1, C, H, W)`` with the channels and the scale that the model wants for this LATENT's shape.

    A video model's is ``(1, C, frames, H, W)``, here as everywhere in this file; LTX-2's is a pair of video and sound.
    """
    samples = _zeros_like(latent["samples"][:1])
    spatial, temporal = latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
    return comfy.sample.fix_empty_latent_channels(model, samples, spatial, temporal)


def _zeros_like(latents: Tensor) -> Tensor:
    """`torch.zeros_like`, which ComfyUI's pairs of video and sound do not know."""
    return latents * 0 if latents.is_nested else torch.zeros_like(latents)


def noise_for(shape_like: Tensor, seed: int, indices: Sequence[int]) -> Tensor:
    """The noise that ComfyUI gives the images ``indices`` of a batch with this seed: ``(len(indices), C, H, W)``.

    A sound beside a video has noise of its own from the next seed, since ComfyUI's would depend on the batch's size.
    """
    if shape_like.is_nested:
        parts = shape_like.unbind()
        return NestedTensor([noise_for(part, (seed + place) % 2**64, indices) for place, part in enumerate(parts)])
    return comfy.sample.prepare_noise(shape_like, seed, list(indices))


def sample(
    model: ModelPatcher,
    positive: list,
    negative: list,
    noise: Tensor,
    plan: Schedule,
    cfg: float,
    seed: int,
    callback: Callable[[int, Tensor, Tensor, int], None] | None = None,
) -> Tensor:
    """One run from ``noise (batch, C, H, W)`` on an empty latent; returns latents ``(batch, C, H, W)``."""
    return resample(model, positive, negative, _zeros_like(noise), noise, plan, cfg, seed, callback)


def resample(
    model: ModelPatcher,
    positive: list,
    negative: list,
    latents: Tensor,
    noise: Tensor,
    plan: Schedule,
    cfg: float,
    seed: int,
    callback: Callable[[int, Tensor, Tensor, int], None] | None = None,
) -> Tensor:
    """One run from ``latents`` with ``noise`` (both ``(batch, C, H, W)``) added at the plan's first sigma.

    Zero noise goes on from latents that have theirs already; rising sigmas, with cfg 1, invert an image into noise.
    """
    comfy.model_management.throw_exception_if_processing_interrupted()
    return comfy.sample.sample_custom(
        model, noise, cfg, plan.sampler, plan.sigmas, positive, negative, latents, seed=seed, callback=callback,
        disable_pbar=True,
    )  # fmt: skip


class _Bystander(comfy.samplers.CFGGuider):
    """Classifier-free guidance that also evaluates a conditioning "other" at every state, and makes no use of it."""

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: int | None = None):
        options = model_options or {}
        result = super().predict_noise(x, timestep, options, seed)
        # In calls of its own, so that the run itself stays what it is bit by bit.
        comfy.samplers.calc_cond_batch(self.inner_model, [self.conds[OTHER]], x, timestep, options)
        return result


def sample_beside(
    model: ModelPatcher,
    positive: list,
    negative: list,
    other: list,
    noise: Tensor,
    plan: Schedule,
    cfg: float,
    seed: int,
    callback: Callable[[int, Tensor, Tensor, int], None] | None = None,
) -> Tensor:
    """`sample`, bit by bit, while ``other`` is evaluated at every state as well: its rows are called `OTHER`."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    guider = _Bystander(model)
    guider.inner_set_conds({"positive": positive, "negative": negative, OTHER: other})
    guider.set_cfg(cfg)
    result = guider.sample(
        noise, _zeros_like(noise), plan.sampler, plan.sigmas, callback=callback, disable_pbar=True, seed=seed
    )
    management = comfy.model_management
    return result.to(device=management.intermediate_device(), dtype=management.intermediate_dtype())


def batch_that_fits(model: ModelPatcher, latent: Tensor, wanted: int, most: int = 16) -> int:
    """How many images of ``latent (1, C, H, W)`` go into one run with guidance, by ComfyUI's own memory estimate."""
    not_loaded = max(0, model.model_size() - model.loaded_size())
    free = comfy.model_management.get_free_memory(model.load_device) - not_loaded
    size = max(1, min(wanted, most))
    while size > 1 and model.model.memory_required([2 * size, *latent.shape[1:]]) * 1.5 > free:
        size //= 2
    return size
