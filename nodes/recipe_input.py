"""The input with which one choice sets several widgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..medsteer_core.steering.presets import CUSTOM


def recipe_input(recipes: Mapping[str, Mapping[str, Any]], tooltip: str) -> io.Combo.Input:
    """A choice of recipes, each the values of widgets by their names, which the canvas reads from the node's schema."""
    table = {name: dict(values) for name, values in recipes.items()}
    return io.Combo.Input(
        "recipe",
        options=[CUSTOM, *table],
        default=CUSTOM,
        optional=True,
        tooltip=tooltip,
        extra_dict={"medsteer_recipes": table},
    )
