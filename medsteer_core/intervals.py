"""Intervals: Wilson's for rates, Newcombe's for differences of paired rates, the bootstrap's for all else."""

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


def newcombe(first: Sequence[bool], second: Sequence[bool]) -> tuple[float, float]:
    """95% interval of the difference of two shares over the same items, ``first`` minus ``second``.

    Newcombe's method 10 (Statistics in Medicine 17, 1998, 2635-2650): two Wilson intervals put together by the items'
    correlation. It has a width where no item differs, too. (-1, 1) of nothing.
    """
    if len(first) != len(second):
        raise MedSteerError(f"newcombe got {len(first)} and {len(second)} items; as many of both were expected.")
    n = len(first)
    if n == 0:
        return -1.0, 1.0
    pairs = [(bool(a), bool(b)) for a, b in zip(first, second, strict=True)]
    both, one, other, none = (
        pairs.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False))
    )
    p, q = (both + one) / n, (both + other) / n
    (p_low, p_high), (q_low, q_high) = wilson(both + one, n), wilson(both + other, n)
    spread = (both + one) * (other + none) * (both + other) * (one + none)
    crossed = both * none - one * other
    if crossed > 0:  # the paper's continuity correction, for items that go together only
        crossed = max(crossed - n / 2, 0.0)
    phi = crossed / math.sqrt(spread) if spread else 0.0

    def reach(toward: float, away: float) -> float:
        return math.sqrt(max(toward**2 - 2 * phi * toward * away + away**2, 0.0))

    return p - q - reach(p - p_low, q_high - q), p - q + reach(p_high - p, q - q_low)


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
