"""What Counterfactual Sampler knows of its pairs: everything that makes them again, and what they share with others."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import comfyui_version
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from torch import Tensor

from ...dataset.records import REAL, short_hash
from ...steering.plan import Steering, SteeringPlan
from ...steering.token_map import OWN_THRESHOLD, otsu_thresholds
from ...vectors.pathology_vector import PathologyVector
from ...vectors.recipe import recipe
from ..patching.fingerprint import fingerprint
from ..patching.patch import KEY
from .contexts import prompt_of, same_prompt
from .pair_request import PairRequest, RealFactual
from .run_facts import Indescribable, plain

BY_SEED = "seed"
# What a model's options and wrappers hold of this pack's own.
_OWN_OPTIONS = ("wrappers", "callbacks", "medsteer_plan")


def records_of(
    model: ModelPatcher,
    plan: SteeringPlan,
    request: PairRequest,
    latents: Tensor,
    noise: Tensor,
    lock: _Lock,
    computed: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """A record (see dataset/records.py) for each counterfactual image: all images of the first multiple come first.

    ``latents (B, C, ...)`` are those that the run started from and ``noise`` what was added; ``lock``: what held the
    rest of the image fast, one for each image; ``computed``: how many of how many tokens the counterfactuals computed,
    where not all.
    """
    shared = _shared(model, plan, request) | ({} if computed is None else {"computed": dict(computed)})
    same = request.counterfactual is None or same_prompt(request.positive, request.counterfactual)
    images = [_of_image(request, latents, noise, index) for index in range(len(latents))]
    return [
        {
            **ids,
            "changes_nothing": same and all(s.operator.is_identity for s in plan.scaled(multiple).steerings),
            "made": {**shared, **own, "lock": held, "multiple": float(multiple)},
        }
        for multiple in request.multiples
        for (ids, own), held in zip(images, lock, strict=True)
    ]


_Lock = Sequence[Mapping[str, Any]]


def lock_of(
    request: PairRequest, allowed: Tensor | None, source: str, images: int, maps: Tensor | None
) -> list[dict[str, Any]]:
    """How each image was locked. A mask that was drawn is told by its hash, one of the ``maps`` by its rule."""
    if allowed is None:
        return [{"mask_source": source}] * images
    if request.mask is None:
        rule = {"mask_source": source, "threshold": request.threshold, "dilation": request.dilation}
        rule |= {"smoothing": request.smoothing} if request.smoothing else {}
        if request.threshold != OWN_THRESHOLD or maps is None:
            return [rule] * images
        return [{**rule, "threshold": round(limit, 4), "rule": "otsu"} for limit in otsu_thresholds(maps).tolist()]
    return [{"mask_source": source, "mask": tensor_hash(mask)} for mask in allowed]


def tensor_hash(value: Tensor) -> str:
    """16 hex digits of SHA-256 over a tensor's type, shape and values."""
    data = value.detach().cpu().contiguous()
    data = data.float() if data.is_floating_point() else data.to(torch.int64)
    digest = hashlib.sha256(f"{tuple(value.shape)} {data.dtype} ".encode())
    digest.update(data.numpy().tobytes())
    return digest.hexdigest()[:16]


def _shared(model: ModelPatcher, plan: SteeringPlan, request: PairRequest) -> dict[str, Any]:
    """What all pairs of the run have in common."""
    schedule = request.schedule
    # A vector is read once, however many steerings use it.
    vectors = {id(v): _vector(v) for s in plan.steerings for v in (s.vector, s.target) if v is not None}
    return {
        "model": {**fingerprint(model), **({"also": also} if (also := _other_patches(model)) else {})},
        "prompts": {
            name: {"text": request.texts.get(name), **prompt_of(getattr(request, name))}
            for name in ("positive", "negative", *(() if request.counterfactual is None else ("counterfactual",)))
        },
        **({} if request.counterfactual is None else {"counterfactual_start": float(request.start_percent)}),
        "sampler": schedule.sampler_name,
        **_sampler_options(schedule.sampler),
        "scheduler": schedule.scheduler,
        "steps": schedule.steps,
        "sigmas": tensor_hash(schedule.sigmas),
        "cfg": float(request.cfg),
        "steering": [_steering(steering, vectors) for steering in plan.steerings],
        "versions": {"comfyui": comfyui_version.__version__, "torch": torch.__version__},
    }


def _of_image(
    request: PairRequest, latents: Tensor, noise: Tensor, index: int
) -> tuple[dict[str, str], dict[str, Any]]:
    """One image's ids of what it shares, and its own part of how it was made."""
    shape = [1, *latents.shape[1:]]
    if request.real:
        return _of_real(request.real[index], shape)
    listed = request.latent.get("batch_index")
    number = int(listed[index]) if listed is not None else index
    source = request.noise
    by_seed = source is None or type(source) is Noise_RandomNoise
    made: dict[str, Any] = {
        "seed": int(getattr(source, "seed", request.seed)),
        "batch_index": number,
        "latent_shape": shape,
        "noise": BY_SEED if by_seed else f"{type(source).__name__} {tensor_hash(noise[index])}",
    }
    if len(latents) > 1 and _by_batch(request, latents[index], listed is not None):
        made["images_at_once"] = len(latents)
    # The versions of one noise that a batch's size and a sampler make count as one: rather too few groups than a leak.
    noise_id = short_hash({"noise": made["noise"]} if not by_seed else
                          {key: made[key] for key in ("seed", "batch_index", "latent_shape", "noise")})  # fmt: skip
    if not torch.count_nonzero(latents[index]):
        return {"group_id": noise_id, "noise_id": noise_id}, made
    made["starting_latent"] = tensor_hash(latents[index])
    if (mask := request.latent.get("noise_mask")) is not None:
        made["noise_mask"] = tensor_hash(mask[index % len(mask)])
    # Pairs from one image belong together even more than those from one noise; without noise there is only the image.
    group_id = short_hash({"starting_latent": made["starting_latent"]})
    return {"group_id": group_id, "noise_id": noise_id if torch.count_nonzero(noise[index]) else group_id}, made


def _of_real(real: RealFactual, shape: list[int]) -> tuple[dict[str, str], dict[str, Any]]:
    """The same of a real image, which neither noise nor its latents' last bits tell from others."""
    own = short_hash({"group": real.group} if real.group else {"image": real.image})
    seen = {} if real.seen_at is None else {"seen_at": list(real.seen_at)}
    made = {"factual": REAL, "image": real.image, "latent_shape": shape, "sampler": "difference", **seen}
    return {"group_id": own, "noise_id": own}, made


def _by_batch(request: PairRequest, latent: Tensor, has_indices: bool) -> bool:
    """Whether the image's noise depends on how many images the batch had."""
    drawn_at_once = not has_indices and latent.numel() % 16 != 0  # how PyTorch fills a tensor of noise
    return drawn_at_once or draws_as_it_goes(request)


def draws_as_it_goes(request: PairRequest) -> bool:
    """Whether the sampler draws noise at its steps, which it does for the whole batch."""
    function = getattr(request.schedule.sampler, "sampler_function", None)
    return function is not None and "noise_sampler" in inspect.signature(function).parameters


def _steering(steering: Steering, vectors: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    parameters = steering.operator.to_dict()
    window = [steering.window.start_sigma, steering.window.end_sigma]
    facts = {
        "vector": vectors[id(steering.vector)],
        "operator": parameters.pop("name"),
        "strength": parameters.pop("strength", None),
        "parameters": parameters,
        "sites": list(steering.sites),
        "window": [sigma if math.isfinite(sigma) else None for sigma in window],
        "rows": steering.rows,
    }
    if steering.target is not None:
        facts["target"] = vectors[id(steering.target)]
    if (curve := steering.curve) is not None:
        facts["curve"] = {"sigmas": list(curve.sigmas), "gains": list(curve.gains), "flow": curve.flow}
    if steering.mask is not None:
        facts["mask"] = tensor_hash(steering.mask)
    return facts


def _vector(vector: PathologyVector) -> dict[str, Any]:
    return {**recipe(vector), "sha256": vector.content_hash()}


def _sampler_options(sampler: Any) -> dict[str, Any]:
    """The sampler's own options, where it has any that can be told."""
    try:
        options = plain({**sampler.extra_options, **sampler.inpaint_options})
    except Indescribable as why:
        options = {"unknown": str(why)}
    return {"sampler_options": options} if options else {}


def _other_patches(model: ModelPatcher) -> list[str]:
    """What else is changed about the model, by name alone: the workflow in the image says how."""
    options = dict(model.model_options)
    inner = options.pop("transformer_options", {})
    wrappers = inner.get("wrappers", {})
    found = [f"object {name}" for name in model.object_patches]
    found += [f"option {name}" for name in options]
    found += [f"option {name}" for name in inner if name not in _OWN_OPTIONS]
    for where in (wrappers, model.wrappers):
        found += [f"wrapper {key}" for keyed in where.values() for key in keyed if key != KEY]
    return sorted({str(name) for name in found})
