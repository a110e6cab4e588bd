"""Where in the noise schedule we are. Everything is indexed by sigma, never by a count of model calls,
so that a vector recorded with one sampler and step count steers any other."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import MedSteerError


def interpolate_index(sigmas: Sequence[float], sigma: float, flow: bool = False) -> tuple[int, int, float]:
    """Find `sigma` between the recorded `sigmas` (strictly descending, > 0; a list or a 1-D tensor).

    Returns `(lo, hi, weight)`: mix step `lo` by `1 - weight` and step `hi` by `weight`. The weight is linear in
    log sigma for diffusion models and in sigma itself for `flow` models. Outside the recorded range the nearest step
    stands alone; a recorded sigma gives weight 0. Raises MedSteerError for a sigma that is not positive and finite.
    """
    sigma = float(sigma)
    if not (math.isfinite(sigma) and sigma > 0):
        raise MedSteerError(f"Sigma is {sigma}; a positive finite number was expected. Skip the schedule's final zero.")
    known = sigmas.tolist() if hasattr(sigmas, "tolist") else list(sigmas)
    if not known:
        raise MedSteerError("There are no recorded sigmas to look in; at least one was expected.")
    # The first step that is not noisier than `sigma`; bisect wants ascending keys, hence the signs.
    hi = bisect_left(known, -sigma, key=lambda value: -value)
    if hi == len(known):
        return hi - 1, hi - 1, 0.0
    if hi == 0 or known[hi] == sigma:
        return hi, hi, 0.0
    above, here, below = (known[hi - 1], sigma, known[hi]) if flow else map(math.log, (known[hi - 1], sigma, known[hi]))
    return hi - 1, hi, (above - here) / (above - below)


@dataclass(frozen=True)
class SigmaWindow:
    """The noise levels at which a steering acts: `start_sigma >= sigma > end_sigma`.

    Half open, so that of two adjacent windows exactly one holds the sigma between them.
    """

    start_sigma: float = math.inf
    end_sigma: float = 0.0

    def __post_init__(self) -> None:
        if not self.start_sigma >= self.end_sigma >= 0:  # also false for NaN
            raise MedSteerError(
                f"The window goes from sigma {self.start_sigma} to {self.end_sigma}; sampling goes from high to low, "
                "so the start must be at least the end, and the end at least 0. Swap start and end."
            )

    def __contains__(self, sigma: float) -> bool:
        return self.start_sigma >= sigma > self.end_sigma

    def any_of(self, sigmas: Iterable[float]) -> bool:
        """Whether any of `sigmas` lies in the window."""
        return any(float(sigma) in self for sigma in sigmas)


@dataclass(frozen=True)
class StrengthCurve:
    """What a steering's strength is multiplied with over its window: ``gains`` at ``sigmas``.

    The sigmas are strictly descending and above 0. Between two of them the gain goes linearly in log sigma (in sigma
    for ``flow`` models), beyond them the end stands.
    """

    sigmas: tuple[float, ...]
    gains: tuple[float, ...]
    flow: bool = False

    def at(self, sigma: float) -> float:
        """The gain at a noise level."""
        lo, hi, weight = interpolate_index(self.sigmas, sigma, self.flow)
        return self.gains[lo] * (1 - weight) + self.gains[hi] * weight


CONSTANT = "constant"
# A curve's gain at a share of the window, 0 where steering begins and 1 where it ends.
CURVES: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {
        CONSTANT: lambda share: 1.0,
        "fade in": lambda share: share,
        "fade out": lambda share: 1.0 - share,
        "bell": lambda share: math.sin(math.pi * share),
    }
)


def check_percent(start: float, end: float) -> None:
    """Raise MedSteerError unless `0 <= start <= end <= 1` (shares of the sampling range, as on the Steer node)."""
    if not 0 <= start <= end <= 1:  # also false for NaN
        raise MedSteerError(
            f"start_percent is {start} and end_percent is {end}; 0 <= start_percent <= end_percent <= 1 was expected. "
            "0 is the start of sampling (pure noise), 1 its end."
        )
