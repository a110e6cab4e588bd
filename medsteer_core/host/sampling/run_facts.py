"""Everything that decides an extraction's activations, as JSON: what is not fully described is not kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import comfyui_version
import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import KSAMPLER
from torch import Tensor, nn

from ..patching.fingerprint import fingerprint
from .runs import Schedule

# A model that carries any of these does what no description tells.
PATCHES = ("wrappers", "callbacks", "injections", "hook_patches", "additional_models", "weight_wrapper_patches")
KNOWN_OBJECTS = {"model_sampling", "latent_format"}


class Indescribable(Exception):
    """Something that decides the result and can't be told apart from others of its kind; says what."""


def model_facts(model: ModelPatcher) -> dict[str, Any]:
    """The weights, LoRAs, number types and noise schedule of a model. Raises Indescribable for one with patches."""
    for name in PATCHES:
        if getattr(model, name, None):
            raise Indescribable("the model is patched")
    if set(model.object_patches) - KNOWN_OBJECTS:
        raise Indescribable("parts of the model are replaced")
    options = dict(model.model_options)
    if options.pop("transformer_options", None) or options:
        raise Indescribable("the model is patched")
    return {
        "fingerprint": fingerprint(model),
        "types": [str(model.model_dtype()), str(getattr(model.model, "manual_cast_dtype", None))],
        "objects": {name: _object_facts(model.get_model_object(name)) for name in sorted(KNOWN_OBJECTS)},
        "versions": [comfyui_version.__version__, torch.__version__],
    }


def schedule_facts(schedule: Schedule) -> dict[str, Any]:
    """The sampler with its options, and the noise levels. Raises Indescribable for a sampler of an unknown kind."""
    sampler = schedule.sampler
    if type(sampler) is not KSAMPLER:
        raise Indescribable(f"the sampler is a {type(sampler).__name__}")
    options = [sampler.extra_options, sampler.inpaint_options]
    return {"sampler": sampler.sampler_function.__name__, "options": plain(options), "sigmas": plain(schedule.sigmas)}


def plain(value: Any) -> Any:
    """A value as JSON, tensors as hashes. Raises Indescribable for what is no number, text, tensor or collection."""
    if isinstance(value, Tensor):
        data = value.detach().to(device="cpu", dtype=torch.float64).contiguous().numpy().tobytes()
        return [str(value.dtype), list(value.shape), hashlib.sha256(data).hexdigest()]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return repr(value)  # also of what JSON has no number for
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in sorted(value.items(), key=lambda item: str(item[0]))}
    raise Indescribable(f"a {type(value).__name__} takes part")


def _object_facts(thing: Any) -> list[Any]:
    """The class of a part of the model, its numbers and its buffers."""
    values = {name: value for name, value in vars(thing).items() if not name.startswith("_") and name != "training"}
    if isinstance(thing, nn.Module):
        values |= dict(thing.named_buffers())
    names = [kind.__qualname__ for kind in type(thing).__mro__]
    return [names, plain({name: value for name, value in values.items() if not callable(value)})]
