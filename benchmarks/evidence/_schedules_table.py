"""The schedules benchmark's record as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.evidence._operators_table import points, verdict
from benchmarks.shared.command import aligned, with_interval


def rate(row: Mapping[str, Any]) -> str:
    """A row's flip rate."""
    return "-" if row["flip"] is None else f"{row['flip']:.2f}"


def table(record: Mapping[str, Any]) -> str:
    """One table a pair, and what follows of each way over all pairs."""
    split = record["seeds"]["used"]
    settings, (first, last) = record["settings"], record["seeds"][split]
    known = "{sampler} {steps}".format(**record["recorded"])
    text = [f"\nn = {settings['n']}, {split} seeds {first} to {last}, cfg {settings['cfg']:g}; vectors recorded under "
            f"{known}, against each schedule's own"]  # fmt: skip
    head = ("schedule", "accepted", f"flip, {known}'s vector [95%]", "flip, own vector [95%]",
            "difference, points [95%]", "within 5", "structure", "structure, own")  # fmt: skip
    for name in settings["presets"]:
        lines = [head, *(_line(row) for row in record["rows"] if row["pair"] == name)]
        measure = next(row["own"]["structure"] for row in record["rows"] if row["pair"] == name)
        text += ["", f"{name} (structure: {(measure or '-').replace('_', ' ')})", *aligned(lines)]
    verdicts = [(name, points(found), verdict(found)) for name, found in record["pooled"].items()]
    return "\n".join([*text, "", "all pairs", *aligned([("schedule", "difference, points [95%]", ""), *verdicts])])


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    known, own, difference = row["recorded"], row["own"], row["difference"]
    rates = [with_interval(part["flip"], part["flip_ci"]) if part else "" for part in (known, own)]
    kept = ["" if part is None else _structure(part) for part in (known, own)]
    compared = ("", "") if difference is None else (points(difference), _yes(difference["within"]))
    accepted = f"{own['accepted']} of {own['n']}"
    return (f"{row['sampler']} {row['steps']}", accepted, *rates, *compared, *kept)


def _structure(part: Mapping[str, Any]) -> str:
    value = part[part["structure"]] if part["structure"] else None
    return "-" if value is None else f"{value:.3f}"


def _yes(value: bool | None) -> str:
    return "?" if value is None else "yes" if value else "NO"
