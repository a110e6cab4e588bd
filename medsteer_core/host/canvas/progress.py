"""A progress bar of a node that does one thing after another, and where it can be cancelled."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management
import comfy.utils


def counter(total: int) -> Callable[[], None]:
    """Call what this gives after each of ``total`` things. It raises ComfyUI's own exception in a cancelled run."""
    bar = comfy.utils.ProgressBar(total)

    def done() -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(1)

    return done
