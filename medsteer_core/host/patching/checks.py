"""What a steering must fit: a model's sites, a schedule and its conditionings, a call's rows. Errors over silence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...errors import MedSteerError
from ...steering.plan import Steering, SteeringPlan
from ...steering.prepared import PreparedPlan
from ...steering.rows import ALL_ROWS
from ...vectors.pathology_vector import PathologyVector
from .run_state import Run
from .sites import find_sites, output_width


def check_fits(model: ModelPatcher, steering: Steering) -> None:
    """Refuse a steering whose vectors' sites or widths are not the model's, naming the first that differs."""
    sites = find_sites(model.model.diffusion_model)
    for vector in (steering.vector, *([] if steering.target is None else [steering.target])):
        _check_vector(sites, vector, steering.sites)


def _check_vector(sites: dict[str, nn.Module], vector: PathologyVector, chosen: Sequence[str]) -> None:
    known = {*vector.site_names, *vector.provenance.get("dropped_sites", ())}
    strange = [name for name in known if name not in sites] or [name for name in sites if name not in known]
    if strange:
        raise MedSteerError(
            f"This vector was made for another model: it has {len(known)} sites and the model has {len(sites)}, "
            f"{_span(sites)}; '{sorted(strange)[0]}' is in only one of them. Extract a vector from this model."
        )
    for name in chosen:
        width = output_width(sites[name])
        if width is not None and width != vector.channels(name):
            raise MedSteerError(
                f"This vector was made for another model: site '{name}' has {vector.channels(name)} channels in the "
                f"vector and {width} in the model. Extract a vector from this model."
            )


def _span(sites: dict[str, nn.Module]) -> str:
    names = list(sites)
    return f"'{names[0]}' to '{names[-1]}'"


def check_reachable(plan: SteeringPlan, sigmas: Tensor, conds: Mapping[str, Any]) -> None:
    """Refuse, before a step is taken, a steering that no step or no conditioning can reach."""
    levels = [float(sigma) for sigma in sigmas[:-1] if float(sigma) > 0]
    for steering in plan.steerings:
        if steering.operator.is_identity:
            continue
        if levels and not steering.window.any_of(levels):
            raise MedSteerError(
                f"No step of this schedule falls into the steering window (sigma {steering.window.start_sigma:.4g} to "
                f"{steering.window.end_sigma:.4g}; the {len(levels)} steps run from {levels[0]:.4g} to "
                f"{levels[-1]:.4g}). Widen start_percent and end_percent of Steer, or use more steps."
            )
    check_conds(plan, conds)


def check_conds(plan: SteeringPlan, conds: Mapping[str, Any]) -> None:
    """Refuse rows that this sampler's conditionings lack."""
    for steering in plan.steerings:
        if steering.rows != ALL_ROWS and steering.rows not in conds and not steering.operator.is_identity:
            raise MedSteerError(
                f"Steer asks for rows '{steering.rows}', but this sampler's conditionings are "
                f"{', '.join(sorted(conds))}. Write one of these names, or 'all'."
            )


def check_touched(run: Run) -> None:
    """Refuse silent success: a steering that changed nothing."""
    for steering in run.prepared.untouched():
        raise MedSteerError(
            f"Steering ({steering.operator.name}, rows '{steering.rows}') changed nothing in this run. Rows that are "
            "never evaluated (the negative ones at cfg 1), a compiled model or a cache that skips every step cause "
            "this. Use rows 'all', or remove the other patch."
        )


def check_rows(name: str, output: Tensor, rows: int) -> None:
    """Refuse an output in which the rows of a conditioning could not be found."""
    if output.ndim != 3 or output.shape[0] != rows:
        raise MedSteerError(
            f"Site '{name}' gave an activation of shape {tuple(output.shape)} in a model call of {rows} rows; "
            f"({rows}, tokens, channels) was expected. Remove patches that change the batch inside the model."
        )


def check_known_rows(plans: Sequence[PreparedPlan], is_watched: bool, rows: int, images: int | None) -> None:
    """Refuse to choose among rows that another node rearranged so that nothing tells whose they are."""
    chosen = [s.rows for plan in plans for s in plan.plan.steerings if s.rows != ALL_ROWS]
    if is_watched:
        raise split_capture(rows, images)
    if chosen:
        raise MedSteerError(
            f"Another node on the model (one that tiles, say) calls it with {rows} rows for {images} images and does "
            f"not tell which are the prompt's, so that rows '{chosen[0]}' can't be found. Set rows of Steer to 'all', "
            "or remove that node."
        )


def split_capture(rows: int, images: int | None) -> MedSteerError:
    """For a capture that would see parts of images."""
    return MedSteerError(
        f"Another node on the model (one that tiles, say) calls it with {rows} rows for {images} images, so that "
        "extraction would see parts of images. Extract from the model without that node, and steer with it."
    )


def check_masks(plan: PreparedPlan, images: int, is_part: bool) -> None:
    """Refuse masks on Steer that don't fit a call of ``images``, or that sees an area of the image (``is_part``)."""
    for mask in (steering.mask for steering in plan.plan.steerings if steering.mask is not None):
        if images % len(mask):
            raise MedSteerError(
                f"Steer has {len(mask)} masks, and this run makes {images} images. Give it 1 or {images}."
            )
        if is_part:
            raise MedSteerError(
                "A mask on Steer covers the whole image, and the model is called here for an area of it: by a "
                "conditioning with an area (give that a mask instead, with set_cond_area 'default'), or by a node that "
                "tiles. Remove that, or the mask from Steer."
            )
