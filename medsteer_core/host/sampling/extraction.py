"""Extraction inside ComfyUI: sample both prompts, stream the statistics of every site, estimate the directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfyui_version
import torch
from comfy.model_patcher import ModelPatcher

from ...endophantom.text import about_ignored
from ...errors import MedSteerError
from ...extraction.affine import affine_map
from ...extraction.capture import ActivationSums
from ...extraction.estimators import mean_difference
from ...extraction.sample_estimators import ESTIMATORS, NEEDS_PAIRS, estimate
from ...extraction.sample_report import KEY as REPORT
from ...extraction.sample_report import LEAST_SAMPLES, separability_facts
from ...extraction.sample_watch import SampleWatch
from ...extraction.token_pairs import SIDES, PairedActivations, pairs_that_fit
from ...vectors.pathology_vector import PathologyVector
from ..patching.fingerprint import fingerprint
from ..patching.levels import is_flow
from ..patching.native_size import about_size
from ..patching.patch import observed, plan_of
from ..patching.sites import find_sites, output_width
from . import runs as sampling
from .contexts import context_texts, contexts_of, ignored_words, prompt_of, same_prompt
from .extraction_request import MEAN_DIFFERENCE, PAIRED, SAME_STATE, UNPAIRED, Request
from .gathering import Batch, Gathering

ESTIMATOR_NAMES = [name.replace("_", " ") for name in ESTIMATORS]
NEEDS_VARIATION = ("lda", "leace")
UNKNOWN_WIDTH = 4096  # what a site is reckoned with whose class does not say its width


def extract(model: ModelPatcher, request: Request, tell: Callable[[str], None] = lambda text: None) -> PathologyVector:
    """A pathology vector with full provenance.

    By the difference of class means (arXiv 2603.07066) or another ``estimator``: each prompt is sampled ``samples``
    times. With ``paired`` noise image i of both prompts starts from the same noise; with ``unpaired`` the present
    prompt takes the even noises of the seed and the absent prompt the odd ones, so that more samples add to fewer. A
    prompt in several contexts (contexts.py) takes them in turns. From four samples on the provenance's "separability"
    says how well each site and step tells unseen samples apart, or why that is not known.

    With noise ``same state`` by regression instead (affine.py): ``samples`` images in all, half of each prompt, and at
    every state of theirs the other prompt is evaluated too.

    Progress counts samples x steps, and the fit after them. What is in ``request.store`` is not sampled again, and what
    was sampled is kept there, also of an extraction that was stopped; ``tell`` hears what came from there.
    """
    if request.noise not in (PAIRED, UNPAIRED, SAME_STATE):
        raise MedSteerError(f"noise is '{request.noise}'; 'paired', 'unpaired' or 'same state' was expected.")
    unknown = about_ignored(ignored_words(request.present, request.absent, request.negative))
    if same_prompt(request.present, request.absent):
        raise MedSteerError(
            "The prompts 'present' and 'absent' are the same to the model, so there is no direction between them. Give "
            "two different prompts, one with the finding and one without it. "
            + (unknown or "If their texts do differ, the text encoder does not know the words.")
        )
    if unknown:
        tell(f"Warning: {unknown}")
    for doubt in about_size(model, sampling.empty_latent(model, request.latent).shape):
        tell(doubt)
    _check_estimator(request)
    if request.noise == SAME_STATE:
        return _extract_same_state(model, request, tell)
    stride = 1 if request.noise == PAIRED else 2
    images_of = {
        side: range(first, stride * request.samples, stride) for side, first in zip(SIDES, (0, stride - 1), strict=True)
    }
    gathering = Gathering(model, request, 2 * request.samples, tell)
    present, absent = (_watch(gathering, side, images) for side, images in images_of.items())
    provenance = _provenance(model, request, *images_of.values())
    return _estimated(request, present, absent, provenance, is_flow(model))


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


def _watch(gathering: Gathering, side: str, images: range) -> SampleWatch:
    """One prompt's samples from these noises of the seed: what the estimator and the report need of them."""
    request = gathering.request
    needed = request.estimator != MEAN_DIFFERENCE
    watch = SampleWatch(ActivationSums(), request.samples, needed, wanted=needed or request.samples >= LEAST_SAMPLES)
    watched = observed(gathering.model, watch)
    prompts = contexts_of(getattr(request, side))

    def run(batch: Batch) -> None:
        with watch.run(batch.images):
            sampling.sample(
                watched, prompts[batch.context % len(prompts)], request.negative, batch.noise, request.schedule,
                request.cfg, batch.seed, batch.callback,
            )  # fmt: skip

    with gathering.kept(side, [getattr(request, side)], images, watch.go_on, lambda: watch.to_state()) as done:
        gathering.sample(images, done, run)
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


def _extract_same_state(model: ModelPatcher, request: Request, tell: Callable[[str], None]) -> PathologyVector:
    """Both prompts at every state of both prompts' trajectories: a counterfactual passes through both kinds."""
    if request.rank < 1:
        raise MedSteerError(f"rank is {request.rank}; 1 or more was expected.")
    prompts = {side: contexts_of(getattr(request, side)) for side in SIDES}
    images_of = {side: range(request.samples)[place::2] for place, side in enumerate(SIDES)}
    widths = [output_width(site) or UNKNOWN_WIDTH for site in find_sites(model.model.diffusion_model).values()]
    seen = PairedActivations(pairs_that_fit(widths, request.schedule.steps))
    gathering = Gathering(model, request, request.samples, tell)

    def runner(followed: str, beside: str) -> Callable[[Batch], None]:
        watched = observed(observed(model, seen.side(followed)), seen.side(beside), sampling.OTHER)

        def run(batch: Batch) -> None:
            own, other = (prompts[side][batch.context % len(prompts[side])] for side in (followed, beside))
            with seen.run(batch.images):
                sampling.sample_beside(
                    watched, own, request.negative, other, batch.noise, request.schedule, request.cfg, batch.seed,
                    batch.callback,
                )  # fmt: skip

        return run

    both = [request.present, request.absent]
    with gathering.kept(SAME_STATE, both, range(request.samples), seen.go_on, seen.to_state) as done:
        for followed, beside in (SIDES, SIDES[::-1]):
            gathering.sample(images_of[followed], done, runner(followed, beside))
    means = [seen.statistics(side) for side in SIDES]
    provenance = _provenance(model, request, *images_of.values())
    return affine_map(seen.pairs(), *means, request.rank, provenance, flow=is_flow(model))


def _provenance(model: ModelPatcher, request: Request, present: range, absent: range) -> dict[str, Any]:
    plan, samples = request.schedule, request.samples
    return {
        "model": fingerprint(model),
        "prompts": {
            name: {"text": _text(request, name), **prompt_of(getattr(request, name))}
            for name in ("present", "absent", "negative")
        },
        "seed": request.seed,
        "samples": samples,
        "noise": request.noise,
        "noise_indices": {side: _numbers(images) for side, images in zip(SIDES, (present, absent), strict=True)},
        "latent_shape": list(sampling.empty_latent(model, request.latent).shape),
        "sampler": plan.sampler_name,
        "scheduler": plan.scheduler,
        "steps": plan.steps,
        "cfg": request.cfg,
        "versions": {"comfyui": comfyui_version.__version__, "torch": torch.__version__},
        "steered": [s.operator.to_dict() for s in plan_of(model).steerings],
    }


def _text(request: Request, name: str) -> str | None:
    """A prompt's text where it is known; of several contexts the first."""
    return request.texts.get(name) or next(iter(context_texts(getattr(request, name))), None)


def _numbers(images: range) -> list[int]:
    """A range as [start, stop], or [start, stop, step]: `range(*numbers)` is the range."""
    return [images.start, images.stop] if images.step == 1 else [images.start, images.stop, images.step]
