"""Which setting of a method is reported: one rule for all, applied to development seeds, kept in `chosen.json`.

Of the settings that flip at least `FLIP_WANTED` of the accepted pairs the one that keeps most structure; where none
does, the one that flips most. `dev.py bench quality --split development --choose` writes the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence._method import Method
from medsteer_core.errors import MedSteerError
from medsteer_core.files.whole_file import write_whole

FLIP_WANTED = 0.9
FILE = Path(__file__).with_name("chosen.json")


def structure(row: Mapping[str, Any], diffuse: bool) -> float:
    """How much of the image a row keeps, more is better: SSIM outside the finding, or minus the anatomy's drift."""
    value = -row["anatomy_drift"] if diffuse and row["anatomy_drift"] is not None else row["ssim_outside"]
    return -1e9 if value is None else value


def best(curve: Sequence[Mapping[str, Any]], diffuse: bool) -> Mapping[str, Any]:
    """The point of a curve that the rule takes."""
    flipping = [point for point in curve if (point["flip"] or 0.0) >= FLIP_WANTED]
    if flipping:
        return max(flipping, key=lambda point: structure(point, diffuse))
    return max(curve, key=lambda point: (point["flip"] or 0.0, structure(point, diffuse)))


def keep(chosen: Mapping[str, Mapping[str, str]], file: Path = FILE) -> None:
    """Write the settings, pair by pair and method by method, beside those of other pairs and methods."""
    known = read(file) if file.exists() else {}
    merged = {pair: {**known.get(pair, {}), **chosen.get(pair, {})} for pair in (*known, *chosen)}
    write_whole(file, (json.dumps(merged, indent=1, ensure_ascii=False) + "\n").encode())


def read(file: Path = FILE) -> dict[str, dict[str, str]]:
    """The settings that were chosen: pair and method to a setting in words (`Method.setting`)."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def chosen_of(pair: str, arms: Sequence[Method], known: Mapping[str, Mapping[str, str]]) -> tuple[Method, float]:
    """The arm and the value that were chosen for a method; the only one, where there is only one.

    Raises MedSteerError where none was, or one that there is no longer.
    """
    there = {arm.setting(value): (arm, value) for arm in arms for value in arm.values}
    if len(there) == 1:
        return next(iter(there.values()))
    setting = known.get(pair, {}).get(arms[0].name)
    if setting not in there:
        raise MedSteerError(
            f"{pair}: no setting of {arms[0].name} was chosen that there is (it says {setting!r}). Choose on "
            "development seeds first: dev.py bench quality --split development --choose."
        )
    return there[setting]
