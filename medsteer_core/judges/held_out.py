"""What a judge was worth on images that it had not seen: whether it can be told from guessing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GUESSES = "This judge can't be told from guessing"  # how the doubt begins
METRICS = "metrics.json"  # what the training leaves beside judge.json


def doubt_of(folder: Path) -> str:
    """A warning for a judge whose held-out accuracy may be chance, by the metrics in its folder; "" where none is due.

    Chance is what always naming the most frequent class of the held-out images gives. Metrics that are not there, or
    are of another form, say nothing.
    """
    try:
        metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    return about(metrics) if isinstance(metrics, dict) else ""


def about(metrics: Mapping[str, Any]) -> str:
    """The same of metrics as the training writes them."""
    try:
        low, high = (float(value) for value in metrics["accuracy_interval"])
        counts = [int(count) for count in metrics["class_images"]["test"].values()]
        accuracy, chance = float(metrics["accuracy"]), max(counts) / sum(counts)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        return ""
    if not all(map(math.isfinite, (low, high, accuracy))) or low > chance:
        return ""
    return (
        f"{GUESSES}: accuracy {accuracy:.2f} [{low:.2f}, {high:.2f}] on {sum(counts)} "
        f"held-out images, where always naming the most frequent class gives {chance:.2f}. Its word is worth little; "
        "train it on more images, or for longer."
    )
