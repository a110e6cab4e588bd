"""For each image the least strength that flips it, over one recorded factual image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...errors import MedSteerError
from ...steering.least_strength import Found, next_multiple
from ...steering.operators import LARGEST
from ...steering.plan import SteeringPlan
from ..patching.native_size import about_size
from .contexts import one_of
from .counterfactual import Pair, begin, prepared, reachable
from .flips import Flips
from .pair_doubts import unchanged
from .pair_record import draws_as_it_goes, lock_of, records_of
from .pair_request import PairRequest
from .pair_run import PairRun


@dataclass(frozen=True, eq=False)
class Calibrated:
    """Pairs at their own strengths.

    pair: one counterfactual for each factual (see `Pair`), at the least multiple that flipped it, at 1 where none did
    found: what was tried of each; counted: whether its factual was what it should be, so that it was asked about
    """

    pair: Pair
    found: list[Found]
    counted: list[bool]


def calibrate(model: ModelPatcher, request: PairRequest, flips: Flips, passes: int, most: float) -> Calibrated:
    """The pairs that `sample_pair` makes, each image with the least multiple of the strengths that ``flips`` it.

    At most ``passes`` counterfactuals an image are sampled, at multiples up to ``most``; they share the record of one
    factual image. The request's ``multiples`` are not looked at.

    Raises MedSteerError as `sample_pair` does, for a model that is not steered, and for numbers that make no sense.
    """
    _check(passes, most)
    plan, request, doubts = prepared(model, request)
    if not plan.steerings:
        raise MedSteerError(
            "The model is not steered, so there is no strength to find. Connect a Steer node's model; a counterfactual "
            "prompt alone has none."
        )
    reachable(plan, request, (0.5, most))  # raises for operators without a strength
    whole = PairRun(model, plan, request, passes)  # for its latents and its noise
    if len(whole.latents) > 1 and draws_as_it_goes(request):
        raise MedSteerError(
            f"The sampler {request.schedule.sampler_name} draws its noise for all images of a batch at once, and here "
            "each image goes its own way. Set the batch size to 1 and use several seeds, or choose another sampler."
        )
    flips.begin(whole.latents, whole.noise)
    images = []
    for place in range(len(whole.latents)):  # one after the other: what a run keeps of its tokens is large
        images.append(_searched(model, plan, _of(request, whole, place), flips, passes, most))
    lock = [each for image in images for each in image.lock]
    records = _records(model, plan, request, whole, lock, images)
    factual = torch.cat([image.factual for image in images])
    counterfactual = torch.cat([image.latents for image in images])
    doubts += about_size(model, whole.latents.shape, request.asked_size)
    doubts += unchanged(factual, counterfactual, records)
    pair = Pair(
        factual=factual,
        counterfactual=counterfactual,
        concept_map=whole.enlarged(torch.cat([image.map for image in images])),
        mask=whole.enlarged(torch.cat([image.mask for image in images])),
        mask_source=images[0].source,
        summary="\n".join([*_in_words(images, plan), *doubts]),
        records=records,
    )
    return Calibrated(pair, [image.found for image in images], [image.counted for image in images])


def told(made: Calibrated) -> list[dict[str, Any]]:
    """What was found of each image, for JSON: the least multiple (null where none flipped it), and what was tried."""
    return [
        {"image": place, "multiple": found.least, "counted": counted,
         "tried": [{"multiple": multiple, "flipped": did} for multiple, did in found.tried]}
        for place, (found, counted) in enumerate(zip(made.found, made.counted, strict=True))
    ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Image:
    """What became of one image."""

    factual: Tensor
    latents: Tensor
    map: Tensor
    mask: Tensor
    source: str
    lock: Sequence[Mapping[str, Any]]
    found: Found
    counted: bool
    multiple: float
    computed: Mapping[str, int] | None
    cost: float


def _searched(
    model: ModelPatcher, plan: SteeringPlan, request: PairRequest, flips: Flips, passes: int, most: float
) -> _Image:
    """Find one image's multiple, with the latents that it gives; where none does it, those of the first that was tried,
    which is Steer's own strength."""
    begun = begin(model, plan, request, passes)
    tried: list[tuple[float, bool]] = []
    made: dict[float, Tensor] = {}
    counted = True
    while len(tried) < passes and (multiple := next_multiple(tried, most)) is not None:
        made[multiple] = begun.counterfactual(plan.scaled(multiple))
        did = flips(begun.factual, made[multiple])
        if did is None:
            counted = False
            break
        tried.append((multiple, did))
    found = Found(tuple(tried))
    multiple = found.least or next(iter(made))
    return _Image(
        factual=begun.factual,
        latents=made[multiple],
        map=begun.map,
        mask=begun.mask,
        source=begun.source,
        lock=lock_of(request, begun.allowed, begun.source, 1, begun.shown),
        found=found,
        counted=counted,
        multiple=multiple,
        computed=begun.run.computed,
        cost=begun.run.cost,
    )


@dataclass(frozen=True)
class _SliceOfNoise:
    """A NOISE, as ComfyUI's sampler nodes take one: that of some images of a batch."""

    noise: Tensor
    seed: int

    def generate_noise(self, _latent: Mapping[str, Any]) -> Tensor:
        return self.noise


def _of(request: PairRequest, whole: PairRun, place: int) -> PairRequest:
    """The request of one image of the batch."""
    images, here = len(whole.latents), slice(place, place + 1)
    latent = {**request.latent, "samples": whole.latents[here]}
    if (mask := latent.get("noise_mask")) is not None:
        latent["noise_mask"] = mask[here] if len(mask) == images else mask[:1]
    if "batch_index" in latent:
        latent["batch_index"] = latent["batch_index"][here]
    drawn = request.mask
    return replace(
        request,
        positive=one_of(request.positive, place, images),
        negative=one_of(request.negative, place, images),
        counterfactual=None if request.counterfactual is None else one_of(request.counterfactual, place, images),
        latent=latent,
        mask=drawn[here] if drawn is not None and drawn.ndim == 3 and len(drawn) == images else drawn,
        noise=_SliceOfNoise(whole.noise[here], whole.seed),
    )


def _records(
    model: ModelPatcher, plan: SteeringPlan, request: PairRequest, whole: PairRun,
    lock: Sequence[Mapping[str, Any]], images: Sequence[_Image],
) -> list[dict[str, Any]]:  # fmt: skip
    """A record for each image, at its own multiple."""
    records = []
    for place, image in enumerate(images):
        own = replace(request, multiples=(image.multiple,))
        records.append(records_of(model, plan, own, whole.latents, whole.noise, lock, image.computed)[place])
    return records


def _check(passes: int, most: float) -> None:
    if passes < 1:
        raise MedSteerError(f"passes is {passes}; 1 or more counterfactuals an image were expected.")
    if not 0 < most <= LARGEST:
        raise MedSteerError(f"most is {most:g}; a number above 0, {LARGEST:g} at most, was expected.")


def _in_words(images: Sequence[_Image], plan: SteeringPlan) -> list[str]:
    counted = [image for image in images if image.counted]
    least = sorted(image.found.least for image in counted if image.found.least is not None)
    lines = [f"flipped {len(least)} of {len(counted)}, each at the least strength that does it"]
    if least:
        strengths = {steering.operator.strength for steering in plan.steerings}
        own = strengths.pop() if len(strengths) == 1 else None
        named = "strength" if own is not None else "times the strengths of Steer"
        low, middle, high = (value * (own or 1.0) for value in (least[0], least[len(least) // 2], least[-1]))
        spread = f"{low:.3g} to {high:.3g}, median {middle:.3g}" if low < high else f"{low:.3g}"
        lines.append(f"{named}: {spread}")
    if never := [place + 1 for place, image in enumerate(images) if image.counted and image.found.least is None]:
        lines.append(f"never flipped, shown at Steer's strength: number {', '.join(map(str, never))}")
    if left := len(images) - len(counted):
        lines.append(f"{left} not asked about: the factual is not of the source class, or unlike what the judge knows")
    lines.append(f"cost: {sum(image.cost for image in images) / len(images):.2f} times one image")
    return lines
