"""Draw a pathology vector: where the classes lie apart, how well and how steadily, and both classes along it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..extraction.sample_report import AUROC, recorded
from ..vectors.combined_facts import is_combined
from ..vectors.pathology_vector import PathologyVector
from .drawing import DPI, FAINT, INK, LINE, Layout, axes_at, colour_bar, new_figure, pixels, write
from .vector_maps import (
    Along,
    BlockMap,
    Missing,
    block_numbers,
    classes_along,
    gap_map,
    separability_map,
    stability_map,
)

# Orange and blue of Okabe and Ito's palette, which every kind of colour vision tells apart.
PRESENT, ABSENT = "#d98200", "#0072b2"
COLOURS = "viridis"
_UNKNOWN = "#dfe2e6"
# Large enough for a picture of 1060 pixels that a node shows at half its size.
_TITLE, _WORDS, _SMALL = 24, 22, 20
_MOST_TICKS, _NUMBERED_CELLS, _BINS = 6, 24, 12
_LAYOUT = Layout((320, 350), rows=2, columns=2, left=92, top=208, bottom=92, gap=176, right=92, row_gap=156)


def vector_picture(vector: PathologyVector) -> Tensor:
    """A picture ``(3, 1084, 1060)`` in 0..1: class gap, separability and stability of every block and step, and both
    classes along one direction. Where the vector does not know, a sentence says so. MedSteerError without matplotlib.
    """
    figure = new_figure(_LAYOUT)
    _headline(figure, vector)
    along = classes_along(vector)
    maps = gap_map(vector), separability_map(vector), stability_map(vector)
    for place, found in zip(((0, 0), (0, 1), (1, 0)), maps, strict=True):
        if isinstance(found, Missing):
            _sentence(figure, place, found)
        else:
            _heat_map(figure, place, found, vector, along)
    if isinstance(along, Missing):
        _sentence(figure, (1, 1), along)
    else:
        _classes(figure, (1, 1), along, vector)
    return pixels(figure)


def _headline(figure, vector: PathologyVector) -> None:
    facts = vector.provenance
    x, width = 28, _LAYOUT.width - 56
    if is_combined(vector):
        rows = [("combined", _shortened(facts["combined"]["expression"], 90), INK), ("", "", INK)]
    else:
        prompts = facts.get("prompts", {})
        texts = [((prompts.get(side) or {}).get("text") or "text unknown") for side in ("present", "absent")]
        rows = list(zip(("present", "absent"), texts, (PRESENT, ABSENT), strict=True))
    for row, (name, words, colour) in enumerate(rows):
        y = 34 + 36 * row
        write(figure, _LAYOUT, name, x, y, _WORDS, align="left", weight="bold", color=colour)
        write(figure, _LAYOUT, _shortened(words, 90), x + 118, y, _WORDS, align="left", fit=width - 118)
    size = f"{len(vector.site_names)} blocks × {vector.steps} steps, rank {vector.rank}"
    samples = f"{facts['samples']} samples, noise '{facts.get('noise')}', " if "samples" in facts else ""
    estimator = str(facts.get("estimator", "")).replace("_", " ")
    line = f"{samples}{estimator + ', ' if estimator else ''}{size}  [{vector.short_hash()}]"
    write(figure, _LAYOUT, line, x, 108, _SMALL, align="left", color=FAINT, fit=width)


def _heat_map(figure, place: tuple[int, int], found: BlockMap, vector: PathologyVector, along: Along | Missing) -> None:
    from matplotlib import colormaps

    known = found.values[~found.values.isnan()]
    least, mean, most = (f"{value:.3g}" for value in (float(known.min()), float(known.mean()), float(known.max())))
    axes = _panel(figure, place, found.title, f"{least} to {most}, mean {mean}")
    colours = colormaps[COLOURS].with_extremes(bad=_UNKNOWN)
    values = found.values.clamp(found.low, found.high)
    axes.imshow(values.numpy(), aspect="auto", cmap=colours, vmin=found.low, vmax=found.high, interpolation="nearest")
    blocks, steps = values.shape
    numbers = block_numbers(vector.site_names)
    _ticks(axes.xaxis, [str(step + 1) for step in range(steps)])
    _ticks(axes.yaxis, [str(number) for number in numbers or range(1, blocks + 1)])
    axes.set_ylabel("block" if numbers else "site, in order", fontsize=_points(_WORDS), color=INK, labelpad=2)
    axes.set_xlabel(_steps_label(vector), fontsize=_points(_WORDS), color=INK, labelpad=4)
    if blocks * steps <= _NUMBERED_CELLS and steps <= 6:
        _cell_numbers(axes, found)
    if isinstance(along, Along):
        _frame(axes, vector.site_names.index(along.site), along.step)
    x, y = _LAYOUT.at(*place)
    bar = axes_at(figure, _LAYOUT, x + _LAYOUT.cell[1] + 12, y, 16, _LAYOUT.cell[0])
    colour_bar(figure, bar, COLOURS, found.low, found.high, _bar_ticks(found), _SMALL)


def _bar_ticks(found: BlockMap) -> Mapping[float, str]:
    middle = (found.low + found.high) / 2
    low, between, high = (_number(value) for value in (found.low, middle, found.high))
    below, above = bool((found.values < found.low).any()), bool((found.values > found.high).any())
    return {
        found.low: f"\N{LESS-THAN OR EQUAL TO}{low}" if below else low,
        middle: between,
        found.high: f"\N{GREATER-THAN OR EQUAL TO}{high}" if above else high,
    }


def _number(value: float) -> str:
    return f"{value:.2g}" if value < 99.5 else f"{value:.0f}"


def _cell_numbers(axes, found: BlockMap) -> None:
    """Few cells have room for their numbers, dark on bright and bright on dark."""
    middle = (found.low + found.high) / 2
    for block, row in enumerate(found.values.tolist()):
        for step, value in enumerate(row):
            words = "?" if value != value else f"{value:.2f}" if value < 9.995 else f"{value:.0f}"
            colour = "white" if value < middle else "black"
            axes.text(step, block, words, ha="center", va="center", fontsize=_points(_SMALL), color=colour)


def _frame(axes, block: int, step: int) -> None:
    """The block and step that the classes are drawn at; white on black, to be seen on any colour."""
    from matplotlib.patches import Rectangle

    for colour, width in (("black", 4.5), ("white", 2.0)):
        axes.add_patch(
            Rectangle((step - 0.5, block - 0.5), 1, 1, fill=False, edgecolor=colour, linewidth=width, clip_on=False)
        )


def _classes(figure, place: tuple[int, int], along: Along, vector: PathologyVector) -> None:
    numbers = block_numbers(vector.site_names)
    index = vector.site_names.index(along.site)
    block = f"block {numbers[index]}" if numbers else f"site {index + 1}"
    auroc = recorded(vector, AUROC)
    measured = f", AUROC {auroc[along.site][along.step]:.2f}" if along.held_out and auroc else ""
    first = "" if vector.rank == 1 else " (direction 1)"
    axes = _panel(figure, place, along.title, f"white frame: {block}, step {along.step + 1}{measured}{first}")
    span = {"ymax": 0.8} if along.held_out else {"ymin": 0.4}  # clear of the words
    axes.axvline(0, color=FAINT, linewidth=1.2, linestyle="--", **span)
    if along.held_out:
        _histogram(axes, along)
    else:
        _means(axes, along)
    axes.tick_params(labelsize=_points(_SMALL), colors=INK, length=3)
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel("projection, from the midpoint", fontsize=_points(_WORDS), color=INK, labelpad=4)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _histogram(axes, along: Along) -> None:
    from matplotlib.ticker import MaxNLocator

    every = along.present + along.absent
    low, high = min(every), max(every)
    reach = (low, high) if high > low else (low - 1, high + 1)
    sides = (("absent", along.absent, ABSENT, "//"), ("present", along.present, PRESENT, ""))
    for name, values, colour, hatch in sides:
        axes.hist(
            values, bins=_BINS, range=reach, color=colour, alpha=0.7, hatch=hatch, edgecolor="white", linewidth=0.8,
            label=f"{name} ({len(values)})",
        )  # fmt: skip
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])  # room for the legend
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_ylabel("samples", fontsize=_points(_WORDS), color=INK, labelpad=2)
    axes.legend(
        loc="upper center", ncols=2, frameon=False, fontsize=_points(_SMALL), handlelength=1.0, handletextpad=0.4,
        columnspacing=1.0, labelcolor=INK, borderaxespad=0.1,
    )  # fmt: skip


def _means(axes, along: Along) -> None:
    """The class means, and as far as any one direction can spread the samples: all channels' variance together."""
    rows = (("present", along.present, PRESENT), ("absent", along.absent, ABSENT))
    for row, ((name, (mean,), colour), spread) in enumerate(zip(rows, along.spreads or (None, None), strict=True)):
        axes.errorbar(mean, -row, xerr=spread, color=colour, fmt="o" if row else "D", markersize=11, capsize=8, lw=2.5)
        axes.text(mean, 0.2 - row, name, ha="center", fontsize=_points(_WORDS), color=colour, weight="bold")
    axes.set_ylim(-2.2, 0.7)
    axes.margins(x=0.3)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    bars = "Bars: spread in all channels\ntogether, the most it can be here." if along.spreads else ""
    words = f"This vector keeps class means,\nno single samples.\n{bars}".strip()
    axes.text(0.5, 0.02, words, transform=axes.transAxes, ha="center", va="bottom", fontsize=_points(18), color=FAINT)


def _sentence(figure, place: tuple[int, int], missing: Missing) -> None:
    axes = _panel(figure, place, missing.title)
    axes.set_facecolor("#f3f4f6")
    axes.set_xticks([])
    axes.set_yticks([])
    words = textwrap.fill(textwrap.shorten(missing.why, 300), 28)
    style = {"ha": "center", "va": "center", "fontsize": _points(_WORDS), "color": INK, "parse_math": False}
    axes.text(0.5, 0.5, words, transform=axes.transAxes, **style)


def _panel(figure, place: tuple[int, int], title: str, below: str = ""):
    (x, y), (height, width) = _LAYOUT.at(*place), _LAYOUT.cell
    write(figure, _LAYOUT, below, x + width / 2, y - 22, _SMALL, color=FAINT, fit=width + 130)
    write(figure, _LAYOUT, title, x + width / 2, y - 52, _TITLE, weight="bold", fit=width + 130)
    axes = axes_at(figure, _LAYOUT, x, y, width, height)
    for edge in axes.spines.values():
        edge.set(color=LINE, linewidth=0.8)
    return axes


def _ticks(axis, labels: Sequence[str]) -> None:
    every = max(1, -(-len(labels) // _MOST_TICKS))
    places = range(0, len(labels), every)
    axis.set_ticks(list(places), labels=[labels[place] for place in places])
    axis.set_tick_params(labelsize=_points(_SMALL), colors=INK, length=3)


def _steps_label(vector: PathologyVector) -> str:
    first, last = float(vector.sigmas[0]), float(vector.sigmas[-1])
    levels = f"{first:.3g}" if vector.steps == 1 else f"{first:.3g} to {last:.3g}"
    return f"step (\N{GREEK SMALL LETTER SIGMA} {levels})"


def _points(size: int) -> float:
    """A font size in points for one in pixels."""
    return size * 72 / DPI


def _shortened(words: str, most: int) -> str:
    return words if len(words) <= most else f"{words[: most - 1]}…"
