"""Where a model's text cross-attention is.

A site is the output-projection submodule of one cross-attention: its output is METHOD's intervention point, the
attention's output after the projection and before the residual add (a gate, where a family has one, comes after it).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.module import _global_forward_hooks

from ...errors import MedSteerError
from .families import FAMILIES, Family
from .tokens import TokenModel


@dataclass(frozen=True, eq=False)
class Found:
    """A model's family and its sites by name, in execution order; of each its `fresh_layers`."""

    family: Family
    sites: dict[str, nn.Module]
    fresh: dict[str, tuple[nn.Module, ...]]


def find(diffusion_model: nn.Module) -> Found:
    """The family and the sites of a diffusion model.

    Raises MedSteerError for a model of no known family, naming the model and the families that work.
    """
    modules = {_plain(name): module for name, module in diffusion_model.named_modules()}
    for family in FAMILIES:
        if names := family.sites(modules):
            sites = {name: modules[name] for name in names}
            return Found(family, sites, {name: fresh_layers(site) for name, site in sites.items()})
    raise MedSteerError(
        f"{type(diffusion_model).__name__} is not a model that MedSteer can steer: it has no text cross-attention of a "
        "known image or video family (models with joint attention, as Flux and SD3 are, have none; audio models are "
        f"not supported). Load one of: {'; '.join(family.name for family in FAMILIES)}."
    )


def find_sites(diffusion_model: nn.Module) -> dict[str, nn.Module]:
    """The sites of a diffusion model by name, in execution order; raises as `find` does."""
    return find(diffusion_model).sites


def fresh_layers(site: nn.Module) -> tuple[nn.Module, ...]:
    """The layers of a site whose output is a tensor of its own, unless somebody changed them; () for any other site.

    So it is with a plain linear layer of torch or ComfyUI, and with dropout after it, which hands that on.
    """
    layers = (site, *site) if type(site) is nn.Sequential else (site,)
    linear = [layer for layer in layers if layer is not site or len(layers) == 1]
    if not linear or not all(type(layer) in (nn.Dropout, nn.Identity) for layer in linear[1:]):
        return ()
    known = type(linear[0]).__module__ in ("torch.nn.modules.linear", "comfy.ops")
    return layers if known and isinstance(linear[0], nn.Linear) else ()


def owns_its_output(fresh: tuple[nn.Module, ...]) -> bool:
    """Whether nobody else holds what a site of these `fresh_layers` gives now, so that steering may write into it.

    Not where a layer's way was changed (`forward` set on it, as some LoRAs do) or another hook sees what it gives.
    """
    return (
        bool(fresh)
        and not _global_forward_hooks
        and not any(layer._forward_hooks or "forward" in layer.__dict__ for layer in fresh)
    )


def family_name(diffusion_model: nn.Module) -> str:
    """The family that `find` takes the model for; raises as it does."""
    return find(diffusion_model).family.name


def token_model(diffusion_model: nn.Module) -> TokenModel | None:
    """How some of a model's image tokens can be computed without the others; None where they can't."""
    try:
        return find(diffusion_model).family.tokens(diffusion_model)
    except MedSteerError:  # of no family that can be steered; another prompt can do without
        return None


def output_width(site: nn.Module) -> int | None:
    """Channels that a site's module gives, or the last layer in it; None where no class says."""
    widths = [width for module in site.modules() if (width := getattr(module, "out_features", None)) is not None]
    return widths[-1] if widths else None


def _plain(name: str) -> str:
    """A module's name without the prefix that torch.compile puts in."""
    return name.replace("_orig_mod.", "")
