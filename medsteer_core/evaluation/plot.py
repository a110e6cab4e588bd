"""An evaluation's report as a picture: a row for each arm, a panel for each number, intervals at 95%."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..dataset.records import COUNTERFACTUAL, RANDOM, REPROMPT, STRENGTH_ZERO
from ..pictures.drawing import DPI, FAINT, INK, LINE, Layout, axes_at, new_figure, pixels, write
from .table import MEASURES, null_test, outside_of, title

WIDTH, _LEFT, _GAP, _TOP, _ROW = 1060, 214, 34, 112, 84
_TITLE, _WORDS, _SMALL = 24, 20, 17
MOST_REPORTS = 6
# Colours of Okabe and Ito, told apart by everyone; each arm has a mark of its own beside it.
_MARKS = {
    COUNTERFACTUAL: ("#0072B2", "o"),
    STRENGTH_ZERO: (FAINT, "s"),
    RANDOM: ("#D55E00", "D"),
    REPROMPT: ("#009E73", "^"),
}
_SIGNS = {
    "as expected": "\N{CHECK MARK} as expected",
    "not as expected": "\N{BALLOT X} not as expected",
    "undecided": "? undecided",
}


@dataclass(frozen=True)
class Panel:
    """One number of every arm: its name in the report, what stands above it, its least range."""

    name: str
    heading: str
    below: str
    least: tuple[float, float]


def evaluation_picture(reports: Sequence[Mapping[str, Any]]) -> Tensor:
    """A picture ``(3, H, 1060)``: the first `MOST_REPORTS` reports, one below the other."""
    drawn = [_picture(report) for report in reports[:MOST_REPORTS]]
    if len(reports) > MOST_REPORTS:
        drawn.append(_words(f"Drawn: {MOST_REPORTS} of {len(reports)} groups; the report has all."))
    return torch.cat(drawn, dim=1)


def _words(words: str) -> Tensor:
    layout = Layout((40, WIDTH), 1, 1, left=0, right=0, top=0, bottom=0)
    figure = new_figure(layout)
    write(figure, layout, words, 16, 20, _SMALL, align="left", color=FAINT)
    return pixels(figure)


def _picture(report: Mapping[str, Any]) -> Tensor:
    arms, panels, notes = report["arms"], _panels(report), _notes(report)
    height = _TOP + _ROW * len(arms) + 52 + 26 * len(notes) + 12
    layout = Layout((height, WIDTH), 1, 1, left=0, right=0, top=0, bottom=0)
    figure = new_figure(layout)
    write(figure, layout, title(report), 16, 28, _TITLE, align="left", weight="bold", fit=WIDTH - 32)
    for row, arm in enumerate(arms):
        y = _TOP + _ROW * (row + 0.5)
        write(figure, layout, arm["arm"], 16, y - 12, _WORDS, align="left", weight="bold", fit=_LEFT - 40)
        counted = _SIGNS.get(arm["verdict"], f"{arm['accepted']} of {arm['n']} counted")
        write(figure, layout, counted, 16, y + 14, _SMALL, align="left", color=FAINT, fit=_LEFT - 40)
    width = (WIDTH - _LEFT - 24 - _GAP * (len(panels) - 1)) / len(panels)
    for column, panel in enumerate(panels):
        x = _LEFT + column * (width + _GAP)
        write(figure, layout, panel.heading, x + width / 2, 66, _WORDS, weight="bold", fit=width + _GAP - 6)
        write(figure, layout, panel.below, x + width / 2, 92, _SMALL, color=FAINT, fit=width + _GAP - 6)
        _draw(axes_at(figure, layout, x, _TOP, width, _ROW * len(arms)), panel, arms)
    for line, note in enumerate(notes):
        y = _TOP + _ROW * len(arms) + 58 + 26 * line
        write(figure, layout, note, 16, y, _SMALL, align="left", color=FAINT, fit=WIDTH - 32)
    return pixels(figure)


def _panels(report: Mapping[str, Any]) -> list[Panel]:
    better = "lower is better" if report["structure"] == "anatomy_drift" else "higher is better"
    panels = [
        Panel("flip_rate", "flip rate", "of counted pairs", (0.0, 1.0)),
        Panel("target_change", "target score change", f"of '{report['target']}'", (0.0, 1.0)),
        Panel("kept", f"kept: {MEASURES[report['structure']]}", better, (0.0, 1.0)),
    ]
    if any(arm["lpips"] is not None for arm in report["arms"]):
        panels.append(Panel("lpips", "LPIPS", "lower is nearer", (0.0, 0.2)))
    return panels


def _draw(axes, panel: Panel, arms: Sequence[Mapping[str, Any]]) -> None:
    """The marks of one panel; the first arm on top."""
    bounds = [panel.least[0], panel.least[1]]
    for arm in arms:
        if arm[panel.name] is not None:
            bounds += [arm[panel.name], *arm[f"{panel.name}_interval"]]
    low, high = min(bounds), max(bounds)
    if panel.name == "kept" and high <= 1:  # what is kept well lies near 1: show where it differs
        low = min(0.9, *bounds[2:]) if len(bounds) > 2 else low
    margin = 0.04 * (high - low)
    axes.set(xlim=(low - margin, high + margin), ylim=(len(arms), 0), yticks=[])
    axes.axvline(0, color=LINE, linewidth=1)
    for row, arm in enumerate(arms):
        axes.axhline(row, color=LINE, linewidth=0.8)
        _mark(axes, panel, arm, row + 0.62, (low, high))
    axes.locator_params(axis="x", nbins=4)
    axes.tick_params(axis="x", labelsize=_SMALL * 72 / DPI, colors=INK, length=4)
    for edge in axes.spines.values():
        edge.set(color=LINE, linewidth=0.8)


def _mark(axes, panel: Panel, arm: Mapping[str, Any], y: float, bounds: tuple[float, float]) -> None:
    value, size = arm[panel.name], _SMALL * 72 / DPI
    middle = sum(bounds) / 2
    if value is None or not arm["accepted"]:
        axes.text(middle, y, "not measured", ha="center", va="center", fontsize=size, color=FAINT)
        return
    colour, mark = _MARKS.get(arm["arm"], (INK, "o"))
    axes.plot(arm[f"{panel.name}_interval"], [y, y], color=colour, linewidth=4, solid_capstyle="butt", alpha=0.55)
    axes.plot([value], [y], color=colour, marker=mark, markersize=9)
    words = f"{arm['flips']} of {arm['accepted']}: {value:.0%}" if panel.name == "flip_rate" else f"{value:.3f}"
    # beside the edges words are pushed inside
    share = (value - bounds[0]) / (bounds[1] - bounds[0])
    align = "left" if share < 0.25 else "right" if share > 0.75 else "center"
    nudge = {"left": 0.02, "right": -0.02}.get(align, 0.0) * (bounds[1] - bounds[0])
    axes.text(value + nudge, y - 0.36, words, ha=align, va="center", fontsize=size, color=INK)


def _notes(report: Mapping[str, Any]) -> list[str]:
    """What the picture does not say by itself."""
    arms = report["arms"]
    total = f"{sum(arm['accepted'] for arm in arms)} of {sum(arm['n'] for arm in arms)}"
    notes = [
        f"Counted: {total} pairs, those whose factual the judge calls '{report['source']}'. Bars: 95% intervals.",
        f"{null_test(report)}  Outside: {outside_of(report)}.",
    ]
    shown = {arm["arm"]: arm["expected"] for arm in arms if arm["arm"] in (RANDOM, REPROMPT)}
    notes += [f"{arm}: {expected}; undecided while the intervals overlap." for arm, expected in shown.items()]
    return [*notes, f"Judge: {report['judge']}"]
