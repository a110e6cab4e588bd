"""What only the graph shows: the text behind a CONDITIONING and the node behind a MASK, which values don't carry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..medsteer_core.errors import MedSteerError
from ..medsteer_core.steering.recipes import AUTOMATIC, CONCEPT, PREDICTION


def _linked(prompt: dict[str, Any] | None, node_id: str | None, input_name: str) -> tuple[dict[str, Any], list]:
    """The node linked to ``input_name`` of node ``node_id`` in an API prompt, and the link; {} and [] where none is."""
    link = (prompt or {}).get(str(node_id), {}).get("inputs", {}).get(input_name)
    if not isinstance(link, list) or not link:
        return {}, []
    return (prompt or {}).get(str(link[0]), {}), link


def prompt_text(prompt: dict[str, Any] | None, node_id: str | None, input_name: str) -> str | None:
    """The text of the encode node linked to ``input_name`` of node ``node_id`` in an API prompt; None if unknown."""
    text = _linked(prompt, node_id, input_name)[0].get("inputs", {}).get("text")
    return text if isinstance(text, str) else None


def asked_size(prompt: dict[str, Any] | None, node_id: str | None, input_name: str) -> tuple[int, int] | None:
    """Height and width in pixels at the node linked to ``input_name``, if it has them as widgets; None if unknown."""
    inputs = _linked(prompt, node_id, input_name)[0].get("inputs", {})
    sides = inputs.get("height"), inputs.get("width")
    return sides if all(isinstance(side, int) and not isinstance(side, bool) for side in sides) else None


_STEER = "MedSteer_Steer"
_SAMPLERS = ("MedSteer_CounterfactualSampler", "MedSteer_CalibrateStrength", "MedSteer_CounterfactualOfImage")
_CONCEPT_MAP, _MASK = 2, 3  # their outputs by their place


def mask_of_sampler(
    prompt: dict[str, Any] | None, node_id: str | None, input_name: str, records: Sequence[dict[str, Any]]
) -> str:
    """Where the mask linked to ``input_name`` comes from: a sampler's map by its name, or "user" for whatever else.

    ``records`` are Counterfactual Sampler's: its output mask is what its lock was. MedSteerError when that was none.
    """
    node, link = _linked(prompt, node_id, input_name)
    if len(link) != 2 or node.get("class_type") not in _SAMPLERS:
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


def mask_in_graph(prompt: dict[str, Any] | None, node_id: str | None, input_name: str) -> str:
    """`mask_of_sampler` where no records are at hand: by what the graph says of the sampler alone."""
    sampler, link = _linked(prompt, node_id, input_name)
    if len(link) != 2 or sampler.get("class_type") not in _SAMPLERS:
        return "user"
    inputs = sampler.get("inputs", {})
    lock = inputs.get("lock")
    if lock == AUTOMATIC:
        lock = CONCEPT if steer_nodes(prompt, str(link[0])) else PREDICTION
    if link[1] == _CONCEPT_MAP:
        return PREDICTION if lock == PREDICTION else CONCEPT
    return lock if link[1] == _MASK and lock in (CONCEPT, PREDICTION) and "mask" not in inputs else "user"


def steer_nodes(prompt: dict[str, Any] | None, node_id: str | None) -> int:
    """How many Steer nodes lead to the input ``model`` of a node, by whatever inputs named model, model1, ..."""
    nodes, seen, count = prompt or {}, set(), 0
    ways = [nodes.get(str(node_id), {}).get("inputs", {}).get("model")]
    while ways:
        link = ways.pop()
        if not isinstance(link, list) or not link or str(link[0]) in seen:
            continue
        seen.add(str(link[0]))
        node = nodes.get(str(link[0]), {})
        count += node.get("class_type") == _STEER
        ways += [value for name, value in node.get("inputs", {}).items() if name.startswith("model")]
    return count
