"""Whether latents show what they should: by a judge who looks at the images, or by the model's own activations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...errors import MedSteerError
from ...extraction.capture import token_means
from ...judges.judge import Judge
from ...scores.scorer import score_pairs
from ...steering.plan import SteeringPlan
from ..patching.patch import observed, plan_of, with_plan
from .pair_request import PairRequest
from .runs import resample

LATE = 0.85  # of the schedule: where images are told apart by what attends to the finding
FAR_ENOUGH = 0.5  # of the way from the factual images to those of the target's prompt


class Flips(Protocol):
    """Says of counterfactuals whether they show what their factual should become."""

    def begin(self, start: Tensor, noise: Tensor) -> None:
        """The latents ``(B, C, h, w)`` and noise that all factuals are sampled from."""

    def __call__(self, factual: Tensor, counterfactual: Tensor) -> bool | None:
        """Of latents ``(1, C, h, w)``; None where the factual is not what it should be."""


@dataclass
class ByJudge:
    """Asks ``judge`` whether a pair went from class ``source`` to ``target`` (see `scores.scorer`)."""

    vae: Any
    judge: Judge
    source: str
    target: str
    _last: tuple[Tensor, Tensor] | None = None  # a factual's latents and image: it is asked about several times

    def begin(self, start: Tensor, noise: Tensor) -> None:
        pass

    def __call__(self, factual: Tensor, counterfactual: Tensor) -> bool | None:
        if self._last is None or self._last[0] is not factual:
            self._last = factual, self._image(factual)
        pair = self._last[1], self._image(counterfactual)
        score = score_pairs(*pair, self.source, self.target, self.judge)[0]
        return bool(score.flipped) if score.accepted else None

    def _image(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents)[..., :3].movedim(-1, 1).float().clamp(0, 1)


class ByTarget:
    """Without a judge: how far along the steering's directions an image has gone to what the target's prompt draws.

    Images of ``target`` and factuals are sampled from the same noise. Of them and of a counterfactual the unsteered
    model's cross-attention outputs under the positive prompt are projected, at `LATE` of the schedule and under one
    noise; a counterfactual that has gone `FAR_ENOUGH` of the mean way counts as flipped.

    Raises MedSteerError for a model that is not steered, and without a target.
    """

    def __init__(self, model: ModelPatcher, request: PairRequest, target: list | None):
        if target is None:
            raise MedSteerError(
                "judge is 'none', and no prompt says what the images should become. Connect one to target, or choose a "
                "judge."
            )
        steerings = plan_of(model).steerings
        if not steerings:
            raise MedSteerError(
                "The model is not steered, so there is no direction to look along. Connect Steer's model."
            )
        self.request, self.target = request, target
        self._plain, self._steering = with_plan(model, SteeringPlan()), steerings[0]
        steps = len(request.schedule.sigmas) - 1
        place = min(round(LATE * steps), steps - 1)
        self._step = replace(request.schedule, sigmas=request.schedule.sigmas[place : place + 2])
        self._way: dict[str, Tensor] = {}
        self._noise = torch.empty(0)

    def begin(self, start: Tensor, noise: Tensor) -> None:
        request = self.request
        drawn = torch.randn(start[:1].shape, generator=torch.Generator().manual_seed(request.seed % 2**63))
        self._noise = drawn.to(noise)

        def images(prompt: list) -> Tensor:
            common = request.schedule, request.cfg, request.seed
            return resample(self._plain, prompt, request.negative, start, noise, *common)

        before, after = self._projections(images(request.positive)), self._projections(images(self.target))
        self._way = {site: (after[site] - own).mean(0) for site, own in before.items()}

    def __call__(self, factual: Tensor, counterfactual: Tensor) -> bool | None:
        return self.share(factual, counterfactual) >= FAR_ENOUGH

    def share(self, factual: Tensor, counterfactual: Tensor) -> float:
        """How much of the way latents ``(1, C, h, w)`` have gone from their factual's, mean of the sites."""
        before, now, shares = self._projections(factual), self._projections(counterfactual), []
        for site, way in self._way.items():
            moved = now[site][0] - before[site][0]
            shares.append(float(moved @ way) / max(float(way @ way), 1e-12))
        return sum(shares) / len(shares)

    def _projections(self, latents: Tensor) -> dict[str, Tensor]:
        """By site ``(images, R)``: the images' mean tokens along the vector's directions."""
        seen = _Means()
        model = observed(self._plain, seen)
        request, noise = self.request, self._noise.expand_as(latents).contiguous()
        resample(model, request.positive, request.negative, latents, noise, self._step, 1.0, request.seed)
        level = float(self._step.sigmas[0])
        steps = self._steering.vector.at_sites(self._steering.sites, level)
        return {site: seen.means[site] @ step.directions.cpu().float().T for site, step in steps.items()}


class _Means:
    """An observer of one call's token means: site -> ``(images, C)``."""

    def __init__(self) -> None:
        self.means: dict[str, Tensor] = {}

    def observe(self, site: str, sigma: float, activation: Tensor) -> None:
        mean = token_means(site, activation).float().cpu()
        self.means[site] = torch.cat([self.means[site], mean]) if site in self.means else mean
