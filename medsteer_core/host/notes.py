"""Text that a node shows on itself after it ran."""

from __future__ import annotations

from comfy_api.latest import ui


def note(text: str, node_id: str | None, shown: str | None = None) -> ui.PreviewText:
    """Show ``shown`` (or ``text``) on the node ``node_id`` in the browser; gives what puts ``text`` in the history."""
    from server import PromptServer  # ComfyUI's web server; there is none where nodes run without it

    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(shown or text, node_id)
    return ui.PreviewText(text)
