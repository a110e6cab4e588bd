"""Where a model's text cross-attention is. A model family is one row of `FAMILIES`.

A site is the output-projection submodule of one cross-attention: its output is METHOD's intervention point, the
attention's output after the projection and before the residual add.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from ..errors import MedSteerError


@dataclass(frozen=True)
class Family:
    """``site`` matches the module names of the sites whole; every name in ``marks`` must exist in the model too."""

    name: str
    site: str
    marks: tuple[str, ...] = ()


FAMILIES: tuple[Family, ...] = (
    Family(
        "PixArt (alpha, Sigma)",
        r"blocks\.\d+\.cross_attn\.proj",
        ("blocks.0.cross_attn.kv_linear", "y_embedder.y_proj"),
    ),
)


def find_sites(diffusion_model: nn.Module) -> dict[str, nn.Module]:
    """The sites of a diffusion model by name, in execution order.

    Raises MedSteerError for a model of no known family, naming the model and the families that work.
    """
    modules = {_plain(name): module for name, module in diffusion_model.named_modules()}
    for family in FAMILIES:
        if all(mark in modules for mark in family.marks):
            names = [name for name in modules if re.fullmatch(family.site, name)]
            if names:
                return {name: modules[name] for name in sorted(names, key=_natural)}
    families = ", ".join(family.name for family in FAMILIES)
    raise MedSteerError(
        f"{type(diffusion_model).__name__} is not a model that MedSteer can steer: it has no text cross-attention of a "
        f"known family. Load one of: {families}."
    )


def family_name(diffusion_model: nn.Module) -> str:
    """The family that `find_sites` takes the model for; raises as it does."""
    first = next(iter(find_sites(diffusion_model)))
    return next(family.name for family in FAMILIES if re.fullmatch(family.site, first))


def _plain(name: str) -> str:
    """A module's name without the prefix that torch.compile puts in."""
    return name.replace("_orig_mod.", "")


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key in which block 10 comes after block 9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
