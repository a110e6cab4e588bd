"""Runs a plan: gives tasks to workers until each is done or set aside, whoever dies meanwhile.

What is done stands in the output and nowhere else, so the same command goes on after the driver itself was killed.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from ..dataset.pair_dataset import PairDataset
from ..errors import MedSteerError
from .ledger import POISON, Ledger
from .pool import WorkerLost
from .tasks import Tasks
from .worker import CRASH, DONE, OUTPUT, START, Outcome

FAILED, FINISHED = "failed", "tasks"
# A worker that can't begin is let go after so many bad points in a row: 2 for a ComfyUI that would not start, 1 for a
# worker that was lost.
MOST_BAD = 6
HANGING = 120.0  # seconds over all limits after which a worker that says nothing is taken for dead
INDEX_EVERY = 300.0


class RunFailed(MedSteerError):
    """The run can't go on; what was made stays."""


@dataclass
class Progress:
    """Where a run stands. Pairs are those of this run; `found` were there before."""

    tasks: int
    found: int
    aside: int
    workers: int
    ready: int = 0
    done: int = 0
    pairs: int = 0
    retries: int = 0
    poison: int = 0
    lost: int = 0
    starts: int = 0
    begun: float = field(default_factory=time.monotonic)
    took: float = 0.0  # seconds of the whole run, once it is over
    working: float = 0.0  # of them, from the first task's beginning to the last one's end
    seconds: Counter = field(default_factory=Counter)
    busy: dict[int, float] = field(default_factory=dict)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begun

    @property
    def over(self) -> int:
        """Tasks that need no more work."""
        return self.found + self.aside + self.done + self.poison


@dataclass
class _Slot:
    """The place of one worker: who has it now, and what it does."""

    number: int
    worker: Any
    reference: Any
    index: int | None = None  # of its task; None while it starts
    since: float = field(default_factory=time.monotonic)
    group: int | None = None
    bad: int = 0


class Driver:
    """One run of a plan's tasks on a pool of workers."""

    def __init__(
        self,
        tasks: Tasks,
        dataset: PairDataset,
        pool: Any,
        report: Callable[[Progress], None] = lambda _: None,
        say: Callable[[str], None] = print,
        retry_failed: bool = False,
        index: bool = True,
    ) -> None:
        self.tasks, self.dataset, self.pool, self.report, self.say = tasks, dataset, pool, report, say
        self.limits = tasks.plan.limits
        finished = self._ids(FINISHED)
        aside = set() if retry_failed else self._ids(FAILED) - finished
        left, found, skipped = [], 0, 0
        for number in range(len(tasks)):
            task_id = tasks.id_of(number)
            found += task_id in finished
            skipped += task_id in aside
            if task_id not in finished and task_id not in aside:
                left.append((number, tasks.group_of(number)))
        self.ledger = Ledger(left, self.limits)
        self.progress = Progress(len(tasks), found, skipped, 0)
        self.index, self._indexing, self._index_at = index, None, time.monotonic() + INDEX_EVERY
        self._output_failures = 0

    def run(self) -> Progress:
        """Run until every task is done or set aside. Raises RunFailed when nothing can go on."""
        slots: list[_Slot] = []
        self.progress.begun = time.monotonic()
        first = None
        try:
            self.progress.workers = min(self.pool.workers, max(1, self.ledger.waiting))
            if not self.ledger.over:
                slots += [self._started(number) for number in range(self.progress.workers)]
            while not self.ledger.over:
                self._step(slots)
                first = first or next((slot.since for slot in slots if slot.index is not None), None)
        except BaseException:
            for slot in slots:
                self.pool.end(slot.worker)
            raise
        self.progress.working = time.monotonic() - first if first else 0.0
        for slot in slots:
            self.pool.end(slot.worker, grace=15.0)
        self._finish_index()
        self.progress.took = self.progress.elapsed
        return self.progress

    def _step(self, slots: list[_Slot]) -> None:
        """Wait for something to happen, and answer it."""
        if not slots:
            raise RunFailed("No worker is left that could run ComfyUI; see the errors above. What was made stays.")
        by_reference = {slot.reference: slot for slot in slots if slot.reference is not None}
        for reference in self.pool.wait(list(by_reference), 1.0):
            self._answer(by_reference[reference], slots)
        for slot in slots:
            if slot.reference is None:
                self._give(slot)
            elif slot.index is not None and time.monotonic() - slot.since > self._longest():
                self._replace(slot, slots, "it did not answer any more")
        self.progress.ready = sum(slot.index is not None or slot.reference is None for slot in slots)
        self.progress.retries, self.progress.poison = self.ledger.retries, self.ledger.poisoned
        self.report(self.progress)
        if self.index and time.monotonic() > self._index_at:
            self._index_in_background()

    def _longest(self) -> float:
        return self.limits.start + self.limits.timeout + HANGING

    def _started(self, number: int) -> _Slot:
        worker = self.pool.start()
        return _Slot(number, worker, self.pool.ready(worker))

    def _give(self, slot: _Slot) -> None:
        """Give a free worker its next task, if there is one."""
        index = self.ledger.take(slot.group)
        if index is None:
            return
        slot.index, slot.group, slot.since = index, self.tasks.group_of(index), time.monotonic()
        slot.reference = self.pool.submit(slot.worker, self.tasks[index])

    def _answer(self, slot: _Slot, slots: list[_Slot]) -> None:
        try:
            outcome = self.pool.result(slot.reference)
        except WorkerLost as error:
            self._replace(slot, slots, str(error))
            return
        slot.reference = None
        if slot.index is not None:
            index, slot.index = slot.index, None
            self._settle(slot, index, outcome, slots)
        if slot in slots:
            self._give(slot)

    def _settle(self, slot: _Slot, index: int, outcome: Outcome, slots: list[_Slot]) -> None:
        """Note how a task ended."""
        self.progress.starts += outcome.starts
        self.progress.seconds.update(outcome.seconds)
        self.progress.busy[slot.number] = self.progress.busy.get(slot.number, 0.0) + outcome.seconds.get("all", 0.0)
        if outcome.kind == DONE:
            slot.bad = self._output_failures = 0
            self.progress.done += 1
            self.progress.pairs += outcome.new
        elif outcome.kind == OUTPUT:
            self._output_failures += 1
            if self._output_failures > (2 if "://" in self.dataset.root else 0):
                raise RunFailed(f"The pairs can't be written. {outcome.error}")
        decision = self.ledger.settle(index, outcome.kind)
        if decision == POISON:
            self._set_aside(index, outcome)
        elif outcome.kind != DONE:
            self.say(f"task {self.tasks.id_of(index)} is tried again ({outcome.kind}): {outcome.error}")
        if outcome.kind == START:
            slot.bad += 2
            if slot.bad >= MOST_BAD:
                self._let_go(slot, slots, outcome.error)

    def _set_aside(self, index: int, outcome: Outcome) -> None:
        """Write down a poison task: what it was and why it failed."""
        task = self.tasks[index]
        data = {"task_id": task.task_id, "kind": outcome.kind, "error": outcome.error, "seed": task.seed,
                "workflow": task.workflow}  # fmt: skip
        with self._writing():
            text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
            self.dataset.store.write_whole(f"{FAILED}/{task.task_id}.json", text.encode(errors="replace"))
        self.say(f"task {task.task_id} is set aside in {FAILED}/{task.task_id}.json: {outcome.error}")

    def _replace(self, slot: _Slot, slots: list[_Slot], why: str) -> None:
        """A worker is lost: its task goes back, and a new worker takes its place."""
        self.pool.end(slot.worker)
        self.progress.lost += 1
        index, slot.index, slot.reference = slot.index, None, None
        slot.bad += 1
        if index is not None and self.ledger.settle(index, CRASH) == POISON:
            self._set_aside(index, Outcome(CRASH, f"its worker was lost again and again; the last time: {why}"))
        self.say(f"worker {slot.number + 1} was lost ({why}); a new one takes its place")
        if slot.bad >= MOST_BAD:
            self._let_go(slot, slots, why)
        else:
            fresh = self._started(slot.number)
            slot.worker, slot.reference = fresh.worker, fresh.reference

    def _let_go(self, slot: _Slot, slots: list[_Slot], why: str) -> None:
        self.pool.end(slot.worker)
        slots.remove(slot)
        self.say(f"worker {slot.number + 1} can't begin and is let go: {why}")

    def _ids(self, folder: str) -> set[str]:
        with self._writing("read"):
            return {PurePosixPath(name).stem for name in self.dataset.store.list(folder)}

    def _index_in_background(self) -> None:
        """Write the index beside the scheduling: of a million pairs it takes minutes."""
        if self._indexing is None or not self._indexing.is_alive():
            self._indexing = threading.Thread(target=self._write_index_quietly, daemon=True)
            self._indexing.start()

    def _write_index_quietly(self) -> None:
        begun = time.monotonic()
        try:
            self.dataset.write_index(self.tasks.boxes)
        except (MedSteerError, OSError) as error:
            self.say(f"the index could not be written now: {error}")
        self._index_at = time.monotonic() + max(INDEX_EVERY, 20 * (time.monotonic() - begun))

    def _finish_index(self) -> None:
        if self._indexing is not None:
            self._indexing.join()
        if self.index:
            with self._writing():
                self.dataset.write_index(self.tasks.boxes)

    @contextmanager
    def _writing(self, what: str = "write") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunFailed(f"{self.dataset.root}: could not {what}: {error.strerror or error}.") from error
