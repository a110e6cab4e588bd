"""Where a model's text cross-attention is.

A site is the output-projection submodule of one cross-attention: its output is METHOD's intervention point, the
attention's output after the projection and before the residual add (a gate, where a family has one, comes after it).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..errors import MedSteerError
from .families import FAMILIES, Family


@dataclass(frozen=True, eq=False)
class Found:
    """A model's family and its sites by name, in execution order."""

    family: Family
    sites: dict[str, nn.Module]


def find(diffusion_model: nn.Module) -> Found:
    """The family and the sites of a diffusion model.

    Raises MedSteerError for a model of no known family, naming the model and the families that work.
    """
    modules = {_plain(name): module for name, module in diffusion_model.named_modules()}
    for family in FAMILIES:
        if names := family.sites(modules):
            return Found(family, {name: modules[name] for name in names})
    raise MedSteerError(
        f"{type(diffusion_model).__name__} is not a model that MedSteer can steer: it has no text cross-attention of a "
        "known image or video family (models with joint attention, as Flux and SD3 are, have none; audio models are "
        f"not supported). Load one of: {'; '.join(family.name for family in FAMILIES)}."
    )


def find_sites(diffusion_model: nn.Module) -> dict[str, nn.Module]:
    """The sites of a diffusion model by name, in execution order; raises as `find` does."""
    return find(diffusion_model).sites


def family_name(diffusion_model: nn.Module) -> str:
    """The family that `find` takes the model for; raises as it does."""
    return find(diffusion_model).family.name


def output_width(site: nn.Module) -> int | None:
    """Channels that a site's module gives, or the last layer in it; None where no class says."""
    widths = [width for module in site.modules() if (width := getattr(module, "out_features", None)) is not None]
    return widths[-1] if widths else None


def _plain(name: str) -> str:
    """A module's name without the prefix that torch.compile puts in."""
    return name.replace("_orig_mod.", "")
