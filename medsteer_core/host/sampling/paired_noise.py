"""The same noise for every block of a batch, in samplers that draw noise as they go.

Ancestral and SDE samplers draw noise for the whole batch at once, so two halves of one batch would get different
noise. ComfyUI's samplers take a `noise_sampler`; the one given here draws what the sampler would draw for one block
alone, and repeats it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import comfy.k_diffusion.sampling as k_diffusion
import comfy.samplers
import torch
from torch import Tensor

from ...errors import MedSteerError

BROWNIAN = re.compile(r"sample_dpmpp_(?:sde|2m_sde|2m_sde_heun|3m_sde)(_gpu)?")
KNOWN = ("comfy.k_diffusion.", "comfy.extra_samplers.", "comfy.samplers")
ELSE = "Choose another sampler, or make the two images with two samplers and the same seed."
NOT_PAIRED = {
    "dpm_adaptive_function": "dpm_adaptive chooses its steps from the whole batch, so the factual image would depend "
    "on the counterfactual one",
    "sample_dpm_adaptive": "dpm_adaptive chooses its steps from the whole batch, so the factual image would depend on "
    "the counterfactual one",
    "sample_ar_video": "ar_video draws noise of its own for the whole batch",
}


class BlockSampler(comfy.samplers.Sampler):
    """A sampler over ``blocks`` equal blocks of images that gives every block the noise of the first alone."""

    def __init__(self, sampler: comfy.samplers.KSAMPLER, blocks: int):
        self.sampler, self.blocks = sampler, blocks

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
        """As `comfy.samplers.KSAMPLER.sample`; ``noise (blocks * images, C, ...)``."""
        images = noise.shape[0] // self.blocks
        function, options = self.sampler.sampler_function, dict(self.sampler.extra_options)
        inpaint = dict(self.sampler.inpaint_options)
        if takes_noise(function) and options.get("noise_sampler") is None:
            draw = _noise_sampler(function.__name__, noise[:images], sigmas, extra_args.get("seed"))
            options["noise_sampler"] = lambda *levels: _repeated(draw(*levels), self.blocks)
        return comfy.samplers.KSAMPLER(function, options, inpaint).sample(
            model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs
        )


def check_pairable(sampler: Any, masked: bool = False) -> None:
    """Raise MedSteerError for a sampler whose noise can't be the same in two halves of a batch.

    ``masked``: whether the latent has an inpainting mask.
    """
    reason = _why_not(sampler, masked)
    if reason:
        raise MedSteerError(f"Counterfactual Sampler can't use this sampler: {reason}. {ELSE}")


def _why_not(sampler: Any, masked: bool) -> str:
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", type(sampler).__name__)
    if name in NOT_PAIRED:
        return NOT_PAIRED[name]
    if function is None or not (function.__module__.startswith(KNOWN) or takes_noise(function)):
        return f"{name} does not let its noise be given"
    if name.endswith("_cfg_pp"):
        return "it goes along the unconditional prediction as well, which neither the shared steps nor a lock have"
    if float(sampler.extra_options.get("s_churn", 0) or 0) > 0:
        return "s_churn draws other noise for the two images"
    if masked and sampler.inpaint_options.get("random"):
        return "ddim draws other noise for the two images where an inpainting mask keeps the image"
    return ""


def takes_noise(function: Callable) -> bool:
    """Whether a sampler's function draws noise as it goes, and takes it from its caller."""
    return "noise_sampler" in inspect.signature(function).parameters


def _noise_sampler(name: str, one: Tensor, sigmas: Tensor, seed: int | None) -> Callable[..., Tensor]:
    """What the sampler ``name`` would draw for ``one`` block (images, C, ...) alone."""
    brownian = BROWNIAN.fullmatch(name)
    if not brownian:
        return k_diffusion.default_noise_sampler(one, seed=seed)
    low, high = sigmas[sigmas > 0].min(), sigmas.max()
    return k_diffusion.BrownianTreeNoiseSampler(one, low, high, seed=seed, cpu=brownian[1] is None)


def _repeated(noise: Tensor, blocks: int) -> Tensor:
    return torch.cat([noise] * blocks)
