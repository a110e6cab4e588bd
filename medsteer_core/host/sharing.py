"""What a shared image or workflow says of the vector it was made with."""

from __future__ import annotations

from typing import Any

from ..pathology_vector import PathologyVector
from ..recipe import recipe
from .notes import note

KEY = "medsteer"


def shown_with_recipe(hidden: Any, vector: PathologyVector, name: str, text: str) -> dict[str, Any]:
    """A node's note ``text``, with the vector's recipe for the browser, which keeps it among the node's properties.

    The recipe also goes beside the workflow into the PNGs that this run saves, where the request carries metadata.
    """
    made = recipe(vector, name)
    if isinstance(hidden.extra_pnginfo, dict):
        hidden.extra_pnginfo.setdefault(KEY, {})[made["vector"]] = made
    return {**note(text).as_dict(), "medsteer_recipe": (made,)}
