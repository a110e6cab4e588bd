"""Our own settings by the kind of change, chosen on EndoPhantom's development seeds (docs/benchmarks.md).

A recipe is a set of input values of the nodes Steer and Counterfactual Sampler, by the inputs' names. Whoever chooses
one has them written into the inputs: the canvas into its widgets, the headless command into the workflow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..errors import MedSteerError
from .presets import CUSTOM

# How the sampler finds where the image may change.
OPEN, CONCEPT, PREDICTION, AUTOMATIC = "none", "concept map", "prediction difference", "automatic"


@dataclass(frozen=True)
class Recipe:
    """The inputs of ``steer``, by their names, and of the ``sampler``; all others are the user's own."""

    steer: Mapping[str, Any]
    sampler: Mapping[str, Any]


def _recipe(strength: float, focus: float, rows: str, start: float, lock: str) -> Recipe:
    steer = {
        "operator": "affine",
        "operator.strength": strength,
        "operator.focus": focus,
        "operator.keep_norm": False,
        "start_percent": start,
        "end_percent": 1.0,
        "rows": rows,
        "preset": CUSTOM,
        "curve": "constant",
    }
    sampler = {
        "lock": lock,
        "lock_threshold": 0.2,
        "lock_dilation": 1,
        "lock_smoothing": 0,
        "counterfactual_start": start,
    }
    return Recipe(MappingProxyType(steer), MappingProxyType(sampler))


def _of_image(recipe: Recipe, start: float, cfg: float) -> Mapping[str, Any]:
    return MappingProxyType({**recipe.sampler, "lock_threshold": 0.0, "counterfactual_start": start, "cfg": cfg})


REMOVE_FOCAL, REMOVE_DIFFUSE, ADD = "remove focal", "remove diffuse", "add"
RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        REMOVE_FOCAL: _recipe(2.0, 1.0, "all", 0.45, AUTOMATIC),
        REMOVE_DIFFUSE: _recipe(1.5, 1.0, "all", 0.45, OPEN),
        ADD: _recipe(1.75, 1.5, "positive", 0.35, OPEN),
    }
)

STEER_RECIPES = MappingProxyType({name: recipe.steer for name, recipe in RECIPES.items()})
SAMPLER_RECIPES = MappingProxyType({name: recipe.sampler for name, recipe in RECIPES.items()})
# Of Counterfactual of Image, whose inputs are the sampler's and cfg.
IMAGE_RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        REMOVE_FOCAL: _of_image(RECIPES[REMOVE_FOCAL], 0.35, 3.0),
        REMOVE_DIFFUSE: _of_image(RECIPES[REMOVE_DIFFUSE], 0.25, 2.0),
        ADD: _of_image(RECIPES[ADD], 0.25, 3.0),
    }
)


def find_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises MedSteerError for a name that there is not."""
    if name not in RECIPES:
        raise MedSteerError(f"There is no recipe '{name}'; choose {', '.join([CUSTOM, *RECIPES])}.")
    return RECIPES[name]


def apart(name: str, inputs: Mapping[str, Any], recipes: Mapping[str, Mapping[str, Any]]) -> str:
    """A warning where a node's inputs are not those of the recipe that they are said to be of, else "".

    ``recipes``: the node's (`STEER_RECIPES`, `SAMPLER_RECIPES` or `IMAGE_RECIPES`). The inputs count, not the name: a
    workflow that was saved with a recipe gives the same when the recipe gets better. Inputs that are left out are not
    looked at.
    """
    if name == CUSTOM:
        return ""
    find_recipe(name)
    values = recipes[name]
    other = [(key.rpartition(".")[2], inputs[key], value) for key, value in values.items()
             if key in inputs and inputs[key] != value]  # fmt: skip
    if not other:
        return ""
    told = ", ".join(f"{key} is {_short(given)}, the recipe's {_short(value)}" for key, given, value in other)
    return f"Warning: recipe says '{name}', but {told}. The inputs count."


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
