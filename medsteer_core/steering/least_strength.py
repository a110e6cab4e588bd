"""The least strength that does it, found by asking at one strength after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Tried = tuple[float, bool]  # a multiple of the strength, and whether it did it

BEGIN, GROWTH = 1.0, 1.5  # first Steer's own strength; how much more is tried while that is too little
WEAKEST = 0.125  # the least that is tried where none did it
CLOSE = 0.05  # of the strength: nearer than that to one that is too weak is near enough


@dataclass(frozen=True)
class Found:
    """What was tried of one image, in order, and what was found: the least multiple that did it, None where none."""

    tried: tuple[Tried, ...]

    @property
    def least(self) -> float | None:
        return min((multiple for multiple, did in self.tried if did), default=None)

    @property
    def strongest_too_weak(self) -> float:
        """The largest multiple below the least that did it; 0 where there is none."""
        least = self.least
        weak = [multiple for multiple, did in self.tried if not did and (least is None or multiple < least)]
        return max(weak, default=0.0)


def next_multiple(tried: Sequence[Tried], most: float) -> float | None:
    """What to try next of multiples up to ``most``; None where nothing is left to try.

    Until one does it the strength grows, and where even the most does not, it is halved: the first may have been too
    much. Then the gap between the least that did it and the strongest below that did not is halved, until it is
    `CLOSE`.
    """
    found = Found(tuple(tried))
    if not tried:
        return min(BEGIN, most)
    low = found.strongest_too_weak
    if (high := found.least) is None:
        least = min(multiple for multiple, _ in tried)
        if low < most:
            return min(low * GROWTH, most)
        return least / 2 if least / 2 >= WEAKEST else None
    return (low + high) / 2 if high - low > CLOSE * high else None
