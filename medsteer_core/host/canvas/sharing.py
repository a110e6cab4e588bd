"""What a shared image or workflow says of the vector it was made with."""

from __future__ import annotations

from typing import Any

from ...vectors.pathology_vector import PathologyVector
from ...vectors.recipe import recipe
from .notes import note

KEY = "medsteer"


def kept_with_recipe(vector: PathologyVector, name: str, text: str) -> dict[str, Any]:
    """A node's note ``text``, with the vector's recipe for the browser, which keeps it among the node's properties."""
    return {**note(text).as_dict(), "medsteer_recipe": (recipe(vector, name),)}


def shown_with_recipe(hidden: Any, vector: PathologyVector, name: str, text: str) -> dict[str, Any]:
    """`kept_with_recipe` of a node that gives the vector: its recipe also goes beside the workflow into the PNGs that
    this run saves, where the request carries metadata.

    Not for a node that only takes the vector: images don't wait for it, so one time they would say it and one time not.
    """
    shown = kept_with_recipe(vector, name, text)
    if isinstance(hidden.extra_pnginfo, dict):
        (made,) = shown["medsteer_recipe"]
        hidden.extra_pnginfo.setdefault(KEY, {})[made["vector"]] = made
    return shown
