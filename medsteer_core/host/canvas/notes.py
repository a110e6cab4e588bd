"""Text that a node shows on itself, after it ran or, on a node of anybody's, while it runs."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ui
from comfy_execution.utils import get_executing_context


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


def say_on_running_node(text: str) -> None:
    """Show ``text`` on the node that is running, whosever it is; nothing where no server runs one.

    web/medsteer.js draws it. It is no part of the node's result: a cached run does not say it again.
    """
    import server  # of ComfyUI; it is not there where its parts are used without it

    context, running = get_executing_context(), getattr(server.PromptServer, "instance", None)
    if context is not None and running is not None:
        running.send_sync("medsteer_note", {"node": context.node_id, "text": text}, running.client_id)
