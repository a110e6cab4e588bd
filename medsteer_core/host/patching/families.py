"""The model families whose text cross-attention can be steered: one row each, told by structure, not by class name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .pixart_tokens import pixart_tokens
from .tokens import TokenModel

Modules = Mapping[str, nn.Module]


def _everywhere(_modules: Modules, _name: str) -> bool:
    return True


def _by_number(names: Sequence[str]) -> list[str]:
    """Block 10 comes after block 9."""

    def key(name: str) -> list[Any]:
        return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]

    return sorted(names, key=key)


def _wan_order(names: Sequence[str]) -> list[str]:
    """Main block i, and right after it the VACE block (if any) whose output is added there: they are spread evenly."""
    main = sum(name.startswith("blocks.") for name in names)
    apart = main // max(1, len(names) - main)

    def key(name: str) -> tuple[int, bool]:
        stack, index, *_ = name.split(".")
        return (int(index), False) if stack == "blocks" else (int(index) * apart, True)

    return sorted(names, key=key)


def _is_cosmos_cross(modules: Modules, name: str) -> bool:
    """Cosmos builds self- and cross-attention of one class; its block says which of the two it is."""
    return modules[name.removesuffix(".block.attn.to_out")].block_type in ("ca", "cross_attn")


def _all_computed(_network: nn.Module) -> None:
    return None


@dataclass(frozen=True)
class Family:
    """``site`` matches the module names of the sites whole, so that adapters inside or beside them are none.

    Every module in ``marks`` must exist, and none whose name ``without`` matches. ``is_site`` sorts out modules that
    only look like sites; ``order`` puts names in the order of execution. A site gives ``(rows, tokens, channels)``,
    with ``tokens_first`` ``(tokens, rows, channels)``. A row is an image or a video; a video's tokens are those of all
    its frames, and those of reference images where a model appends them. ``tokens`` says how some of an image's tokens
    can be computed without the others; None where they can't.
    """

    name: str
    site: str
    marks: tuple[str, ...]
    without: str = ""
    tokens_first: bool = False
    is_site: Callable[[Modules, str], bool] = _everywhere
    tokens: Callable[[nn.Module], TokenModel | None] = _all_computed
    order: Callable[[Sequence[str]], list[str]] = _by_number

    def sites(self, modules: Modules) -> list[str]:
        """The names of this family's sites among ``modules``, in execution order; [] for a model of another family."""
        if not all(mark in modules for mark in self.marks):
            return []
        if self.without and any(re.fullmatch(self.without, name) for name in modules):
            return []
        return self.order([name for name in modules if re.fullmatch(self.site, name) and self.is_site(modules, name)])


FAMILIES: tuple[Family, ...] = (
    Family(
        "PixArt (alpha, Sigma)",
        r"blocks\.\d+\.cross_attn\.proj",
        ("blocks.0.cross_attn.kv_linear", "y_embedder.y_proj"),
        tokens=pixart_tokens,
    ),
    # Hunyuan3D 2.1 has blocks of the same names, which attend to a picture.
    Family("HunyuanDiT", r"blocks\.\d+\.attn2\.out_proj", ("blocks.0.attn2.kv_proj", "mlp_t5")),
    # The image-to-video models of Wan 2.1 attend to text and to a CLIP image in one module: `o` gets the sum of both.
    Family(
        "Wan 2.x (text and image to video, VACE)",
        r"(vace_)?blocks\.\d+\.cross_attn\.o",
        ("blocks.0.cross_attn.k", "patch_embedding", "text_embedding"),
        order=_wan_order,
    ),
    # LTX-2's audio stream (audio_attn2) and the attention between its two streams are left out.
    Family("LTX-Video", r"transformer_blocks\.\d+\.attn2\.to_out", ("patchify_proj", "adaln_single")),
    Family(
        "Cosmos 1",
        r"blocks\.block\d+\.blocks\.\d+\.block\.attn\.to_out",
        ("x_embedder", "blocks.block0.blocks.0.block"),
        tokens_first=True,
        is_site=_is_cosmos_cross,
    ),
    # Anima's llm_adapter, which rewrites the text, has cross-attentions of its own.
    Family("Cosmos Predict2, Anima", r"blocks\.\d+\.cross_attn\.output_proj", ("x_embedder.proj", "t_embedding_norm")),
    Family(
        "Kandinsky 5",
        r"visual_transformer_blocks\.\d+\.cross_attention\.out_layer",
        ("text_embeddings", "visual_embeddings"),
    ),
    # Stable Video Diffusion, the one with a time_stack, attends to a picture and reads no text.
    Family(
        "Stable Diffusion 1.x, 2.x and XL",
        r"((input|output)_blocks\.\d+\.\d+|middle_block\.\d+)\.transformer_blocks\.\d+\.attn2\.to_out",
        ("time_embed", "input_blocks.0.0"),
        without=r".*\.time_stack",
    ),
)
