"""The factual image and its counterfactuals in one run: one batch of blocks, the first block unsteered.

Every block starts from the same noise, and samplers that draw noise give each the same. Before the steering window
starts the blocks are equal, so only the first is evaluated; from there on all are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from torch import Tensor

from ...errors import MedSteerError
from ...steering.plan import SteeringPlan
from ...steering.token_map import TokenChange, mask_for_latent, threshold_mask
from ..patching.patch import in_blocks, plan_of, with_blocks
from .pair_record import lock_of, records_of
from .pair_request import CONCEPT, LOCKS, OPEN, USER, PairRequest
from .paired_conds import fit_to_block
from .paired_noise import BlockSampler, check_pairable


@dataclass(frozen=True, eq=False)
class Pair:
    """One run's result.

    factual: latents (B, C, ...); counterfactual: latents (K * B, C, ...), all images of the first multiple first
    concept_map: (B, h, w) in image pixels, 1 where the steering acts most
    mask: (B, h, w), 1 where the image could change
    mask_source: "none", "user" or "concept map"; summary: all that in words
    records: for each counterfactual how it was made (see dataset/records.py)
    """

    factual: Tensor
    counterfactual: Tensor
    concept_map: Tensor
    mask: Tensor
    mask_source: str
    summary: str
    records: list[dict[str, Any]]


def multiples_of(text: str) -> tuple[float, ...]:
    """The numbers of a comma-separated text. Raises MedSteerError for anything else, and for none."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        numbers = tuple(float(part) for part in parts)
    except ValueError:
        numbers = ()
    if not numbers or not all(math.isfinite(number) for number in numbers):
        raise MedSteerError(f"strengths is '{text}'; numbers such as '1' or '0.5, 1, 1.5' were expected.")
    return numbers


def sample_pair(model: ModelPatcher, request: PairRequest) -> Pair:
    """Factual and counterfactual latents of a steered MODEL (see PairRequest and Pair).

    With lock `CONCEPT` a run of the factual images alone comes first and gives the mask. Raises MedSteerError for a
    model without steering, a sampler that can't be paired, and masks that don't fit.
    """
    plan = plan_of(model)
    if not plan.steerings:
        raise MedSteerError("The model is not steered, so there is no counterfactual. Connect a Steer node's model.")
    if request.lock not in LOCKS:
        raise MedSteerError(f"lock is '{request.lock}'; one of {', '.join(LOCKS)} was expected.")
    run = _Run(model, plan, request)
    allowed, source = run.allowed()
    plans = (SteeringPlan(), *(plan.scaled(multiple) for multiple in request.multiples))
    latents, changes = run.sample(plans, allowed)
    images = len(run.latents)
    shown = changes.maps(*run.size) if changes.seen else torch.zeros(images, *run.size)
    mask = torch.ones(images, *run.size) if allowed is None else allowed.float()
    return Pair(
        factual=latents[:images],
        counterfactual=latents[images:],
        concept_map=run.enlarged(shown),
        mask=run.enlarged(mask),
        mask_source=source,
        summary=_in_words(request, plan, images, source, float(mask.mean())),
        records=records_of(model, plan, request, run.latents, run.noise, lock_of(request, allowed, source, images)),
    )


def _in_words(request: PairRequest, plan: SteeringPlan, images: int, source: str, share: float) -> str:
    seed, schedule = getattr(request.noise, "seed", request.seed), request.schedule
    times = ", ".join(f"{multiple:g}" for multiple in request.multiples)
    operators = ", ".join(steering.operator.name for steering in plan.steerings)
    lines = [
        f"{images} factual, {images * len(request.multiples)} counterfactual ({operators}; strength x {times})",
        f"seed {seed}, {schedule.sampler_name}, {schedule.steps} steps, cfg {request.cfg:g}",
        f"mask_source: {source}" + ("" if source == OPEN else f", {share:.0%} of the image may change"),
    ]
    return "\n".join(lines)


class _Run:
    """One node run: its latents and noise as the model wants them, and what is done with them."""

    def __init__(self, model: ModelPatcher, plan: SteeringPlan, request: PairRequest):
        latent = request.latent
        check_pairable(request.schedule.sampler, "noise_mask" in latent)
        _check_no_cache(model)
        self.model, self.plan, self.request = model, plan, request
        self.latents = comfy.sample.fix_empty_latent_channels(
            model, latent["samples"], latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
        )
        if self.latents.is_nested:
            raise MedSteerError(
                "These latents hold video and sound together, which Counterfactual Sampler can't pair. Make the two "
                "with two samplers and the same seed."
            )
        self.size = tuple(self.latents.shape[-2:])
        self.is_image = self.latents.ndim == 4
        self.noise: Tensor | None = None  # of the last run

    def allowed(self) -> tuple[Tensor | None, str]:
        """The mask (B, H, W) in latent pixels, True where the image may change (None: anywhere), and its source."""
        request = self.request
        if request.mask is None and request.lock == OPEN:
            return None, OPEN
        if not self.is_image:
            raise MedSteerError("Masks and locks work for image latents; these are a video's. Set lock to none.")
        if request.mask is not None:
            return mask_for_latent(request.mask, len(self.latents), *self.size), USER
        if all(steering.operator.is_identity for steering in self.plan.steerings):
            return torch.zeros(len(self.latents), *self.size, dtype=torch.bool), CONCEPT  # strength 0: the factual
        _, changes = self.sample((SteeringPlan(),), None)
        if not changes.seen:
            raise MedSteerError("There is no concept map: the steering changes nothing here. Give a mask instead.")
        return threshold_mask(changes.maps(*self.size), request.threshold, request.dilation), CONCEPT

    def sample(self, plans: Sequence[SteeringPlan], allowed: Tensor | None) -> tuple[Tensor, TokenChange]:
        """Latents of every block, one a plan, and what the steering would change in the first."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        request, blocks, changes = self.request, len(plans), TokenChange()
        guider = _BlockGuider(with_blocks(self.model, plans, changes if self.is_image else None), plans, allowed)
        guider.set_conds(request.positive, request.negative)
        guider.set_cfg(request.cfg)
        source = request.noise or Noise_RandomNoise(request.seed)
        noise = self.noise = source.generate_noise({**request.latent, "samples": self.latents})
        mask = request.latent.get("noise_mask")
        if mask is not None and mask.shape[0] > 1:
            mask = torch.cat([comfy.utils.repeat_to_batch_size(mask, len(self.latents))] * blocks)
        schedule = request.schedule
        result = guider.sample(
            torch.cat([noise] * blocks), torch.cat([self.latents] * blocks), BlockSampler(schedule.sampler, blocks),
            schedule.sigmas, denoise_mask=mask, callback=latent_preview.prepare_callback(self.model, schedule.steps),
            disable_pbar=True, seed=source.seed,
        )  # fmt: skip
        management = comfy.model_management
        return result.to(device=management.intermediate_device(), dtype=management.intermediate_dtype()), changes

    def enlarged(self, maps: Tensor) -> Tensor:
        """(B, H, W) in latent pixels as MASKs in image pixels."""
        ratio = self.model.get_model_object("latent_format").spacial_downscale_ratio
        return maps.repeat_interleave(ratio, 1).repeat_interleave(ratio, 2)


class _BlockGuider(comfy.samplers.CFGGuider):
    """Classifier-free guidance over blocks of images, each with a steering plan of its own."""

    def __init__(self, model: ModelPatcher, plans: Sequence[SteeringPlan], allowed: Tensor | None):
        super().__init__(model)
        self.plans = plans
        self.allowed = None if allowed is None else allowed[:, None]
        self._parted = False
        self._fitted = False

    def sample(self, *args, **kwargs) -> Tensor:
        self._parted = self._fitted = False
        return super().sample(*args, **kwargs)

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: int | None = None):
        """The denoised prediction for ``x (blocks * images, C, ...)``."""
        blocks = len(self.plans)
        images = x.shape[0] // blocks
        if not self._fitted:
            fit_to_block(self.conds, images, blocks)
            self._fitted = True
        if not self._parted and self._acts_at(float(timestep.max())):
            _check_equal(x, images)
            self._parted = True
        if not self._parted:
            options = in_blocks(model_options or {}, 1)
            first = super().predict_noise(x[:images], timestep[:images], options, seed)
            return torch.cat([first] * blocks)
        denoised = super().predict_noise(x, timestep, in_blocks(model_options or {}, blocks), seed)
        return denoised if self.allowed is None else _locked(denoised, self.allowed, blocks)

    def _acts_at(self, sigma: float) -> bool:
        return sigma > 0 and any(steering.acts_at(sigma) for plan in self.plans for steering in plan.steerings)


def _check_no_cache(model: ModelPatcher) -> None:
    """Refuse EasyCache and LazyCache: they skip a step by what changed in the whole batch, the counterfactual too."""
    if "easycache" in model.model_options.get("transformer_options", {}):
        raise MedSteerError(
            "Counterfactual Sampler can't use EasyCache or LazyCache: which steps they skip would depend on the "
            "counterfactual, and so would the factual image. Remove the node, or make the two images with two samplers."
        )


def _check_equal(x: Tensor, images: int) -> None:
    first = x[:images]
    if any(not torch.equal(part, first) for part in x.split(images)):
        raise MedSteerError(
            "The factual and the counterfactual image differ before steering begins: this sampler, or another patch "
            "on the model, does not treat the images of a batch alike. Choose another sampler."
        )


def _locked(denoised: Tensor, allowed: Tensor, blocks: int) -> Tensor:
    """The first block's prediction in every block, where a pixel may not change."""
    factual, *others = denoised.chunk(blocks)
    inside = allowed.to(denoised.device)
    return torch.cat([factual, *(torch.where(inside, other, factual) for other in others)])
