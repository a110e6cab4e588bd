"""The picture of `bench samples`: stability and flip rate of each noise mode against the number of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from benchmarks.evidence._stability import NOISES, PAIRED, PRESET_OF, SAME_STATE, UNPAIRED
from benchmarks.shared.sheet import pixels

# Okabe and Ito's colours, each with a marker and a dash of its own, so that colour alone never has to tell.
STYLES = {
    PAIRED: ("#0072B2", "o", "-"),
    UNPAIRED: ("#D55E00", "s", (0, (5, 2))),
    SAME_STATE: ("#009E73", "^", (0, (5, 1.5, 1, 1.5))),
}
PRESETS = {"medsteer": "MedSteer preset", "ours": "our preset"}
RECOMMENDED = ("recommended", "recommended_same_state")
SHIFT = 0.09  # octaves from one mode's bars to the next one's, so that they do not hide each other


def plot(record: Mapping[str, Any]) -> Tensor:
    """A row for each pair: stability on the left, flip rate on the right, both against samples. ``(3, H, W)``."""
    from matplotlib.figure import Figure

    pairs, choices = record["pairs"], [record[name] for name in RECOMMENDED]
    figure = Figure(figsize=(10.6, 1.7 + 3.1 * len(pairs)), dpi=110, layout="constrained")
    cells_of_all = [cell for modes in pairs.values() for cells in modes.values() for cell in cells.values()]
    lowest = min(cell["stability_range"][0] for cell in cells_of_all)
    for (left, right), (name, modes) in zip(figure.subplots(len(pairs), 2, squeeze=False), pairs.items(), strict=True):
        name = name.replace("->", "\N{RIGHTWARDS ARROW}")
        for noise, cells in modes.items():
            _line(left, noise, cells, "stability", "stability_range")
            _line(right, noise, cells, "flip", "flip_ci")
        _frame(left, modes, choices, f"{name}: do extractions agree?", "cosine (same state: maps)")
        _frame(right, modes, choices, f"{name}: do they flip?", "flip rate")
        left.set_ylim(lowest - 0.04, 1.015)
        right.set_ylim(-0.03, 1.03)
    title = "Extraction samples and noise (EndoPhantom, judged by its own judges)"
    figure.suptitle(title, size=13)
    repeats = len(next(iter(record["seeds"]["extraction"].values())))
    figure.legend(*_key(choices, record["settings"]["n"], repeats), loc="outside lower center", ncols=3,
                  frameon=False, fontsize=9)  # fmt: skip
    return pixels(figure)


def _place(n: str | int, noise: str) -> float:
    """Where a mode's number of samples is on the axis."""
    return int(n) * 2 ** (SHIFT * (NOISES.index(noise) - 1))


def _line(axes: Any, noise: str, cells: Mapping[str, Mapping[str, Any]], key: str, interval: str) -> None:
    """A mode's line, with a bar at each number of samples; unknown numbers are left out."""
    colour, marker, dash = STYLES[noise]
    known = [(_place(n, noise), cell) for n, cell in cells.items() if cell[key] is not None]
    x, y = [place for place, _ in known], [cell[key] for _, cell in known]
    axes.plot(x, y, color=colour, marker=marker, ls=dash, lw=1.4, ms=6, mec="white", mew=0.8, zorder=3)
    for place, cell in known:
        axes.plot((place, place), cell[interval], color=colour, lw=1.3, alpha=0.6, solid_capstyle="butt", zorder=2)


def _frame(axes: Any, modes: Mapping[str, Any], choices: Sequence[Mapping[str, Any]], title: str, what: str) -> None:
    counts = [int(n) for n in modes[PAIRED]]
    axes.set_xscale("log", base=2)
    axes.set_xlim(counts[0] * 2**-0.4, counts[-1] * 2**0.4)
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    for choice in choices:
        noise = choice["noise"]
        axes.axvline(_place(choice["samples"], noise), color=STYLES[noise][0], ls=":", lw=1.6, alpha=0.8, zorder=1)
    axes.set_title(title, size=11, weight="bold", loc="left")
    axes.set_xlabel("samples (paired, unpaired: of each prompt; same state: in all)", size=9)
    axes.set_ylabel(what)
    axes.grid(axis="y", color="#e3e6e9", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _key(choices: Sequence[Mapping[str, Any]], n: int, repeats: int) -> tuple[list, list[str]]:
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], color=c, marker=m, ls=d, lw=1.4, ms=6, mec="white") for c, m, d in STYLES.values()]
    marks += [Line2D([], [], color="#444444", marker="|", ls="none", ms=11)] * 2
    marks.append(Line2D([], [], color="#444444", ls=":", lw=1.6))
    names = [f"{noise} noise, {PRESETS[PRESET_OF[noise]]}" for noise in STYLES]
    names += [f"bar, left: lowest to highest of {repeats * (repeats - 1) // 2} couples",
              f"bar, right: 95% interval, {repeats} vectors of {n} images"]  # fmt: skip
    names.append("recommended: " + ", ".join(f"{choice['samples']} {choice['noise']}" for choice in choices))
    return marks, names
