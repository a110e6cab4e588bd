"""Flip rate against structure over a method's parameter: which curve dominates which, and the plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from benchmarks.evidence._methods import RECIPE
from benchmarks.shared.sheet import pixels

Point = tuple[float, float]  # (structure, flip rate), both better when larger
EPSILON = 1e-9

# Okabe and Ito's colours, and a marker each, so that neither alone has to tell the methods apart.
STYLES = {
    "recipe": ("#D55E00", "*"),
    "vector": ("#D55E00", "o"),
    "both": ("#8B3A00", "P"),
    "calibrated": ("#F5B041", "X"),
    "prompt_switch": ("#000000", "v"),
    "prompt_switch_lock": ("#555555", "h"),
    "prompt_switch_calibrated": ("#999999", "p"),
    "medsteer": ("#E69F00", "s"),
    "polypsteer": ("#CC79A7", "D"),
    "sdedit": ("#0072B2", "^"),
    "ddim_inversion": ("#009E73", "<"),
    "pnp": ("#56B4E9", ">"),
}
CONTROL_STYLES = {"random_direction": "x", "other_vector": "+"}
LABELS = {
    "recipe": "our recipe", "vector": "steering", "both": "steering and the prompt",
    "calibrated": "our recipe, least strength an image",
    "prompt_switch": "prompt switch", "prompt_switch_lock": "prompt switch under a lock",
    "prompt_switch_calibrated": "the same, latest start an image",
    "medsteer": "MedSteer preset", "polypsteer": "PolypSteer preset", "sdedit": "SDEdit",
    "ddim_inversion": "DDIM inversion", "pnp": "Plug-and-Play",
    "random_direction": "control: random direction", "other_vector": "control: another vector",
}  # fmt: skip


def points(curve: Sequence[Mapping[str, Any]], diffuse: bool) -> list[Point]:
    """A curve's points in the order of its parameter; those without a number are left out.

    Structure is SSIM outside the findings or, for a diffuse pair, minus the anatomy drift.
    """
    key, sign = ("anatomy_drift", -1.0) if diffuse else ("ssim_outside", 1.0)
    return [(sign * p[key], p["flip"]) for p in curve if p[key] is not None and p["flip"] is not None]


def front(some: Sequence[Point]) -> list[Point]:
    """The points that no other is as good as in one coordinate and better than in the other, by structure."""
    return sorted({one for one in some if not any(dominates([other], [one]) for other in some)})


def dominates(one: Sequence[Point], other: Sequence[Point]) -> bool | None:
    """Whether curve ``one`` dominates curve ``other``.

    It does when for every point of ``other`` there is a point of ``one``, or one on the line between two neighbouring
    points of ``one``, that is at least as good in both coordinates and strictly better in at least one. None when
    either curve has no point.
    """
    if not one or not other:
        return None
    lines = list(zip(one, one[1:], strict=False)) or [(one[0], one[0])]
    return all(any(_line_beats(a, b, point) for a, b in lines) for point in other)


def _line_beats(a: Point, b: Point, point: Point) -> bool:
    """Whether some point of the line from ``a`` to ``b`` is as good as ``point`` in both coordinates, better in one.

    Where it is as good in one coordinate is an interval of the line; both are, in the intersection. The coordinates
    are linear, so if any point there is strictly better, an end of the intersection is.
    """
    first, last = 0.0, 1.0
    for start, end, wanted in zip(a, b, point, strict=True):
        slope = end - start
        if abs(slope) < EPSILON:
            if max(start, end) < wanted - EPSILON:
                return False
        elif slope > 0:
            first = max(first, (wanted - start) / slope)
        else:
            last = min(last, (wanted - start) / slope)
    if first > last + EPSILON:
        return False
    ends = [[start + t * (end - start) for start, end in zip(a, b, strict=True)] for t in (first, last)]
    return any(value > wanted + EPSILON for end in ends for value, wanted in zip(end, point, strict=True))


def plot(pairs: Mapping[str, Mapping[str, Any]]) -> Tensor:
    """The record's ``pairs`` as small multiples; a picture ``(3, height, width)``."""
    from matplotlib.figure import Figure

    columns = min(3, len(pairs) + 1)
    rows = -(-(len(pairs) + 1) // columns)
    figure = Figure(figsize=(4.6 * columns, 4.1 * rows), dpi=110, layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, record) in zip(cells, pairs.items(), strict=False):
        _panel(axes, name, record)
    for axes in cells[len(pairs) :]:
        axes.axis("off")
    _key(cells[len(pairs)])
    split = next(iter(pairs.values()))["split"]
    figure.suptitle(f"Flip rate against kept structure, {split} seeds, EndoPhantom (up and right is better)", size=13)
    return pixels(figure)


def _panel(axes: Any, name: str, record: Mapping[str, Any]) -> None:
    diffuse, methods = record["diffuse"], record["methods"]
    key = "anatomy_drift" if diffuse else "ssim_outside"
    for method, (colour, marker) in STYLES.items():
        if method in methods:
            style = {"color": colour, "marker": marker, "zorder": 4 if method == RECIPE else 3}
            tried = points(methods[method]["curve"], diffuse)
            for some, line in ((tried, "none"), (front(tried), "-")):
                if some:
                    xs, ys = zip(*((abs(x), y) for x, y in some), strict=True)
                    axes.plot(xs, ys, ls=line, lw=1.2, ms=3.5, alpha=0.9 if line == "-" else 0.4, **style)
            if (head := methods[method])[key] is not None and head["flip"] is not None:
                style["zorder"] += 4
                axes.plot(head[key], head["flip"], ms=11, mec="white", mew=1.4, ls="none", **style)
    for method, marker in CONTROL_STYLES.items():
        if (head := methods.get(method)) and head[key] is not None and head["flip"] is not None:
            axes.plot(head[key], head["flip"], marker, color="#777777", ms=8, mew=2, zorder=5)
    axes.axvline(record["ceiling"][key], color="#777777", ls=":", lw=1.5, zorder=1)
    axes.set_ylim(-0.05, 1.05)
    axes.set_ylabel("flip rate")
    axes.set_xlabel("anatomy drift (held-out errors; less is better)" if diffuse else "SSIM outside the finding")
    if diffuse:
        axes.invert_xaxis()
    axes.grid(color="#e3e6e9", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(name.replace("->", "\N{RIGHTWARDS ARROW}"), size=11, weight="bold")


def _key(axes: Any) -> None:
    """The legend, in a cell of its own."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=c, marker=m, lw=1.2, ms=6) for c, m in STYLES.values()]
    names = [LABELS[name] for name in STYLES]
    for control, marker in CONTROL_STYLES.items():
        lines.append(Line2D([], [], color="#777777", marker=marker, ls="none", ms=8, mew=2))
        names.append(LABELS[control])
    lines.append(Line2D([], [], color="#777777", ls=":", lw=1.5))
    names.append("ceiling: same anatomy, new sensor noise")
    lines.append(Line2D([], [], color="#444444", marker="o", ls="none", ms=10))
    names.append("large: the reported setting; line: the best of a method's settings")
    axes.legend(lines, names, loc="center", frameon=False, fontsize=10)
