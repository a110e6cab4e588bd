"""Which task is next, and what becomes of one that went wrong."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from .plan import Limits
from .worker import CRASH, DONE, FAULT

AGAIN, POISON = "again", "poison"


class Ledger:
    """The tasks that are left, by group: tasks of a group share their vector, so a worker stays with its group."""

    def __init__(self, left: Iterable[tuple[int, int]], limits: Limits) -> None:
        """left: (index, group) of every task to do, in order."""
        self._limits = limits
        self._waiting: dict[int, deque[int]] = {}
        for index, group in left:
            self._waiting.setdefault(group, deque()).append(index)
        self._working: Counter[int] = Counter()  # group -> workers at it
        self._group: dict[int, int] = {}
        self._faults: Counter[int] = Counter()
        self._crashes: Counter[int] = Counter()
        self.done = self.retries = self.poisoned = 0

    def take(self, last_group: int | None) -> int | None:
        """The next task's index for a worker whose last task was of `last_group`; None when none waits."""
        if not self._waiting:
            return None
        group = last_group
        if group not in self._waiting:
            # Where the fewest workers are, so that workers divide the vectors among them.
            group = min(self._waiting, key=lambda g: (self._working[g], g))
        index = self._waiting[group].popleft()
        if not self._waiting[group]:
            del self._waiting[group]
        self._working[group] += 1
        self._group[index] = group
        return index

    def settle(self, index: int, kind: str) -> str:
        """Note how a taken task ended; returns `DONE`, `AGAIN` or `POISON`."""
        group = self._group.pop(index)
        self._working[group] -= 1
        if kind == DONE:
            self.done += 1
            return DONE
        self._faults[index] += kind == FAULT
        self._crashes[index] += kind == CRASH
        if self._faults[index] > self._limits.retries or self._crashes[index] > self._limits.crashes:
            self.poisoned += 1
            return POISON
        self.retries += 1
        self._waiting.setdefault(group, deque()).append(index)
        return AGAIN

    @property
    def waiting(self) -> int:
        """How many tasks nobody has."""
        return sum(map(len, self._waiting.values()))

    @property
    def over(self) -> bool:
        """Whether every task is done or set aside."""
        return not self._waiting and not self._group
