"""The picture of `bench operators`: clean flips of every operator with every estimator, over all pairs and for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

from torch import Tensor

from benchmarks.evidence._operators import COMMON, ESTIMATORS, OPERATORS
from benchmarks.evidence._operators_numbers import LEAST_SSIM, MOST_DRIFT
from benchmarks.shared.sheet import pixels

COLUMNS = 3
DARK = 0.5  # below this share of the colour map, text is white
LABELS = {
    "mean difference, unpaired": "mean diff.\nunpaired", "mean difference, paired": "mean diff.\npaired*",
    "principal component": "principal\ncomponent", "lda": "LDA", "leace": "LEACE", "same state": "same\nstate",
}  # fmt: skip

Grid = Mapping[tuple[str, str], tuple[float | None, str]]  # by operator and estimator: the colour's value, and the text


def plot(record: Mapping[str, Any]) -> Tensor:
    """A heat map of the mean over pairs, and one for each pair, ``(3, H, W)``."""
    from matplotlib.figure import Figure

    grids = [("Mean of all pairs", mean_grid(record["ranking"]))] if len(record["pairs"]) > 1 else []
    grids += [
        (name.replace("->", "\N{RIGHTWARDS ARROW}"), pair_grid(record["ranking"], record["rows"], name))
        for name in record["pairs"]
    ]
    wide = min(COLUMNS, len(grids))
    high = -(-len(grids) // wide)
    figure = Figure(figsize=(1.2 + 5.2 * wide, 1.8 + 4.4 * high), dpi=100, layout="constrained")
    places = list(figure.subplots(high, wide, squeeze=False).flat)
    best = record["best"]["operator"], record["best"]["estimator"]
    image = None
    for axes, (title, grid) in zip(places, grids, strict=False):
        image = _panel(axes, title, grid, best)
    for axes in places[len(grids) :]:
        axes.axis("off")
    figure.colorbar(image, ax=figure.axes, shrink=0.6, label="share of accepted factuals whose flip is clean")
    title = "Clean flips by operator and estimator"
    about = "EndoPhantom, development seeds, its own judges"
    figure.suptitle(f"{title} ({about})" if wide > 1 else f"{title}\n{about}", size=15 if wide > 1 else 12)
    figure.supxlabel(fill(_note(record), 72 * wide), size=9.5, ha="left", x=0.01)
    return pixels(figure)


def _note(record: Mapping[str, Any]) -> str:
    return (
        f"Clean: flipped, and SSIM outside the finding at least {LEAST_SSIM:g} (colitis, which is diffuse: anatomy "
        f"drift at most {MOST_DRIFT:g}). Each at its own best strength for each kind of pair; in brackets the flip "
        f"rate; n = {record['settings']['n']} a pair. Orange frame: the best row. Hatched: no such combination. "
        "* also paired difference, and LEACE with operators other than affine: the same direction. "
        f"switch: both vectors against {COMMON}."
    )


def mean_grid(ranking: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], tuple[float | None, str]]:
    """The means over pairs."""
    return {(e["operator"], e["estimator"]): (e["clean_flip"], _text(e["clean_flip"], e["flip"])) for e in ranking}


def pair_grid(
    ranking: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], pair: str
) -> dict[tuple[str, str], tuple[float | None, str]]:
    """One pair's numbers, each at the strength that was best for its kind."""
    strengths = {(entry["operator"], entry["estimator"]): entry["strengths"] for entry in ranking}
    found = {}
    for row in rows:
        key = row["operator"], row["estimator"]
        if row["pair"] == pair and row["strength"] == strengths[key][row["kind"]]:
            found[key] = row["clean_flip"], _text(row["clean_flip"], row["flip"])
    return found


def _text(clean: float | None, flip: float | None) -> str:
    return "-" if clean is None or flip is None else f"{clean:.2f}\n({flip:.2f})"


def _panel(axes: Any, title: str, grid: Grid, best: tuple[str, str]) -> Any:
    from matplotlib.patches import Rectangle
    from numpy import full, nan

    values = full((len(OPERATORS), len(ESTIMATORS)), nan)
    for (operator, estimator), (value, text) in grid.items():
        y, x = OPERATORS.index(operator), ESTIMATORS.index(estimator)
        if value is not None:
            values[y, x] = value
        colour = "white" if value is not None and value < DARK else "black"
        axes.text(x, y, text, ha="center", va="center", size=8, color=colour, linespacing=1.05)
    whole = {"xy": (0, 0), "width": 1, "height": 1, "transform": axes.transAxes, "zorder": 0}
    axes.add_patch(Rectangle(**whole, facecolor="white", edgecolor="#d5d5d5", hatch="////", lw=0))
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    if best in grid:
        y, x = OPERATORS.index(best[0]), ESTIMATORS.index(best[1])
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, ec="#D55E00", lw=3, zorder=4))
    axes.set_xticks(range(len(ESTIMATORS)), [LABELS[name] for name in ESTIMATORS], size=8)
    axes.set_yticks(range(len(OPERATORS)), OPERATORS, size=9)
    axes.set_xticks([place + 0.5 for place in range(len(ESTIMATORS) - 1)], minor=True)
    axes.set_yticks([place + 0.5 for place in range(len(OPERATORS) - 1)], minor=True)
    axes.grid(which="minor", color="white", lw=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, size=11, weight="bold", loc="left")
    return image
