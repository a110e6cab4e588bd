"""The picture of `bench downstream`: AUC of every arm and detector with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.evidence._arms import ARMS, COUNTERFACTUAL, NOTHING, REPROMPTED, TRUE


def plot(record: Mapping[str, Any], pooled: str, key: str) -> Tensor:
    """Dots with intervals, one line an arm: ``(3, height, width)``. Writes out the difference ``key`` of ``pooled``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.4), dpi=120, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.24, 0.26, 0.72, 0.52))
    words = {
        NOTHING: "nothing",
        REPROMPTED: "re-prompted images",
        COUNTERFACTUAL: "counterfactual pairs",
        TRUE: "true rendered pairs\n(ceiling)",
    }
    # two colours and two shapes that stay apart for every kind of colour blindness and in grey
    styles = {"CNN": ("#c2571a", "o", -0.14), "ViT": ("#4b3f8f", "s", 0.14)}
    for name, (colour, marker, shift) in styles.items():
        cells = [record["detectors"][name]["auc"][arm] for arm in ARMS]
        for place, cell in enumerate(cells):
            (low, high), y = cell["interval"], place + shift
            axes.plot((low, high), (y, y), color=colour, linewidth=2.2, solid_capstyle="butt")
            beside = (0, 7 if shift < 0 else -7)
            axes.annotate(f"{cell['auc']:.3f}", (cell["auc"], y), beside, textcoords="offset points", ha="center",
                          va="bottom" if shift < 0 else "top", fontsize=8, color=colour)  # fmt: skip
        places = [place + shift for place in range(len(ARMS))]
        areas = [cell["auc"] for cell in cells]
        axes.plot(areas, places, marker, color=colour, markersize=7, label=f"small {name}")
    axes.set_yticks(range(len(ARMS)), [words[arm] for arm in ARMS])
    axes.set_ylim(len(ARMS) - 0.5, -0.6)
    lowest = min(cell["interval"][0] for name in styles for cell in record["detectors"][name]["auc"].values())
    axes.set_xlim(min(0.5, lowest - 0.02), 1.02)
    axes.grid(axis="x", color="#dfe3e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for edge in ("top", "right", "left"):
        axes.spines[edge].set_visible(False)
    axes.set_xlabel("AUC on unconfounded test renders (bar: 95% interval; 0.5: guessing, 1: perfect)")
    axes.legend(loc="lower right", bbox_to_anchor=(1.02, 0.98), ncols=2, frameon=False)
    design, gain = record["design"], record["detectors"][pooled]["differences"][key]
    figure.text(0.02, 0.94, "Polyp detectors: what added images do for a small, biased training set", fontsize=12.5)
    trainings = f"mean of {len(record['seeds']['training'])} trainings"
    about = f"{design['real']} confounded renders, alone or with {design['images_added']} images added; {trainings}"
    figure.text(0.02, 0.88, about, fontsize=9, color="#5b636b")
    summary = f"Counterfactual minus re-prompted, both detectors: {gain['difference']:+.3f} AUC"
    low, high = gain["interval"]
    figure.text(0.02, 0.075, f"{summary}, 95% interval {low:+.3f} to {high:+.3f}", fontsize=9.5)
    figure.text(
        0.02, 0.025, "Synthetic phantoms only: this says nothing about patients.", fontsize=8.5, color="#5b636b"
    )
    canvas.draw()
    pixels = torch.from_numpy(np.asarray(canvas.buffer_rgba()).copy())
    return pixels[..., :3].movedim(-1, 0).float() / 255
