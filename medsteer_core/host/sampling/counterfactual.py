"""A factual image and its counterfactuals: the factual run is recorded, and the others are answered from its record
until they begin, and outside their mask.

So the factual is what a sampler without steering gives, bit by bit, and a counterfactual costs what its window costs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...errors import MedSteerError
from ...steering.operators import Operator
from ...steering.plan import SteeringPlan
from ...steering.token_map import mask_for_latent, smoothed, threshold_mask
from ..patching.checks import check_reachable
from ..patching.finite import is_finite, model_not_finite
from ..patching.levels import on_schedule
from ..patching.native_size import about_size, pixels_of
from ..patching.patch import plan_of
from .image_run import ImageRun
from .pair_doubts import doubts_of, unchanged
from .pair_record import lock_of, records_of
from .pair_request import AUTOMATIC, CONCEPT, LOCKS, OPEN, PREDICTION, USER, PairRequest
from .pair_run import PairRun

NO_COPIES = {"sample_ar_video": "ar_video keeps what it has seen in the model"}


@dataclass(frozen=True, eq=False)
class Pair:
    """What a node run gives.

    factual: latents (B, C, ...); counterfactual: latents (K * B, C, ...), all images of the first multiple first
    concept_map: (B, h, w) in image pixels, 1 where the steering acts most
    mask: (B, h, w), 1 where the image could change
    mask_source: "none", "user", "concept map" or "prediction difference"; summary: all that in words
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
    """The numbers of a comma-separated text. Raises MedSteerError for anything else, and for none.

    Two whole numbers and a comma without a space (``1,5``) are refused: that may be a decimal comma.
    """
    if re.fullmatch(r"\s*[+-]?\d+,\d+\s*", text):
        raise MedSteerError(
            f"strengths is '{text}', which may mean one number or two. Write a decimal point (1.5) for one strength, "
            "or a space after the comma (1, 5) for two."
        )
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        numbers = tuple(float(part) for part in parts)
    except ValueError:
        numbers = ()
    if not numbers or not all(math.isfinite(number) for number in numbers):
        raise MedSteerError(f"strengths is '{text}'; numbers such as '1' or '0.5, 1, 1.5' were expected.")
    return numbers


def strengths_problem(text: str) -> str:
    """Why a text is no strengths, "" when it is some."""
    try:
        multiples_of(text)
    except MedSteerError as error:
        return str(error)
    return ""


def sample_pair(model: ModelPatcher, request: PairRequest) -> Pair:
    """Factual and counterfactual latents of a steered MODEL, or of another prompt, or both (see PairRequest and Pair).

    Raises MedSteerError where there is neither, for samplers whose calls can't be answered from a record, and for
    masks that don't fit.
    """
    plan, request, doubts = prepared(model, request)
    plans = reachable(plan, request, request.multiples)
    begun = begin(model, plan, request, len(plans))
    counterfactual = torch.cat([begun.counterfactual(part) for part in plans])
    run = begun.run
    lock = lock_of(request, begun.allowed, begun.source, len(run.latents), begun.shown)
    records = records_of(model, plan, request, run.latents, run.noise, lock, run.computed)
    doubts += about_size(model, run.latents.shape, request.asked_size)
    doubts += unchanged(begun.factual, counterfactual, records)
    mask = begun.mask
    return Pair(
        factual=begun.factual,
        counterfactual=counterfactual,
        concept_map=run.enlarged(begun.map),
        mask=run.enlarged(mask),
        mask_source=begun.source,
        summary="\n".join([_in_words(run, begun.source, float(mask.mean())), *doubts]),
        records=records,
    )


def prepared(model: ModelPatcher, request: PairRequest) -> tuple[SteeringPlan, PairRequest, list[str]]:
    """The model's steering on the request's schedule, the request with its lock chosen, and warnings about both.

    Raises MedSteerError for what can't be sampled.
    """
    plan = on_schedule(plan_of(model), model)
    doubts = doubts_of(plan, request)
    if request.lock == AUTOMATIC:
        request = replace(request, lock=CONCEPT if plan.steerings else PREDICTION)
    _check(plan, request)
    return plan, request, doubts


def reachable(plan: SteeringPlan, request: PairRequest, multiples: Sequence[float]) -> list[SteeringPlan]:
    """The plan at each multiple of its strengths. Raises MedSteerError for one that would never act."""
    plans = [plan.scaled(multiple) for multiple in multiples]
    for part in plans:
        check_reachable(part, request.schedule.sigmas, {"positive": None, "negative": None})
    return plans


@dataclass(frozen=True, eq=False)
class Begun:
    """A factual, and where its counterfactuals may differ from it.

    factual: latents (B, C, ...); allowed: (B, h, w) bool in latent pixels, None for everywhere; source: as of `Pair`;
    shown: the map (B, h, w) that the lock came from, if any; run: what samples
    """

    run: PairRun
    factual: Tensor
    allowed: Tensor | None
    source: str
    shown: Tensor | None

    def counterfactual(self, plan: SteeringPlan) -> Tensor:
        """The latents of one counterfactual. Raises MedSteerError where they are not finite."""
        latents = self.run.counterfactual(plan, self.allowed)
        if not is_finite(latents):
            raise MedSteerError(
                "The counterfactual's latents are NaN or infinite, and the factual's are not. Lower the strengths, or "
                "look at the counterfactual prompt."
            )
        return latents

    @property
    def map(self) -> Tensor:
        """(B, h, w) in latent pixels; zeros where there is none."""
        return torch.zeros(len(self.run.latents), *self.run.size) if self.shown is None else self.shown

    @property
    def mask(self) -> Tensor:
        """(B, h, w) in latent pixels, 1 where the image may change."""
        everywhere = torch.ones(len(self.run.latents), *self.run.size)
        return everywhere if self.allowed is None else self.allowed.float()


def begin(model: ModelPatcher, plan: SteeringPlan, request: PairRequest, counterfactuals: int) -> Begun:
    """Sample the factual and work out the lock, for ``counterfactuals`` runs at most."""
    run = (ImageRun if request.real else PairRun)(model, plan, request, counterfactuals)
    given = _given_mask(run)
    factual, changes = run.factual(keep_parts=request.lock == PREDICTION)
    if not is_finite(factual):
        raise model_not_finite(model)
    shown = changes.maps(*run.size) if changes.seen else None
    if request.lock == PREDICTION:
        shown = run.prediction_difference()
    shown = None if shown is None else smoothed(shown, request.smoothing)
    return Begun(run, factual, *_allowed(run, given, shown), shown)


def _check(plan: SteeringPlan, request: PairRequest) -> None:
    if not plan.steerings and request.counterfactual is None:
        raise MedSteerError(
            "The model is not steered, so there is no counterfactual. Connect a Steer node's model, or a "
            "counterfactual prompt."
        )
    if request.lock not in LOCKS:
        raise MedSteerError(f"lock is '{request.lock}'; one of {', '.join(LOCKS)} was expected.")
    if request.mask is None and request.lock == CONCEPT and not plan.steerings:
        raise MedSteerError(
            f"lock is '{CONCEPT}', which shows where steering acts, and the model is not steered. Set lock to "
            f"'{PREDICTION}', or connect a mask."
        )
    if request.mask is None and request.lock == PREDICTION and request.counterfactual is None:
        raise MedSteerError(
            f"lock is '{PREDICTION}', which compares two prompts, and no counterfactual prompt is connected. Set lock "
            f"to '{CONCEPT}', or connect one."
        )
    name = getattr(getattr(request.schedule.sampler, "sampler_function", None), "__name__", "")
    if name in NO_COPIES:
        raise MedSteerError(
            f"Counterfactual Sampler can't use this sampler: {NO_COPIES[name]}, so that its calls can't be answered "
            "from a record. Choose another sampler, or make the two images with two samplers and the same seed."
        )


def _given_mask(run: PairRun) -> Tensor | None:
    """The user's mask (B, H, W) in latent pixels, if any, before anything is sampled."""
    request = run.request
    if request.mask is None and request.lock == OPEN:
        return None
    if not run.is_image:
        raise MedSteerError("Masks and locks work for image latents; these are a video's. Set lock to none.")
    return None if request.mask is None else mask_for_latent(request.mask, len(run.latents), *run.size)


def _allowed(run: PairRun, given: Tensor | None, shown: Tensor | None) -> tuple[Tensor | None, str]:
    """The mask (B, H, W) in latent pixels, True where the image may change (None: anywhere), and its source."""
    request = run.request
    if given is not None:
        return given, USER
    if request.lock == OPEN:
        return None, OPEN
    nothing = request.lock == CONCEPT and all(steering.operator.is_identity for steering in run.plan.steerings)
    if nothing or (request.lock == PREDICTION and run.takes_over is None):
        return torch.zeros(len(run.latents), *run.size, dtype=torch.bool), request.lock  # strength 0: the factual
    if shown is None:
        raise MedSteerError(
            "There is no concept map: another node shows the model parts of the image alone (one that tiles, or an "
            "area's), or the steering changes nothing here. Connect a mask instead."
        )
    return threshold_mask(shown, request.threshold, request.dilation), request.lock


def _steered_by(operators: Sequence[Operator], multiples: Sequence[float]) -> str:
    """By which operators and how strongly: as Steer counts it where there is one, else as times of Steer's."""
    strength = getattr(operators[0], "strength", None)
    if len(operators) == 1 and strength is not None:
        return f"{operators[0].name}, strength {', '.join(f'{strength * multiple:g}' for multiple in multiples)}"
    names, times = ", ".join(operator.name for operator in operators), ", ".join(f"{each:g}" for each in multiples)
    return f"{names}; Steer's strengths x {times}"


def _in_words(run: PairRun, source: str, share: float) -> str:
    request, images = run.request, len(run.latents)
    seed, schedule = getattr(request.noise, "seed", request.seed), request.schedule
    origin = "of a real image" if request.real else f"seed {seed}, {schedule.sampler_name}"
    operators = [steering.operator for steering in run.plan.steerings]
    ways = [_steered_by(operators, request.multiples)] if operators else []
    if run.takes_over is not None:
        ways.append(f"the counterfactual prompt from counterfactual_start {request.start_percent:g} on")
    cost = f"cost: {run.cost:.2f} times one image" + (f", {run.tokens}" if run.tokens else "")
    lines = [
        f"{images} factual, {images * len(request.multiples)} counterfactual ({'; '.join(ways) or 'the same prompt'})",
        f"{' x '.join(str(side) for side in pixels_of(run.model, run.latents.shape)[::-1])} pixels, "
        f"{origin}, {schedule.steps} steps, cfg {request.cfg:g}",
        f"mask_source: {source}" + ("" if source == OPEN else f", {share:.0%} of the image may change"),
        cost,
    ]
    return "\n".join(lines)
