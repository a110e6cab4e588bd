"""The files and texts of a finished workflow, brought from the server into a folder.

Names come from the server and are not trusted: nothing is written outside the folder, nothing hidden, nothing over a
file that is not the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import MedSteerError
from ..files.inside import name_parts, path_inside, shown
from ..files.whole_file import write_whole
from .result import Result
from .workflow import node_title

# Where a file goes by the folder of the server that it lies in: what a workflow saved stands at the top.
FOLDERS = {"output": (), "temp": ("previews",), "input": ("input",)}


def download(result: Result, folder: Path, overwrite: bool = False) -> list[Path]:
    """Write every file and shown text of a result under `folder`; their paths.

    A file that is there with the same content stays. Raises MedSteerError for names that lead out of the folder or are
    hidden (before anything is fetched), and, after all others are written, for files that are there with other content
    unless `overwrite`; OSError; ServerUnreachable.
    """
    named = [(target(folder, item), item) for item in result.files()]
    written, taken = [], []
    for path, item in named:
        _put(path, result.client.view(**item), overwrite, written, taken)
    for path, text in texts(result, folder):
        _put(path, text.encode(), overwrite, written, taken)
    if taken:
        raise MedSteerError(
            f"{', '.join(map(str, taken))}: there already, with other content; the new content was not written. "
            "Choose another --output, or allow it with --overwrite."
        )
    return written


def target(folder: Path, item: Mapping[str, str]) -> Path:
    """The path for one of the server's files (filename, subfolder, type); MedSteerError when it may not be written."""
    what = "a file's name from the server"
    if item["type"] not in FOLDERS:
        raise MedSteerError(
            f"the server names a file of the kind '{shown(item['type'])}'; output or temp was expected."
        )
    parts = FOLDERS[item["type"]] + name_parts("/".join(filter(None, (item["subfolder"], item["filename"]))), what)
    if any(part.startswith(".") for part in parts):
        raise MedSteerError(f"{what} is '{shown('/'.join(parts))}', which is hidden; a visible file was expected.")
    return path_inside(folder, parts, f"the output folder {folder}")


def texts(result: Result, folder: Path) -> Iterator[tuple[Path, str]]:
    """Paths and contents for the texts that nodes showed."""
    for node_id, output in result.outputs.items():
        lines = [part for part in output.get("text") or () if isinstance(part, str)]
        if lines:
            title = node_title(result.workflow, node_id) if node_id in result.workflow else "node"
            # With the run in it: the names of images count up, and the texts of several runs must not meet either.
            name = re.sub(r"[^\w-]+", "_", f"{title}_{node_id}_{result.prompt_id[:8]}").strip("_")
            parts = ("texts", f"{name[-80:]}.txt")
            yield path_inside(folder, parts, f"the output folder {folder}"), "\n".join(lines) + "\n"


def _put(path: Path, data: bytes, overwrite: bool, written: list[Path], taken: list[Path]) -> None:
    if path.exists() and not overwrite and (not path.is_file() or path.read_bytes() != data):
        taken.append(path)
        return
    if not (path.is_file() and path.read_bytes() == data):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    written.append(path)
