"""Judges that nodes can choose: EndoPhantom's own, none, and those in ``models/medsteer/judges``.

What reads a judge is imported when one is read, so that ComfyUI's start does not wait for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import folder_paths

from ...errors import MedSteerError
from ...files.inside import shown
from ...judges.held_out import doubt_of
from .vectors import FOLDER, JUDGES

if TYPE_CHECKING:
    from ...judges.judge import Judge, Terms

EMBEDDED, NONE = "EndoPhantom", "none"


def names() -> list[str]:
    """EndoPhantom's judge, none, then the folders and weights files that have their JSON; last those that held-out
    images do not tell from guessing."""
    return [EMBEDDED, NONE, *sorted(found := _found(), key=lambda name: bool(doubt_of(found[name])))]


def problem(name: str) -> str:
    """Why a name can't be chosen; "" when it can."""
    if isinstance(name, str) and name in names():
        return ""
    return (
        f"There is no judge '{shown(name)}'; one of these was expected: {', '.join(names())}. Put a judge's folder "
        f"into models/{FOLDER}/{JUDGES} and refresh the list (R)."
    )


def class_problem(name: str | None, source_class: str | None, target_class: str | None) -> str:
    """Why a judge can't judge pairs of these classes, or can't be chosen; "" when it can, and for what is not known."""
    if name is None:  # linked to another node, so not known yet
        return ""
    if (found := problem(name)) or name == NONE or source_class is target_class is None:
        return found
    try:
        terms = _terms(name)
        for given, role in ((source_class, "source"), (target_class, "target")):
            if given is not None:
                terms.class_named(given, role)
    except MedSteerError as error:
        return f"judge '{name}': {error}"
    return ""


def _terms(name: str) -> Terms:
    from ...judges.judge import Terms

    if name == EMBEDDED:
        from ...scores.pair import ENDOPHANTOM

        return ENDOPHANTOM
    from ...judges.files import classes_of

    return Terms((), classes_of(_found()[name]))


def judge_of(name: str) -> Judge | None:
    """The judge of a listed name; None for none. MedSteerError names the file that does not fit."""
    if found := problem(name):
        raise MedSteerError(found)
    if name == NONE:
        return None
    if name == EMBEDDED:
        from ...scores.scorer import embedded_judges

        return embedded_judges()
    from ...judges.files import load_judge

    return load_judge(_found()[name])


def state(name: str) -> str:
    """What changes when a judge's files do; "" for EndoPhantom's and none."""
    path = _found().get(name)
    if path is None:
        return ""
    files = sorted(path.iterdir()) if path.is_dir() else [path, path.with_suffix(".json")]
    return ";".join(f"{file.name} {_size_and_time(file)}" for file in files)


def _found() -> dict[str, Path]:
    roots = folder_paths.get_folder_paths(FOLDER) if FOLDER in folder_paths.folder_names_and_paths else []
    found: dict[str, Path] = {}
    for root in (Path(root) / JUDGES for root in roots):
        for path in sorted(root.iterdir()) if root.is_dir() else []:
            if _is_judge(path):
                found.setdefault(path.name, path)
    return found


def _size_and_time(file: Path) -> str:
    try:
        found = file.stat()
    except OSError:  # a link to a file that is gone
        return "gone"
    return f"{found.st_size} {found.st_mtime_ns}"


def _is_judge(path: Path) -> bool:
    from ...judges.files import SUFFIXES

    return (path.suffix in SUFFIXES and path.with_suffix(".json").is_file()) or (path / "judge.json").is_file()
