"""The sweep of real images as a picture: for each pair flips against nearness to the truth, a mark a setting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from benchmarks.evidence._real_methods import RECIPE
from medsteer_core.pictures.drawing import pixels

COLOURS = {
    "recipe": "#000000", "ours_prompt": "#d55e00", "ours_vector": "#cc79a7", "ours_both": "#e69f00",
    "sdedit": "#999999", "ddim_inversion": "#0072b2", "flowedit": "#009e73", "edit_friendly": "#56b4e9",
}  # fmt: skip


def plot(pairs: Mapping[str, Mapping[str, Any]]) -> Tensor:
    """A picture ``(3, height, width)``: filled marks are under the lock, hollow ones free."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows + 0.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for (name, pair), axis in zip(pairs.items(), axes, strict=False):
        for label, row in pair["methods"].items():
            method = label.split(" ")[0]
            if method == RECIPE:
                axis.scatter(row["flip"], row["psnr"], s=90, marker="*", color=COLOURS[method], zorder=5)
            elif method in COLOURS:
                face = COLOURS[method] if label.endswith(" lock") else "none"
                axis.scatter(row["flip"], row["psnr"], s=34, facecolor=face, edgecolor=COLOURS[method], alpha=0.8)
        axis.axhline(pair["methods"]["nothing"]["psnr"], color="#bbbbbb", linewidth=1, linestyle=":")
        axis.axvline(pair["methods"]["truth"]["flip"], color="#bbbbbb", linewidth=1, linestyle="--")
        axis.set(title=name, xlabel="flipped", ylabel="PSNR to the truth (dB)", xlim=(-0.03, 1.03))
    for axis in list(axes):
        axis.axis("off")
    marks = [
        figure.axes[0].scatter(
            [], [], color=colour, marker="*" if name == RECIPE else "o", label=name.replace("_", " ")
        )
        for name, colour in COLOURS.items()
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False, fontsize=9)
    figure.suptitle(
        "Filled: under the lock. Hollow: free. Dotted: the image as it is. Dashed: the truth's flips.", size=9
    )
    return pixels(figure)
