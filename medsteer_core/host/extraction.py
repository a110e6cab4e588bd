"""Extraction inside ComfyUI: sample both prompts, stream the statistics of every site, estimate the directions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import comfy.utils
import comfyui_version
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..capture import ActivationSums, SigmaStatistics
from ..errors import MedSteerError
from ..estimators import mean_difference
from ..pathology_vector import PathologyVector
from . import sampling
from .fingerprint import fingerprint
from .patch import observed, plan_of
from .sampling import Schedule

PAIRED, UNPAIRED = "paired", "unpaired"
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


def extract(model: ModelPatcher, request: Request) -> PathologyVector:
    """A pathology vector by the difference of class means (arXiv 2603.07066), with full provenance.

    Each prompt is sampled ``samples`` times. With ``paired`` noise image i of both prompts starts from the same noise;
    with ``unpaired`` the absent prompt takes the next ``samples`` noises of the seed. Progress counts samples x steps.
    """
    if len(request.latent["samples"]) != 1:
        raise MedSteerError(
            f"latent_image has a batch of {len(request.latent['samples'])}; a batch of 1 was expected, since only its "
            "shape counts here. Set batch_size to 1 and use `samples` instead."
        )
    if request.noise not in (PAIRED, UNPAIRED):
        raise MedSteerError(f"noise is '{request.noise}'; 'paired' or 'unpaired' was expected.")
    if _same(request.present, request.absent):
        raise MedSteerError(
            "The prompts 'present' and 'absent' are the same, so there is no direction between them. Give two "
            "different prompts, one with the finding and one without it; if their texts do differ, the text encoder "
            "does not know the words."
        )
    offset = 0 if request.noise == PAIRED else request.samples
    total = 2 * request.samples * request.schedule.steps
    report = _Progress(model, total)
    present = _statistics(model, request.present, request, 0, report)
    absent = _statistics(model, request.absent, request, offset, report)
    provenance = _provenance(model, request, offset)
    return mean_difference(present, absent, provenance, flow=sampling.is_flow(model))


class _Progress:
    """One progress bar with previews for the whole extraction."""

    def __init__(self, model: ModelPatcher, total: int):
        self._bar = comfy.utils.ProgressBar(total)
        self._previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def for_batch(self, size: int) -> Callable:
        def callback(_step: int, x0, _x, _steps: int) -> None:
            preview = None
            if self._previewer is not None:
                preview = self._previewer.decode_latent_to_preview_image("JPEG", x0)
            self._bar.update_absolute(self._bar.current + size, preview=preview)  # cancels here when asked to

        return callback


def _statistics(
    model: ModelPatcher, positive: list, request: Request, first: int, report: _Progress
) -> dict[str, SigmaStatistics]:
    latent = sampling.empty_latent(model, request.latent)
    batch = sampling.batch_that_fits(model, latent, request.samples)
    sums = ActivationSums()
    watched = observed(model, sums)
    for start in range(0, request.samples, batch):
        size = min(batch, request.samples - start)
        noise = sampling.noise_for(latent, request.seed, range(first + start, first + start + size))
        callback = report.for_batch(size)
        # Stochastic samplers draw their own noise from the seed: another batch gets another one.
        seed = (request.seed + first + start) % SEEDS
        sampling.sample(watched, positive, request.negative, noise, request.schedule, request.cfg, seed, callback)
    return sums.statistics()


def _provenance(model: ModelPatcher, request: Request, offset: int) -> dict[str, Any]:
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
        "noise_indices": {"present": [0, samples], "absent": [offset, offset + samples]},
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
