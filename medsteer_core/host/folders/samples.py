"""Where ComfyUI keeps extractions' samples: a folder of the user directory that its web server never shows."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...extraction.sample_store import SampleStore


def store() -> SampleStore:
    """``user/__medsteer/samples``; it may be deleted at any time."""
    return SampleStore(Path(folder_paths.get_system_user_directory("medsteer")) / "samples")
