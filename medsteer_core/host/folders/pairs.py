"""Datasets in ComfyUI's output folder, and what their PNGs say of the workflow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args

from ...dataset.records import files_of
from ...errors import MedSteerError
from ...files.inside import name_parts, path_inside
from ..canvas.sharing import KEY

WORKFLOW, RECORD, MARKING = "workflow and record", "record", "marking only"
METADATA = (WORKFLOW, RECORD, MARKING)


def folder_of(name: str) -> Path:
    """The dataset's folder in ComfyUI's output folder. Raises MedSteerError for a name that is none or leads out."""
    return path_inside(Path(folder_paths.get_output_directory()), name_parts(name, "folder"), "the output folder")


def problem(name: str) -> str:
    """Why a name can't be the folder's; "" when it can."""
    try:
        folder_of(name)
    except MedSteerError as error:
        return str(error)
    return ""


def png_texts(metadata: str, prompt: Any, extra: Any) -> dict[str, str]:
    """The texts that core's Save Image writes, where they are wanted and ComfyUI was not told to write none.

    Equal runs give equal texts: what a run notes in them as it goes is left out.
    """
    _known(metadata)
    if metadata != WORKFLOW or args.disable_metadata:
        return {}
    texts = {}
    if isinstance(prompt, Mapping):
        noted = ("is_changed",)
        texts["prompt"] = {number: {key: part for key, part in node.items() if key not in noted}
                           for number, node in prompt.items()}  # fmt: skip
    # Load Pathology Vector notes its recipe there, but only in the runs in which it is not cached.
    texts |= {name: value for name, value in (extra or {}).items() if name != KEY}
    return {name: json.dumps(value) for name, value in texts.items()}


def with_record(metadata: str) -> bool:
    """Whether the PNGs say how they were made."""
    return _known(metadata) != MARKING and not args.disable_metadata


def _known(metadata: str) -> str:
    """The same text. Raises MedSteerError for one that is no choice: prompts may be private."""
    if metadata not in METADATA:
        raise MedSteerError(f"metadata is '{metadata}'; one of {', '.join(METADATA)} was expected.")
    return metadata


def shown_files(name: str, records: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """All images of some pairs as ComfyUI's own nodes tell of saved ones, for its viewer and for `GET /view`."""
    root = Path(*name_parts(name, "folder"))
    files = [root / file for record in records for file in files_of(record).values()]
    return [{"filename": file.name, "subfolder": file.parent.as_posix(), "type": "output"} for file in files]
