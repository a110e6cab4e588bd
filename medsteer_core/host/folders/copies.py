"""Two copies of the pack in one ComfyUI: their nodes have the same ids, so that one hides the other, and it is told."""

from __future__ import annotations

import logging

import nodes

ONE_OF_OURS = "MedSteer_Steer"


def tell_of_another_copy(module: str) -> None:
    """Warn in ComfyUI's log where another copy than ``module`` (``custom_nodes.NAME``) has registered our nodes."""
    there = nodes.NODE_CLASS_MAPPINGS.get(ONE_OF_OURS)
    other = getattr(there, "RELATIVE_PYTHON_MODULE", None)
    if other and other != module:
        logging.warning(
            "MedSteer is installed twice, as '%s' and as '%s'. The second one's nodes are used. Remove the older copy "
            "from custom_nodes and restart.",
            other,
            module,
        )
