"""Extraction inside ComfyUI: sample both prompts, stream the statistics of every site, estimate the directions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.utils
import comfyui_version
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..affine import affine_map
from ..capture import ActivationSums
from ..errors import MedSteerError
from ..estimators import mean_difference
from ..pathology_vector import PathologyVector
from ..sample_estimators import ESTIMATORS, NEEDS_PAIRS, estimate
from ..sample_report import KEY as REPORT
from ..sample_report import LEAST_SAMPLES, separability_facts
from ..sample_watch import SampleWatch
from ..token_pairs import SIDES, PairedActivations, pairs_that_fit
from . import sampling
from .fingerprint import fingerprint
from .patch import observed, plan_of
from .sampling import Schedule
from .sites import find_sites, output_width

PAIRED, UNPAIRED, SAME_STATE = "paired", "unpaired", "same state"
MEAN_DIFFERENCE = "mean difference"
ESTIMATOR_NAMES = [name.replace("_", " ") for name in ESTIMATORS]
NEEDS_VARIATION = ("lda", "leace")
UNKNOWN_WIDTH = 4096  # what a site is reckoned with whose class does not say its width
SEEDS = (1 << 64) - 1  # stochastic samplers on the CPU add 1, and torch takes nothing from 2**64 on


@dataclass(frozen=True, eq=False)
class Request:
    """What Extract Pathology Vector was asked for. ``present``, ``absent``, ``negative`` are CONDITIONINGs."""

    present: list
    absent: list
    negative: list
    latent: dict
    samples: int
    seed: int
    cfg: float
    noise: str
    schedule: Schedule
    texts: Mapping[str, str | None] = field(default_factory=dict)  # the prompts' texts, where known
    rank: int = 8  # directions a site and step, with noise "same state"; otherwise there is one
    estimator: str = MEAN_DIFFERENCE  # one of ESTIMATOR_NAMES


def extract(model: ModelPatcher, request: Request) -> PathologyVector:
    """A pathology vector with full provenance.

    By the difference of class means (arXiv 2603.07066) or another ``estimator``: each prompt is sampled ``samples``
    times. With ``paired`` noise image i of both prompts starts from the same noise; with ``unpaired`` the absent prompt
    takes the next ``samples`` noises of the seed. From four samples on the provenance's "separability" says how well
    each site and step tells unseen samples apart, or why that is not known. With noise ``same state`` by regression
    instead (affine.py): ``samples`` images in all, half of each prompt, and at every state of theirs the other prompt
    is evaluated too. Progress counts samples x steps.
    """
    batch = request.latent["samples"].shape[0]
    if batch != 1:
        raise MedSteerError(
            f"latent_image has a batch of {batch}; a batch of 1 was expected, since only its shape counts here. Set "
            "batch_size to 1 and use `samples` instead."
        )
    if request.noise not in (PAIRED, UNPAIRED, SAME_STATE):
        raise MedSteerError(f"noise is '{request.noise}'; 'paired', 'unpaired' or 'same state' was expected.")
    if _same(request.present, request.absent):
        raise MedSteerError(
            "The prompts 'present' and 'absent' are the same, so there is no direction between them. Give two "
            "different prompts, one with the finding and one without it; if their texts do differ, the text encoder "
            "does not know the words."
        )
    _check_estimator(request)
    if request.noise == SAME_STATE:
        return _extract_same_state(model, request)
    offset = 0 if request.noise == PAIRED else request.samples
    total = 2 * request.samples * request.schedule.steps
    report = _Progress(model, total)
    present = _watch(model, request.present, request, 0, report)
    absent = _watch(model, request.absent, request, offset, report)
    provenance = _provenance(model, request, range(request.samples), range(offset, offset + request.samples))
    return _estimated(request, present, absent, provenance, sampling.is_flow(model))


def _check_estimator(request: Request) -> None:
    """Refuse, before anything is sampled, an estimator that this request can't feed."""
    name = request.estimator
    if name not in ESTIMATOR_NAMES:
        raise MedSteerError(f"estimator is '{name}'; one of {', '.join(ESTIMATOR_NAMES)} was expected.")
    if request.noise == SAME_STATE and name != MEAN_DIFFERENCE:
        raise MedSteerError(
            f"The estimator '{name}' does not go with noise 'same state', which has an estimator of its own. Set "
            f"estimator to '{MEAN_DIFFERENCE}', or noise to 'paired'."
        )
    if _key(name) in NEEDS_PAIRS and request.noise != PAIRED:
        raise MedSteerError(
            f"The estimator '{name}' compares pairs of samples, and noise is '{request.noise}'. Set noise to 'paired', "
            "or choose another estimator."
        )
    if _key(name) in NEEDS_VARIATION and request.samples < 2:
        raise MedSteerError(
            f"The estimator '{name}' has to know how samples vary, and samples is {request.samples}; 2 or more were "
            "expected. Set more samples; 16 is a good start."
        )


def _key(estimator: str) -> str:
    return estimator.replace(" ", "_")


class _Progress:
    """One progress bar with previews for the whole extraction."""

    def __init__(self, model: ModelPatcher, total: int):
        self._bar = comfy.utils.ProgressBar(total)
        self._previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def for_batch(self, size: int) -> Callable:
        def callback(_step: int, x0, _x, _steps: int) -> None:
            preview = None
            if self._previewer is not None:
                shown = x0.tensors[0] if x0.is_nested else x0  # of video and sound, the video
                preview = self._previewer.decode_latent_to_preview_image("JPEG", shown)
            self._bar.update_absolute(self._bar.current + size, preview=preview)  # cancels here when asked to

        return callback


def _watch(model: ModelPatcher, positive: list, request: Request, first: int, report: _Progress) -> SampleWatch:
    """One prompt's samples, from image ``first`` of the seed on: what the estimator and the report need of them."""
    needed = request.estimator != MEAN_DIFFERENCE
    watch = SampleWatch(ActivationSums(), request.samples, needed, wanted=needed or request.samples >= LEAST_SAMPLES)
    watched = observed(model, watch)
    for images, noise, seed in _batches(model, request, range(first, first + request.samples)):
        callback = report.for_batch(len(images))
        with watch.run(images):
            sampling.sample(watched, positive, request.negative, noise, request.schedule, request.cfg, seed, callback)
    return watch


def _estimated(
    request: Request, present: SampleWatch, absent: SampleWatch, provenance: dict[str, Any], flow: bool
) -> PathologyVector:
    """The vector of what was seen, with the report on how well it tells unseen samples apart."""
    name, records = _key(request.estimator), (present.record(), absent.record())
    if request.estimator == MEAN_DIFFERENCE:
        vector = mean_difference(present.sums.statistics(), absent.sums.statistics(), provenance, flow)
    else:
        vector = estimate(name, *records, provenance, flow)
    if request.samples < LEAST_SAMPLES:
        return vector
    if None in records:
        facts = {"left_out": present.left_out or absent.left_out}
    else:
        facts = separability_facts(*records, name, vector.site_names)
    return replace(vector, provenance={**vector.provenance, REPORT: facts})


def _extract_same_state(model: ModelPatcher, request: Request) -> PathologyVector:
    """Both prompts at every state of both prompts' trajectories: a counterfactual passes through both kinds."""
    if request.rank < 1:
        raise MedSteerError(f"rank is {request.rank}; 1 or more was expected.")
    prompts = dict(zip(SIDES, (request.present, request.absent), strict=True))
    half = (request.samples + 1) // 2
    images_of = dict(zip(SIDES, (range(half), range(half, request.samples)), strict=True))
    widths = [output_width(site) or UNKNOWN_WIDTH for site in find_sites(model.model.diffusion_model).values()]
    seen = PairedActivations(pairs_that_fit(widths, request.schedule.steps))
    report = _Progress(model, request.samples * request.schedule.steps)
    for followed, beside in (SIDES, SIDES[::-1]):
        watched = observed(observed(model, seen.side(followed)), seen.side(beside), sampling.OTHER)
        for images, noise, seed in _batches(model, request, images_of[followed]):
            seen.begin(images)
            sampling.sample_beside(
                watched, prompts[followed], request.negative, prompts[beside], noise, request.schedule, request.cfg,
                seed, report.for_batch(len(images)),
            )  # fmt: skip
    means = [seen.statistics(side) for side in SIDES]
    provenance = _provenance(model, request, *images_of.values())
    return affine_map(seen.pairs(), *means, request.rank, provenance, flow=sampling.is_flow(model))


def _batches(model: ModelPatcher, request: Request, images: range) -> Iterator[tuple[range, Tensor, int]]:
    """The images in batches that fit, each with its noise and a seed for samplers that draw noise of their own."""
    latent = sampling.empty_latent(model, request.latent)
    size = sampling.batch_that_fits(model, latent, len(images))
    for start in range(0, len(images), size):
        part = images[start : start + size]
        # Another batch gets another seed, or it would draw the same noise.
        yield part, sampling.noise_for(latent, request.seed, part), (request.seed + part.start) % SEEDS


def _provenance(model: ModelPatcher, request: Request, present: range, absent: range) -> dict[str, Any]:
    plan, samples = request.schedule, request.samples
    return {
        "model": fingerprint(model),
        "prompts": {
            name: {"text": request.texts.get(name), **prompt_of(getattr(request, name))}
            for name in ("present", "absent", "negative")
        },
        "seed": request.seed,
        "samples": samples,
        "noise": request.noise,
        "noise_indices": {"present": [present.start, present.stop], "absent": [absent.start, absent.stop]},
        "latent_shape": list(sampling.empty_latent(model, request.latent).shape),
        "sampler": plan.sampler_name,
        "scheduler": plan.scheduler,
        "steps": plan.steps,
        "cfg": request.cfg,
        "versions": {"comfyui": comfyui_version.__version__, "torch": torch.__version__},
        "steered": [s.operator.to_dict() for s in plan_of(model).steerings],
    }


def prompt_of(conditioning: list) -> dict[str, Any]:
    """What is known of a conditioning itself: its shapes and a hash."""
    tensors = [entry[0] for entry in conditioning]
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return {"shapes": [list(tensor.shape) for tensor in tensors], "sha256": digest.hexdigest()}


def _same(one: list, other: list) -> bool:
    """Whether two conditionings are surely equal. With unpaired noise they would still give a direction: of noise."""

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return torch.equal(a, b)
        return a is b or (isinstance(a, str | int | float | tuple) and a == b)

    return len(one) == len(other) and all(
        equal(a[0], b[0]) and a[1].keys() == b[1].keys() and all(equal(a[1][key], b[1][key]) for key in a[1])
        for a, b in zip(one, other, strict=True)
    )


def differs(vector: PathologyVector, model: ModelPatcher) -> str:
    """Why a vector's model is not this one; "" when it is, or when the vector does not say."""
    made_with, here = vector.provenance.get("model"), fingerprint(model)
    if not isinstance(made_with, dict) or made_with == here:
        return ""
    if made_with.get("weights") != here["weights"]:
        return "the vector was extracted from other weights of this architecture"
    return "the vector was extracted with other LoRAs on this model"
