"""What only the graph shows: the text behind a CONDITIONING and the node behind a MASK, which values don't carry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..medsteer_core.errors import MedSteerError
from ..medsteer_core.host.sampling.pair_request import CONCEPT, PREDICTION


def prompt_text(prompt: dict[str, Any] | None, node_id: str | None, input_name: str) -> str | None:
    """The text of the encode node linked to ``input_name`` of node ``node_id`` in an API prompt; None if unknown."""
    node = (prompt or {}).get(str(node_id), {})
    link = node.get("inputs", {}).get(input_name)
    if not isinstance(link, list) or not link:
        return None
    text = (prompt or {}).get(str(link[0]), {}).get("inputs", {}).get("text")
    return text if isinstance(text, str) else None


# Outputs of Counterfactual Sampler by their place.
_CONCEPT_MAP, _MASK = 2, 3


def mask_of_sampler(
    prompt: dict[str, Any] | None, node_id: str | None, input_name: str, records: Sequence[dict[str, Any]]
) -> str:
    """Where the mask linked to ``input_name`` comes from: a sampler's map by its name, or "user" for whatever else.

    ``records`` are Counterfactual Sampler's: its output mask is what its lock was. MedSteerError when that was none.
    """
    link = (prompt or {}).get(str(node_id), {}).get("inputs", {}).get(input_name)
    if not isinstance(link, list) or len(link) != 2:
        return "user"
    if (prompt or {}).get(str(link[0]), {}).get("class_type") != "MedSteer_CounterfactualSampler":
        return "user"
    source = records[0]["made"]["lock"]["mask_source"] if records else "none"
    if link[1] == _CONCEPT_MAP:
        return PREDICTION if source == PREDICTION else CONCEPT
    if link[1] == _MASK and source == "none":
        raise MedSteerError(
            "mask is Counterfactual Sampler's, which had no lock, so it marks the whole image. Connect its "
            "concept_map, or nothing, and the judge's segmenter marks the finding."
        )
    return source
