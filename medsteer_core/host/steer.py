"""From the Steer node's inputs to a steered model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from comfy.model_patcher import ModelPatcher

from ..operators import make_operator
from ..pathology_vector import PathologyVector
from ..selection import select_sites
from ..steering import Steering
from .extraction import differs
from .patch import steered
from .sampling import window


def steer(
    model: ModelPatcher,
    vector: PathologyVector,
    operator: str,
    parameters: Mapping[str, Any],
    start_percent: float,
    end_percent: float,
    sites: str,
    rows: str,
) -> tuple[ModelPatcher, str]:
    """A steered clone of ``model`` and one line on what was set, warnings included."""
    chosen = select_sites(sites, vector.site_names)
    steering = Steering(
        vector,
        make_operator(operator, **parameters),
        window(model, start_percent, end_percent),
        chosen,
        rows.strip(),
    )
    result = steered(model, steering)
    note = f"{operator} at {len(chosen)} of {len(vector.site_names)} sites, rows {steering.rows}"
    if steering.operator.is_identity:
        note += "; strength 0 changes nothing"
    warning = differs(vector, model)
    if warning:
        note += f"\nWarning: {warning}; the finding may not follow."
        logging.warning("MedSteer: %s.", warning)
    return result, note
