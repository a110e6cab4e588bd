"""Text that a node shows on itself after it ran."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ui


class Note(ui.PreviewText):
    """``text`` for the run's history, and ``shown`` (or ``text``) for web/medsteer.js, which draws it on the node.

    A node that is no output node needs ``has_intermediate_output=True`` in its schema: only then does ComfyUI send
    the note again when the node's result was cached, as after opening a workflow a second time.
    """

    def __init__(self, text: str, shown: str):
        super().__init__(text)
        self.shown = shown

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "medsteer_note": (self.shown,)}


def note(text: str, shown: str | None = None) -> Note:
    """What a node gives as its ``ui`` to show ``text``, or ``shown`` in its place, on itself."""
    return Note(text, shown or text)
