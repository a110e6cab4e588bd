"""PixArt's weights as files hold them: which format, under which prefix, of which sizes, with which names and shapes.

Two formats are in use: the original one of PixArt's authors, which ComfyUI runs, and that of diffusers, where the parts
have other names and the attentions' fused projections (query, key, value) are apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import MedSteerError
from ..files.inside import shown

ORIGINAL, DIFFUSERS = "original", "diffusers"
# Weights that every PixArt has and that, together, no other family has.
MARKS = {
    ORIGINAL: ("t_block.1.weight", "x_embedder.proj.weight", "y_embedder.y_proj.fc1.weight"),
    DIFFUSERS: ("adaln_single.linear.weight", "pos_embed.proj.weight", "transformer_blocks.0.attn2.to_q.weight"),
}
USUAL_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "", "transformer.", "model.", "net.", "module.")
BLOCKS = {ORIGINAL: "blocks", DIFFUSERS: "transformer_blocks"}
PROMPT = {ORIGINAL: "y_embedder.y_embedding", DIFFUSERS: "caption_projection.y_embedding"}
POSITIONS = {ORIGINAL: "pos_embed", DIFFUSERS: "pos_embed.pos_embed"}
QUANTISED = re.compile(r"(.*\.)?(scaled_fp8|scale_weight|weight_scale(_2)?|comfy_quant)")
FREQUENCIES = 256  # of the sine embedding of timesteps and sizes


@dataclass(frozen=True)
class Sizes:
    """What the shapes of a PixArt's weights say. ``tokens`` is the length of the stored prompt, where there is one."""

    format: str
    width: int
    depth: int
    in_channels: int
    out_channels: int
    caption_channels: int
    patch_size: int
    micro_conditioning: bool
    tokens: int | None = None

    @property
    def predicts_sigma(self) -> bool:
        return self.out_channels == 2 * self.in_channels


@dataclass(frozen=True)
class Weight:
    """One weight under its original name, and the names in the file whose rows, one after the other, make it up."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def source_shape(self) -> tuple[int, ...]:
        return (self.shape[0] // len(self.sources), *self.shape[1:])


def find_pixart(keys: Iterable[str]) -> tuple[str, str] | None:
    """``(format, prefix)`` of the PixArt among the names of a file's weights; None when there is none."""
    keys = {key for key in keys if isinstance(key, str)}
    for form, marks in MARKS.items():
        prefixes = [p for p in prefixes_of(keys, marks[0]) if all(p + mark in keys for mark in marks)]
        if prefixes:
            return form, prefixes[0]
    return None


def prefixes_of(keys: Iterable[str], mark: str) -> list[str]:
    """What stands before ``mark`` in the names that end with it, the usual prefixes first."""
    found = {key[: -len(mark)] for key in keys if key == mark or key.endswith(f".{mark}")}
    usual = [prefix for prefix in USUAL_PREFIXES if prefix in found]
    return usual + sorted(found - set(usual), key=len)


def only_pixart(state: Mapping[str, Any], form: str, prefix: str) -> dict[str, Any]:
    """The weights of one PixArt without its prefix: those of a VAE, a text encoder or a second copy stay out."""
    others = tuple(p for p in prefixes_of(state, MARKS[form][0]) if p.startswith(prefix) and p != prefix)
    return {
        key[len(prefix) :]: value
        for key, value in state.items()
        if key.startswith(prefix) and not (others and key.startswith(others))
    }


def is_quantised(keys: Iterable[str], prefix: str, metadata: Mapping[str, str] | None) -> bool:
    """Whether the weights under ``prefix`` come with scales, so that they are no plain numbers."""
    if "_quantization_metadata" in (metadata or {}):
        return True
    return any(key.startswith(prefix) and QUANTISED.fullmatch(key) for key in keys)


def sizes_of(state: Mapping[str, Any], form: str, name: str) -> Sizes:
    """The sizes of the PixArt in ``state`` (without prefix); MedSteerError when its weights can't be a PixArt's."""
    for key, value in state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise MedSteerError(
                f"'{name}' holds {kind} in '{shown(key)}'; floating-point weights were expected. {ADVICE}"
            )
    names = {weight.name: weight.sources for weight in layout(_PROBE[form])}

    def shape(weight: str, dimensions: int) -> tuple[int, ...]:
        (source,) = names[weight]
        found = tuple(state[source].shape) if source in state else None
        if found is None or len(found) != dimensions or 0 in found:
            what = "is missing" if found is None else f"is {found}"
            raise MedSteerError(f"In '{name}' '{source}' {what}; {dimensions} dimensions were expected. {ADVICE}")
        return found

    width, in_channels, patch, _ = shape("x_embedder.proj.weight", 4)
    _, caption = shape("y_embedder.y_proj.fc1.weight", 2)
    rows, _ = shape("final_layer.linear.weight", 2)
    out_channels = rows // patch**2
    if out_channels not in (in_channels, 2 * in_channels) or rows % patch**2:
        raise MedSteerError(
            f"'{name}' predicts {rows / patch**2:g} channels from {in_channels}; as many or, with the noise's "
            "variance, twice as many were expected of a PixArt."
        )
    micro = any(key.startswith(("csize_embedder.", "adaln_single.emb.resolution_embedder.")) for key in state)
    # Sines and cosines of rows and of columns share the width; micro-conditioning puts three parts beside each other.
    if width % 4 or (micro and width % 3):
        raise MedSteerError(f"'{name}' has width {width}; a multiple of {12 if micro else 4} was expected of a PixArt.")
    prompt = state.get(PROMPT[form])
    tokens = prompt.shape[0] if prompt is not None and prompt.ndim == 2 else None
    return Sizes(form, width, _depth(state, form, name), in_channels, out_channels, caption, patch, micro, tokens)


def _depth(state: Mapping[str, Any], form: str, name: str) -> int:
    numbers = {m[1] for key in state if (m := re.match(rf"{BLOCKS[form]}\.(\d{{1,9}})\.", key))}
    missing = next((number for number in map(str, range(len(numbers))) if number not in numbers), None)
    if missing is not None:
        raise MedSteerError(
            f"'{name}' has {len(numbers)} blocks and no block {missing} among them; blocks from 0 on without a gap "
            f"were expected. {ADVICE}"
        )
    return len(numbers)


def to_original(state: dict[str, Tensor], sizes: Sizes, name: str) -> dict[str, Tensor]:
    """The weights under their original names. ``state`` is emptied on the way, so that no weight is held twice.

    Raises MedSteerError when a weight is missing, has another shape, or is none of a PixArt's. The position grid is
    left out, since it is computed; a stored prompt, which only training uses, may be missing and is then zeros of the
    length ``sizes.tokens``.
    """
    weights = layout(sizes)
    _refuse_misfits(state, weights, sizes, name)
    prompt = state.get(PROMPT[sizes.format])
    result = {}
    for weight in weights:
        parts = [state.pop(source) for source in weight.sources]
        result[weight.name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    shape = (sizes.tokens or 0, sizes.caption_channels)
    result[PROMPT[ORIGINAL]] = torch.zeros(shape, dtype=parts[0].dtype) if prompt is None else prompt
    state.clear()
    return result


def _refuse_misfits(state: Mapping[str, Tensor], weights: list[Weight], sizes: Sizes, name: str) -> None:
    kind = f"a PixArt of {sizes.depth} blocks and width {sizes.width} in {sizes.format} format"
    expected = {source: weight.source_shape for weight in weights for source in weight.sources}
    prompt = PROMPT[sizes.format]
    optional = {prompt, POSITIONS[sizes.format]}
    missing = sorted(expected.keys() - state.keys())
    if missing:
        raise MedSteerError(f"'{name}' lacks {_some(missing)} of {kind}. {ADVICE}")
    unknown = sorted(state.keys() - expected.keys() - optional)
    if unknown:
        raise MedSteerError(
            f"'{name}' has {_some(unknown)}, which {kind} has not. Only plain PixArt (alpha, Sigma) can be loaded: no "
            "key-value compression, no ControlNet, no unmerged LoRA."
        )
    if prompt in state:
        expected[prompt] = (sizes.tokens or 0, sizes.caption_channels)
    for key, shape in expected.items():
        if tuple(state[key].shape) != shape:
            raise MedSteerError(
                f"In '{name}' '{key}' is {tuple(state[key].shape)}; {shape} was expected of {kind}. {ADVICE}"
            )


def _some(keys: list[str]) -> str:
    return f"'{shown(keys[0])}'" + (f" and {len(keys) - 1} more weights" if len(keys) > 1 else "")


ADVICE = "Download the file again, or choose another."


def layout(sizes: Sizes) -> list[Weight]:
    """Every weight of a PixArt of these sizes."""
    return list(_original_names(sizes) if sizes.format == ORIGINAL else _weights(sizes))


def _original_names(sizes: Sizes) -> Iterator[Weight]:
    for weight in _weights(sizes):
        yield Weight(weight.name, (weight.name,), weight.shape)


def _weights(sizes: Sizes) -> Iterator[Weight]:
    """The weights with the names that diffusers gives them."""
    w, patch = sizes.width, sizes.patch_size
    embeddings = [("t_embedder", "timestep_embedder", w)]
    if sizes.micro_conditioning:
        embeddings += [("csize_embedder", "resolution_embedder", w // 3)]
        embeddings += [("ar_embedder", "aspect_ratio_embedder", w // 3)]
    yield from _linear("x_embedder.proj", ("pos_embed.proj",), (w, sizes.in_channels, patch, patch))
    for name, source, size in embeddings:
        yield from _linear(f"{name}.mlp.0", (f"adaln_single.emb.{source}.linear_1",), (size, FREQUENCIES))
        yield from _linear(f"{name}.mlp.2", (f"adaln_single.emb.{source}.linear_2",), (size, size))
    yield from _linear("t_block.1", ("adaln_single.linear",), (6 * w, w))
    yield from _linear("y_embedder.y_proj.fc1", ("caption_projection.linear_1",), (w, sizes.caption_channels))
    yield from _linear("y_embedder.y_proj.fc2", ("caption_projection.linear_2",), (w, w))
    for number in range(sizes.depth):
        yield from _block(f"blocks.{number}.", f"transformer_blocks.{number}.", w)
    yield from _linear("final_layer.linear", ("proj_out",), (patch**2 * sizes.out_channels, w))
    yield Weight("final_layer.scale_shift_table", ("scale_shift_table",), (2, w))


def _block(to: str, source: str, w: int) -> Iterator[Weight]:
    yield Weight(f"{to}scale_shift_table", (f"{source}scale_shift_table",), (6, w))
    for name, sources, shape in (
        ("attn.qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v"), (3 * w, w)),
        ("attn.proj", ("attn1.to_out.0",), (w, w)),
        ("cross_attn.q_linear", ("attn2.to_q",), (w, w)),
        ("cross_attn.kv_linear", ("attn2.to_k", "attn2.to_v"), (2 * w, w)),
        ("cross_attn.proj", ("attn2.to_out.0",), (w, w)),
        ("mlp.fc1", ("ff.net.0.proj",), (4 * w, w)),
        ("mlp.fc2", ("ff.net.2",), (w, 4 * w)),
    ):
        yield from _linear(to + name, tuple(source + part for part in sources), shape)


def _linear(name: str, sources: tuple[str, ...], shape: tuple[int, ...]) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", tuple(f"{source}.weight" for source in sources), shape)
    yield Weight(f"{name}.bias", tuple(f"{source}.bias" for source in sources), shape[:1])


# For the names of weights, which do not depend on sizes.
_PROBE = {form: Sizes(form, 12, 1, 4, 4, 4, 2, False) for form in (ORIGINAL, DIFFUSERS)}
