"""Steered and watched clones of a model: the plan travels in `transformer_options`, four wrappers (calls.py) act on it.

What a run needs to remember lives in a `Run` that the OUTER_SAMPLE wrapper puts into that run's own copy of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...steering.plan import Steering, SteeringPlan
from .calls import apply_model, calc_cond_batch, outer_sample, predict_noise
from .checks import check_fits
from .run_state import BLOCKS, BLOCKS_NOW, OBSERVERS, PLAN, Blocks, ChangeObserver, Observer
from .sites import find_sites

KEY = "medsteer"


def steered(model: ModelPatcher, steering: Steering) -> ModelPatcher:
    """A clone of ``model`` with ``steering`` after those it already has. The model itself is left as it was."""
    check_fits(model, steering)
    options = model.model_options.get("transformer_options", {})
    return _with(model, PLAN, options.get(PLAN, SteeringPlan()).then(steering))


def observed(model: ModelPatcher, observer: Observer, rows: str = "positive") -> ModelPatcher:
    """A clone of ``model`` that shows every site's output (after its steering, if any) to ``observer``.

    It sees the rows of the conditioning ``rows``; observers of other rows stay.
    """
    find_sites(model.model.diffusion_model)
    others = model.model_options.get("transformer_options", {}).get(OBSERVERS, {})
    return _with(model, OBSERVERS, {**others, rows: observer})


def with_blocks(
    model: ModelPatcher, plans: Sequence[SteeringPlan], changes: ChangeObserver | None = None
) -> ModelPatcher:
    """A clone of ``model`` for batches of ``len(plans)`` blocks of images, each steered by its own plan.

    ``changes`` is shown what the model's own plan would change in the first block's positive rows. Nothing else of the
    model's own plan acts in the clone. A call of fewer blocks says so through `in_blocks`.
    """
    return _with(model, BLOCKS, Blocks(tuple(plans), plan_of(model), changes))


def in_blocks(model_options: dict[str, Any], count: int) -> dict[str, Any]:
    """Model options for one prediction over the first ``count`` blocks."""
    return {**model_options, "transformer_options": {**model_options["transformer_options"], BLOCKS_NOW: count}}


def plan_of(model: ModelPatcher) -> SteeringPlan:
    """The steering plan that a model carries; an empty one for a model that is not steered."""
    return model.model_options.get("transformer_options", {}).get(PLAN, SteeringPlan())


def _with(model: ModelPatcher, key: str, value: object) -> ModelPatcher:
    clone = model.clone()
    clone.model_options.setdefault("transformer_options", {})[key] = value
    wrappers = (
        (WrappersMP.OUTER_SAMPLE, outer_sample),
        (WrappersMP.PREDICT_NOISE, predict_noise),
        (WrappersMP.CALC_COND_BATCH, calc_cond_batch),
        (WrappersMP.APPLY_MODEL, apply_model),
    )
    for kind, wrapper in wrappers:
        if not clone.get_wrappers(kind, KEY):
            clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


