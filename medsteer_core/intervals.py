"""Intervals of shares and means: Wilson's for rates, the bootstrap's for everything else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch

from .errors import MedSteerError

_RESAMPLES = 2000
_AT_ONCE = 1 << 22  # values of the resamples that are held together


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927): of ``successes`` in ``n``. (0, 1) for n = 0."""
    if not 0 <= successes <= n or not 0 < confidence < 1:
        raise MedSteerError(
            f"wilson got {successes} successes of {n} at confidence {confidence}; expected 0 <= successes <= n and a "
            "confidence between 0 and 1."
        )
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, scale = successes / n, 1 + z * z / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # at the ends the interval touches 0 and 1 exactly; rounding must not leave it a hair short
    low = 0.0 if successes == 0 else (middle - half) / scale
    return low, 1.0 if successes == n else (middle + half) / scale


def bootstrap(values: Sequence[float]) -> tuple[float, float] | None:
    """95% percentile interval of the mean (Efron 1979), resampled 2000 times with a fixed seed; None of nothing."""
    if not values:
        return None
    generator, given = torch.Generator().manual_seed(0), torch.tensor(values, dtype=torch.float64)
    # The generator goes on from part to part, so that parts draw what the whole would.
    parts = torch.arange(_RESAMPLES).split(max(1, _AT_ONCE // len(values)))
    means = torch.cat(
        [given[torch.randint(len(values), (len(part), len(values)), generator=generator)].mean(1) for part in parts]
    )
    return tuple(means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist())
