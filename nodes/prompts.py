"""The text behind a CONDITIONING, where the graph shows it: ComfyUI does not carry it in the value."""

from __future__ import annotations

from typing import Any


def prompt_text(prompt: dict[str, Any] | None, node_id: str | None, input_name: str) -> str | None:
    """The text of the encode node linked to ``input_name`` of node ``node_id`` in an API prompt; None if unknown."""
    node = (prompt or {}).get(str(node_id), {})
    link = node.get("inputs", {}).get(input_name)
    if not isinstance(link, list) or not link:
        return None
    text = (prompt or {}).get(str(link[0]), {}).get("inputs", {}).get("text")
    return text if isinstance(text, str) else None
