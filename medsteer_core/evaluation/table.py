"""An evaluation's report as a text table, as Markdown, and its pairs as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from ..judges.held_out import GUESSES

MEASURES = {"ssim_outside": "SSIM outside", "anatomy_drift": "anatomy drift", "ssim": "SSIM, whole image"}
_MASKS = {
    "segmenter": "the segmenter's masks",
    "concept map": "the concept map",
    "prediction difference": "the map of the predictions' difference",
    "user": "the given mask",
    "none": "no mask",
}
LEAST_COUNTED = 0.5  # of the pairs; where fewer are of the source class, a report leads with that
_ROUNDING = 1.01  # levels: two roundings of nearly the same value
_HEAD = ("arm", "flip rate (95% interval)", "target score change", "off-target drift")
_PAIRS = (
    "source", "target", "arm", "pair", "accepted", "flipped", "misses", "factual_label", "counterfactual_label",
    "target_change", "off_target_drift", "ssim_outside", "psnr_outside", "anatomy_drift", "ssim", "lpips",
    "changed_fraction", "identical", "mask_source",
)  # fmt: skip


def rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The cells of the table, its head first; columns in which nothing was measured are left out."""
    columns = {
        "SSIM outside": "ssim_outside",
        "PSNR outside": "psnr_outside",
        "anatomy drift": "anatomy_drift",
        "SSIM": "ssim",
        "LPIPS": "lpips",
    }
    shown = {head: name for head, name in columns.items() if any(arm[name] is not None for arm in report["arms"])}
    cells = [[*_HEAD, *shown, "verdict"]]
    for arm in report["arms"]:
        numbers = [_number(arm[name], "dB" if name == "psnr_outside" else "") for name in shown.values()]
        change = with_interval(arm["target_change"], arm["target_change_interval"], "+.2f")
        cells.append(
            [arm["arm"], flip_rate(arm), change, _number(arm["off_target_drift"]), *numbers, arm["verdict"] or ""]
        )
    return cells


def flip_rate(arm: Mapping[str, Any]) -> str:
    """An arm's flips of its accepted pairs, and the interval."""
    if not arm["accepted"]:
        return f"none of {arm['n']} counted"
    low, high = arm["flip_rate_interval"]
    rate = f"{arm['flips']}/{arm['accepted']} = {arm['flip_rate']:.0%} ({low:.0%} to {high:.0%})"
    few = arm["accepted"] < LEAST_COUNTED * arm["n"]
    return f"only {arm['accepted']} of {arm['n']} pairs counted: {rate}" if few else rate


def with_interval(value: float | None, interval: Sequence[float] | None, form: str = ".3f") -> str:
    """A number and its interval; "" for None."""
    if value is None or interval is None:
        return ""
    return f"{value:{form}} ({interval[0]:{form}} to {interval[1]:{form}})"


def text(report: Mapping[str, Any]) -> str:
    """The table in aligned columns, with what was evaluated above it and the notes below."""
    cells = rows(report)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([title(report), "", *lines, "", *footnotes(report)]) + "\n"


def in_short(report: Mapping[str, Any]) -> str:
    """Flip rates and the null test, a line each."""
    doubts = [note for note in report["notes"] if note.startswith(GUESSES) or "source_class" in note]
    return "\n".join([*(f"{arm['arm']}: {flip_rate(arm)}" for arm in report["arms"]), null_test(report), *doubts])


def markdown(report: Mapping[str, Any]) -> str:
    """The same as Markdown."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows(report)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    lines.insert(1, "|" + " --- |" * len(cells[0]))
    return "\n".join([f"## {title(report)}", "", *lines, "", *(f"- {line}" for line in footnotes(report))]) + "\n"


def title(report: Mapping[str, Any]) -> str:
    """What was evaluated."""
    return f"{report['source']} -> {report['target']}"


def footnotes(report: Mapping[str, Any]) -> list[str]:
    """Denominators, the null test, the mask's source, the judge, and what was not measured."""
    lines = [f"{arm['arm']}: {counted(arm, report['source'])}" for arm in report["arms"]]
    lines.append(null_test(report))
    lines.append(f"Outside: {outside_of(report)}.")
    return [*lines, f"Judge: {report['judge']}", *report["notes"]]


def counted(arm: Mapping[str, Any], source: str) -> str:
    """An arm's denominator in words."""
    told = f"{arm['accepted']} of {arm['n']} pairs counted, whose factual the judge calls '{source}'"
    return told if arm["distance"] is None and arm["accepted"] else f"{told} and finds like its training's images"


def null_test(report: Mapping[str, Any]) -> str:
    """The null test in words."""
    null = report["null_test"]
    if null["passed"] is None:
        return "Null test: not run (no pairs of strength 0)."
    found = f"{null['identical']} of {null['pairs']} pairs of strength 0 are identical"
    if null["passed"]:
        return f"Null test: passed, {found}."
    levels = 255 * null["largest_difference"]
    # what two runs of other batches round differently stays far below a level before it is saved
    hint = " That is rounding: sample 0 and 1 in one run (strengths '0, 1')." if levels <= _ROUNDING else ""
    return f"Null test: FAILED, {found}; pixels differ by up to {levels:.2g} of 255 levels.{hint}"


def outside_of(report: Mapping[str, Any]) -> str:
    """Where the mask came from, in words."""
    sources = report["mask_source"].split(" + ")
    if sources == ["none"]:
        return "not measured, since the judge marks no findings and no mask was given"
    left = sum(arm["accepted"] - arm["ssim_outside_n"] for arm in report["arms"])
    few = f"; {left} counted pairs without, since too much is masked or nothing masks them" if left else ""
    return f"of {' and '.join(_MASKS[source] for source in sources)}{few}"


def pairs_csv(reports: Sequence[Mapping[str, Any]]) -> str:
    """Every pair of the reports as CSV; what was not measured is empty."""
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(_PAIRS)
    for report in reports:
        for pair in report["pairs"]:
            writer.writerow([_cell(pair[name]) for name in _PAIRS])
    return written.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    return " + ".join(value) if isinstance(value, (list, tuple)) else "" if value is None else value


def _number(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.1f} {unit}" if unit else f"{value:.3f}"
