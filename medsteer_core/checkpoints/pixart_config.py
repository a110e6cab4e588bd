"""What a PixArt's weights don't say: its heads, its position grid and its family, from config.json and other traces."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import MedSteerError
from ..files.inside import shown
from .pixart_state import ADVICE, Sizes

ALPHA, SIGMA = "PixArt-alpha", "PixArt-Sigma"
CLASSES = ("PixArtTransformer2DModel", "Transformer2DModel")  # the second before diffusers 0.28
HEAD_CHANNELS = 72  # of every published PixArt
FAMILY_OF_TOKENS = {120: ALPHA, 300: SIGMA}
TOKENS_OF_FAMILY = {family: tokens for tokens, family in FAMILY_OF_TOKENS.items()}
# What PixArt is made of and ComfyUI's PixArt has no other choice for: key, what it must be if it is there.
FIXED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("activation_fn", ("gelu-approximate",)),
    ("attention_bias", (True,)),
    ("attention_type", ("default", None)),
    ("double_self_attention", (False, None)),
    ("norm_elementwise_affine", (False,)),
    ("norm_eps", (1e-6,)),
    ("norm_type", ("ada_norm_single",)),
    ("num_vector_embeds", (None, False)),
    ("only_cross_attention", (False, None)),
    ("quantization_config", (None,)),
)
MOST = 2**31  # of any of these
POSITIVE = ("num_attention_heads", "attention_head_dim", "sample_size", "interpolation_scale")


@dataclass(frozen=True)
class Family:
    """``name`` is `ALPHA` or `SIGMA`; ``why`` says what told so, and is empty when nothing did."""

    name: str
    why: str


def parse_config(text: str, name: str) -> dict[str, Any]:
    """A diffusers config.json; MedSteerError naming ``name`` when it is none, or not that of a plain PixArt."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MedSteerError(f"'{name}' is no JSON ({error}); the config.json of a PixArt was expected.") from error
    if not isinstance(config, dict):
        raise MedSteerError(f"'{name}' holds a {type(config).__name__}; the config.json of a PixArt was expected.")
    if config.get("_class_name") not in CLASSES:
        raise MedSteerError(
            f"'{name}' is the config of a {shown(config.get('_class_name'))}; {CLASSES[0]} was expected. Keep each "
            "model's files in a folder of their own."
        )
    for key, allowed in FIXED:
        if key in config and not any(config[key] == value for value in allowed):
            found = shown(json.dumps(config[key]))
            raise MedSteerError(f"'{name}' has {key} {found}; {json.dumps(allowed[0])} was expected of a PixArt.")
    for key in POSITIVE:
        value = config.get(key)
        whole = isinstance(value, int) or (key == "interpolation_scale" and isinstance(value, float))
        if value is not None and (not whole or isinstance(value, bool) or not 0 < value < MOST):
            raise MedSteerError(f"'{name}' has {key} {shown(json.dumps(value))}; a positive number was expected.")
    return config


def check_config(config: Mapping[str, Any], sizes: Sizes, config_name: str, name: str) -> None:
    """MedSteerError unless ``config`` and the weights of ``name`` agree on every size that both give."""
    heads, channels = config.get("num_attention_heads"), config.get("attention_head_dim")
    claims = {
        "num_layers": sizes.depth,
        "in_channels": sizes.in_channels,
        "out_channels": sizes.out_channels,
        "caption_channels": sizes.caption_channels,
        "cross_attention_dim": sizes.width,
        "patch_size": sizes.patch_size,
        "use_additional_conditions": sizes.micro_conditioning,
    }
    said = {key: config[key] for key in claims if config.get(key) is not None}
    if heads and channels:
        said["num_attention_heads x attention_head_dim"] = heads * channels
        claims["num_attention_heads x attention_head_dim"] = sizes.width
    for key, value in said.items():
        if value != claims[key]:
            raise MedSteerError(
                f"'{config_name}' has {key} {shown(json.dumps(value))}, but the weights of '{name}' have "
                f"{json.dumps(claims[key])}; the config.json that came with the file was expected beside it."
            )


def heads_of(sizes: Sizes, config: Mapping[str, Any] | None, name: str) -> int:
    """The number of attention heads, which shapes don't show."""
    config = config or {}
    channels = config.get("attention_head_dim") or (None if config.get("num_attention_heads") else HEAD_CHANNELS)
    heads = config.get("num_attention_heads") or sizes.width // channels
    if heads < 1 or sizes.width % heads or (channels and heads * channels != sizes.width):
        raise MedSteerError(
            f"'{name}' has width {sizes.width}, which is no multiple of PixArt's {HEAD_CHANNELS} channels a head, and "
            "heads can't be read from weights: put the config.json that came with the model (num_attention_heads, "
            "sample_size) beside the file."
        )
    return heads


def extent_of_config(config: Mapping[str, Any], sizes: Sizes) -> float | None:
    """How far the position grid reaches, in patches, as diffusers computes it; None where config.json doesn't say."""
    side = config.get("sample_size")
    if side is None:
        return None
    scale = config.get("interpolation_scale")
    return (side // sizes.patch_size) / (max(side // 64, 1) if scale is None else scale)


def extent_of_positions(positions: Tensor, width: int, name: str) -> float | None:
    """How far a stored position grid ``(1, side^2, width)`` reaches; None for one that was never filled.

    The fastest wave of the columns has frequency 1 a patch: its phase along the first row is the position itself.
    Raises MedSteerError for positions that are no grid of sines and cosines, which ComfyUI's PixArt can't have.
    """
    fits = 0 < positions.ndim < 5 and positions.numel() > 0 and bool(positions.float().isfinite().all())
    table = (positions.reshape(-1, positions.shape[-1]) if fits else torch.zeros(0, 0)).double()
    side = math.isqrt(len(table))
    if side**2 == len(table) and table.shape[1] == width and (side == 1 or not table.any()):
        return None
    if side**2 == len(table) and table.shape[1] == width:
        phase = torch.atan2(table[:side, 0], table[:side, width // 4])
        # The step between neighbours is rough in half precision; the last column's phase, unwrapped by it, is not.
        rough = float(phase[1]) * (side - 1)
        turns = round((rough - float(phase[-1])) / math.tau)
        step = (float(phase[-1]) + math.tau * turns) / (side - 1)
        if step > 0 and (table - sine_grid(side, step, width)).abs().max() < 0.05:
            # Published grids are whole; what is left is the rounding of a half-precision file.
            return float(round(step * side)) if abs(step * side - round(step * side)) < 0.01 else step * side
    raise MedSteerError(
        f"'{name}' has a position grid of shape {tuple(positions.shape)} that is not PixArt's, of sines and cosines "
        f"over a square. {ADVICE}"
    )


def sine_grid(side: int, step: float, width: int) -> Tensor:
    """PixArt's positions of a square of patches ``step`` apart: ``(side^2, width)``, columns first, then rows."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * step * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)], dim=1)


def family_of(sizes: Sizes, config: Mapping[str, Any] | None, name: str) -> Family:
    """Alpha or Sigma, which differ in the VAE's latent scale; Sigma, as ComfyUI has it, when nothing tells them apart.

    Facts come first, names last: ``_name_or_path`` of config.json and the file's own name.
    """
    config = config or {}
    if sizes.micro_conditioning:
        return Family(ALPHA, "it has micro-conditioning")
    for tokens in (sizes.tokens, config.get("model_max_length")):
        if tokens in FAMILY_OF_TOKENS:
            return Family(FAMILY_OF_TOKENS[tokens], f"its prompts have {tokens} tokens")
    if (config.get("sample_size") or 0) >= 128:
        return Family(SIGMA, "it is for 1024 pixels and has no micro-conditioning")
    for text in (config.get("_name_or_path"), name):
        # Sigma's repositories also stand under "PixArt-alpha/", so its own name is looked for first.
        plain = str(text or "").lower().replace("_", "-")
        if "sigma" in plain:
            return Family(SIGMA, f"by the name '{shown(text)}'")
        if "pixart-xl-2" in plain or "pixart-alpha" in plain:
            return Family(ALPHA, f"by the name '{shown(text)}'")
    return Family(SIGMA, "")
