"""From the Steer node's inputs to a steered model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...errors import MedSteerError
from ...extraction.sample_report import AUROC, recorded
from ...extraction.separability import AUTO_THRESHOLD
from ...steering.operators import make_operator
from ...steering.plan import Steering
from ...steering.presets import CUSTOM, find_preset, scaled_sites
from ...steering.recipes import STEER_RECIPES, apart
from ...steering.selection import has_auto, select_sites
from ...vectors.pathology_vector import PathologyVector
from ...vectors.schedule import CONSTANT
from .fingerprint import differs
from .levels import curve as curve_over
from .levels import window
from .patch import steered
from .sites import find_sites


def steer(
    model: ModelPatcher,
    vector: PathologyVector,
    operator: str,
    parameters: Mapping[str, Any],
    start_percent: float,
    end_percent: float,
    sites: str,
    rows: str,
    preset: str = CUSTOM,
    curve: str = CONSTANT,
    target: PathologyVector | None = None,
    mask: Tensor | None = None,
    recipe: str = CUSTOM,
) -> tuple[ModelPatcher, str]:
    """A steered clone of ``model`` and one line on what was set, warnings included.

    A ``preset`` other than "custom" takes the place of operator, parameters, sites and rows; the rest stays. ``target``
    is the second vector of the operator switch; ``mask`` (1 or images, H, W) in 0..1 confines the steering.
    ``recipe``: of which one the rest is said to be; where it is not, the note warns.
    """
    note = ""
    if preset == CUSTOM:
        chosen = select_sites(sites, vector.site_names, recorded(vector, AUROC))
    else:
        published = find_preset(preset)
        operator, parameters, rows = published.operator, published.parameters, published.rows
        chosen = _sites_of(preset, published.sites, model, vector)
        note = f"{preset} in place of operator, sites and rows: {published.describe()}\n"
    acting = make_operator(operator, **parameters)
    steering = Steering(
        vector,
        acting,
        window(model, start_percent, end_percent),
        chosen,
        rows.strip(),
        target if acting.needs_target else None,
        mask[None] if mask is not None and mask.ndim == 2 else mask,
        curve_over(model, curve, start_percent, end_percent),
        recipe,
        (start_percent, end_percent, curve),
    )
    result = steered(model, steering)
    if recipe != CUSTOM:
        note += f"recipe {recipe}: "
    note += f"{operator} at {len(chosen)} of {len(vector.site_names)} sites, rows {steering.rows}"
    if preset == CUSTOM and has_auto(sites):
        note += f"; auto took those with an AUROC of {AUTO_THRESHOLD:g} or more at unseen samples"
    if preset != CUSTOM and (start_percent, end_percent) != (0.0, 1.0):
        note += (
            f"\nNote: steers from {start_percent:g} to {end_percent:g} of the denoising; the published method steers "
            "all of it (0 to 1)."
        )
    if curve != CONSTANT:
        note += f", strength curve {curve}"
    if mask is not None:
        note += f", masked ({float(mask.float().mean()):.0%} of the image)"
    if target is not None and not acting.needs_target:
        note += f"\nWarning: a target is connected, which {operator} does not use."
    if steering.operator.is_identity:
        note += "; strength 0 changes nothing"
    given = {f"operator.{key}": value for key, value in parameters.items()}
    given |= {"operator": operator, "start_percent": start_percent, "end_percent": end_percent, "rows": rows,
              "preset": preset, "curve": curve}  # fmt: skip
    if warning := apart(recipe, given, STEER_RECIPES):
        note += f"\n{warning}"
    warning = differs(vector, model)
    if warning:
        note += f"\nWarning: {warning}; the finding may not follow."
        logging.warning("MedSteer: %s.", warning)
    return result, note


def _sites_of(preset: str, sites: str, model: ModelPatcher, vector: PathologyVector) -> tuple[str, ...]:
    """The vector's sites among the model's blocks that a preset names, scaled to the model's depth.

    Blocks are counted in the model: a vector may lack some.
    """
    names = list(find_sites(model.model.diffusion_model))
    wanted = select_sites(scaled_sites(sites, len(names)), names)
    chosen = tuple(name for name in vector.site_names if name in wanted)
    if not chosen:
        raise MedSteerError(
            f"The preset '{preset}' steers '{wanted[0]}' to '{wanted[-1]}' of this model, and the vector has none of "
            "these sites. Use a vector that holds them, or set preset to custom."
        )
    return chosen
