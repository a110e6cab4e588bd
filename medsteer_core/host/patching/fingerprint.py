"""An identity of a model and its LoRAs, short to compute: hashes of shapes and of a few values of every weight."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...vectors.pathology_vector import PathologyVector

SAMPLES = 32


def fingerprint(model: ModelPatcher) -> dict[str, Any]:
    """``{"architecture", "weights", "patches"}``: class name, hash of the weights, hash of the LoRAs ("" for none).

    Weights are read as they are without LoRAs, so that the answer does not depend on what is loaded at the moment.
    """
    weights, patches = hashlib.sha256(), hashlib.sha256()
    patched = False
    entries = model.get_key_patches("diffusion_model.")
    # Buffers stay out: PixArt's unused `y_embedding` is random in every load of a file that lacks it.
    buffers = {f"diffusion_model.{name}" for name, _ in model.model.diffusion_model.named_buffers()}
    for key in sorted(entries.keys() - buffers):
        base, *added = entries[key]
        weights.update(f"{key}\0".encode())
        _update(weights, base[0] if isinstance(base, tuple) else base)
        for patch in added:
            patched = True
            patches.update(f"{key}\0".encode())
            _update(patches, patch)
    network = type(model.model.diffusion_model)
    # A subclass made by this pack counts as the class it extends.
    name = next((c.__name__ for c in network.__mro__ if c.__module__.startswith("comfy.")), network.__name__)
    return {"architecture": name, "weights": weights.hexdigest(), "patches": patches.hexdigest() if patched else ""}


def differs(vector: PathologyVector, model: ModelPatcher) -> str:
    """Why a vector's model is not this one; "" when it is, or when the vector does not say."""
    made_with, here = vector.provenance.get("model"), fingerprint(model)
    if not isinstance(made_with, dict) or made_with == here:
        return ""
    if made_with.get("weights") != here["weights"]:
        return "the vector was extracted from other weights of this architecture"
    return "the vector was extracted with other LoRAs on this model"


def _update(digest: Any, value: Any) -> None:
    """Fold a weight, or a LoRA's nested tuples of weights and strengths, into a hash."""
    if isinstance(value, Tensor):
        flat = value.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLES)
        some = flat[::step][:SAMPLES].to(device="cpu", dtype=torch.float32)
        digest.update(f"{tuple(value.shape)}{value.dtype}".encode())
        digest.update(some.numpy().tobytes())
    elif isinstance(value, list | tuple):
        for part in value:
            _update(digest, part)
    elif isinstance(value, float | int | str | None):
        digest.update(repr(value).encode())
    elif hasattr(value, "weights"):  # comfy's weight adapters (LoRA, LoHa, ...)
        digest.update(type(value).__name__.encode())
        _update(digest, tuple(value.weights) if isinstance(value.weights, list | tuple) else value.weights)
