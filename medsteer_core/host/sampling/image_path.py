"""The way of a real image through the noise levels, and a sampler that carries an edit beside it.

The edit is a difference ``d`` of states. At each level the model is asked about the image's own state and about that
state plus ``d``; ``d`` moves by what the two answers differ in, and what is left of it at the end is added to the
image. Where the answers are equal nothing moves, so that an edit of strength 0, and all that is outside a lock, is the
image itself to the last bit, however well or badly the model knows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor


class Inversion(comfy.samplers.Sampler):
    """Euler's steps of a `ConditionGuider`'s own prediction from the image up to ``sigmas[0]``.

    DDIM inversion (Song et al. 2021) in ComfyUI's parametrisation, which is the same for eps, v and flow models. A step
    up to a level asks the model at that level, so that nothing is divided by a vanishing one. ``states`` afterwards: at
    each of ``sigmas[:-1]`` a tensor (images, C, h, w).
    """

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def sample(self, model_wrap: Any, sigmas: Tensor, extra_args: dict, callback, noise, latent_image, *args, **kwargs):
        """As `comfy.samplers.KSAMPLER.sample`, with ``sigmas`` falling to 0; gives the image back."""
        levels, state = sigmas.flip(0).tolist(), latent_image
        for low, high in zip(levels, levels[1:], strict=False):
            timestep = torch.full((len(state),), high, device=state.device, dtype=sigmas.dtype)
            denoised = model_wrap.prediction(state, timestep, extra_args["model_options"])
            state = state + (high - low) / high * (state - denoised)
            self.states.insert(0, state)
            comfy.model_management.throw_exception_if_processing_interrupted()
        return latent_image


class Beside(comfy.samplers.Sampler):
    """Carries the edit along ``states``; gives the image plus what is left of it.

    ``answers``: what the model says of the image's own states at each level; None for the run that asks it, whose edit
    is nothing.
    """

    def __init__(self, states: Sequence[Tensor], answers: Sequence[Tensor] | None = None):
        self.states, self.answers = states, answers

    def kept(self, sigma: float, after: float) -> float:
        """What a step from one noise level to the next keeps of the edit; the rest is the answers' difference. Euler's
        step, for flow models and others alike."""
        return after / sigma

    def sample(self, model_wrap: Any, sigmas: Tensor, extra_args: dict, callback, noise, latent_image, *args, **kwargs):
        """As `comfy.samplers.KSAMPLER.sample`, from ``latent_image`` and without ``noise``."""
        edit, steps = torch.zeros_like(latent_image), len(sigmas) - 1
        for step, (sigma, after) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            state = self.states[step] + edit
            denoised = model_wrap(state, sigma * state.new_ones(len(state)), **extra_args)
            if self.answers is not None:
                kept = self.kept(float(sigma), float(after))
                edit = kept * edit + (1 - kept) * (denoised - self.answers[step])
            if callback is not None:
                callback(step, latent_image + edit, state, steps)
        return latent_image + edit
