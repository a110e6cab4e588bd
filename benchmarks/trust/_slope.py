"""Does a number grow from run to run? A line through it, with an interval that allows for neighbours being alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
BLOCK = 2  # cycles


@dataclass(frozen=True)
class Slope:
    """Change a run: ordinary least squares, and the middle 95% of a moving block bootstrap."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return {"slope": self.value, "interval": [self.low, self.high]}


def slope_of(readings: Sequence[float], period: int, block: int = BLOCK, seed: int = 0) -> Slope:
    """The slope of a reading after every run, where the kinds of runs take turns with this ``period``.

    The line has a level of its own for every kind. Its residuals are drawn anew in blocks of whole cycles that stand
    next to each other (Kuensch 1989), 2000 times: what one run leaves behind stays for some, so the residuals are no
    independent draws. Raises ValueError for fewer than two blocks.
    """
    cycles = len(readings) // period
    if cycles < 2 * block:
        raise ValueError(f"{len(readings)} runs are {cycles} cycles of {period}; at least {2 * block} are wanted")
    values = np.asarray(readings[: cycles * period], dtype=float).reshape(cycles, period)
    runs = np.arange(cycles * period, dtype=float).reshape(cycles, period)
    apart = runs - runs.mean(0)

    def fitted(numbers: np.ndarray) -> np.ndarray:  # (..., cycles, period) -> (...)
        return (apart * numbers).sum((-2, -1)) / (apart**2).sum()

    slope = float(fitted(values))
    residuals = values - values.mean(0) - slope * apart
    picks = np.random.default_rng(seed).integers(0, cycles - block + 1, (RESAMPLES, -(-cycles // block)))
    rows = (picks[..., None] + np.arange(block)).reshape(RESAMPLES, -1)[:, :cycles]
    low, high = np.quantile(slope + fitted(residuals[rows]), (0.025, 0.975))
    return Slope(slope, float(low), float(high))
