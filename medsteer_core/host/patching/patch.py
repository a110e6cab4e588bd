"""Steered and watched clones of a model: the plan travels in `transformer_options`, four wrappers (calls.py) act on it.

What a run needs to remember lives in a `Run` that the OUTER_SAMPLE wrapper puts into that run's own copy of them.
"""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...steering.plan import Steering, SteeringPlan
from .calls import apply_model, calc_cond_batch, outer_sample, predict_noise
from .checks import check_fits
from .run_state import OBSERVERS, PLAN, SHOWN, TOKENS, ChangeObserver, Observer, Shown
from .sites import find_sites
from .tokens import Keeping, Sparse

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


def with_plan(model: ModelPatcher, plan: SteeringPlan) -> ModelPatcher:
    """A clone of ``model`` that ``plan`` steers, in the place of the plan that it carries."""
    return _with(model, PLAN, plan)


def showing(model: ModelPatcher, changes: ChangeObserver) -> ModelPatcher:
    """A clone of ``model`` that nothing steers: ``changes`` is shown what its plan would change in positive rows."""
    return _with(with_plan(model, SteeringPlan()), SHOWN, Shown(plan_of(model), changes))


def for_tokens(model_options: dict[str, Any], request: Keeping | Sparse) -> dict[str, Any]:
    """Model options for one prediction whose calls keep their tokens, or compute some of them."""
    return {**model_options, "transformer_options": {**model_options["transformer_options"], TOKENS: request}}


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
