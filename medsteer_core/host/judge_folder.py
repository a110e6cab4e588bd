"""Judges that nodes can choose: EndoPhantom's own, none, and those in ``models/medsteer/judges``."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..errors import MedSteerError
from ..evaluate import embedded_judges
from ..judge import Judge
from ..judge_files import SUFFIXES, load_judge
from .vector_folder import FOLDER, JUDGES

EMBEDDED, NONE = "EndoPhantom", "none"


def names() -> list[str]:
    """EndoPhantom's judge, none, then the folders and weights files that have their JSON."""
    return [EMBEDDED, NONE, *_found()]


def problem(name: str) -> str:
    """Why a name can't be chosen; "" when it can."""
    if name in names():
        return ""
    return (
        f"There is no judge '{name}'; one of these was expected: {', '.join(names())}. Put a judge's folder into "
        f"models/{FOLDER}/{JUDGES} and refresh the list (R)."
    )


def judge_of(name: str) -> Judge | None:
    """The judge of a listed name; None for none. MedSteerError names the file that does not fit."""
    if found := problem(name):
        raise MedSteerError(found)
    if name == NONE:
        return None
    return embedded_judges() if name == EMBEDDED else load_judge(_found()[name])


def state(name: str) -> str:
    """What changes when a judge's files do; "" for EndoPhantom's and none."""
    path = _found().get(name)
    if path is None:
        return ""
    files = sorted(path.iterdir()) if path.is_dir() else [path, path.with_suffix(".json")]
    return ";".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


def _found() -> dict[str, Path]:
    roots = folder_paths.get_folder_paths(FOLDER) if FOLDER in folder_paths.folder_names_and_paths else []
    found: dict[str, Path] = {}
    for root in (Path(root) / JUDGES for root in roots):
        for path in sorted(root.iterdir()) if root.is_dir() else []:
            weights = path.suffix in SUFFIXES and path.with_suffix(".json").is_file()
            if weights or (path / "judge.json").is_file():
                found.setdefault(path.name, path)
    return found
