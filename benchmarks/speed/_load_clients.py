"""The clients of the load benchmark: they queue prompts, listen to them on websockets, and cancel some."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medsteer_core.run.client import ComfyClient
from medsteer_core.run.listener import Listener
from medsteer_core.run.retrying_http import RetryingHttp
from medsteer_core.run.workflow import RunState, Workflow, WorkflowError

FINISHED, STOPPED, REMOVED, FAILED, LOST = (
    "finished", "cancelled while it ran", "cancelled while it waited", "failed", "lost",
)  # fmt: skip
WATCHED = ("/queue", "/system_stats")
# Of the messages about a run of the small example, from its start into its sampling.
MESSAGES = 24


@dataclass
class Job:
    """One prompt of one client. cancel: None, seconds after the queueing, or the number of its own messages heard."""

    number: int
    workflow: Workflow
    cancel: int | float | None = None
    prompt_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    cancelled: bool = False
    heard_end: bool = False
    messages: int = 0
    fate: str = LOST
    place: int | None = None


def with_cancels(workflows: Sequence[Workflow], share: float, spread: float, seed: int) -> list[Job]:
    """Jobs of which a share is to be cancelled: by turns within its run, and within ``spread`` seconds. Seeded."""
    draw = random.Random(seed)
    jobs = [Job(number, workflow) for number, workflow in enumerate(workflows)]
    for turn, number in enumerate(draw.sample(range(len(jobs)), round(share * len(jobs)))):
        jobs[number].cancel = draw.randint(1, MESSAGES) if turn % 2 == 0 else draw.uniform(0.0, spread)
    return jobs


class Listening(threading.Thread):
    """One client: queues its jobs, then listens until each is over."""

    def __init__(self, address: str, jobs: Sequence[Job], start: threading.Barrier, time_limit: float):
        super().__init__(daemon=True)
        self.jobs, self.barrier, self.time_limit = jobs, start, time_limit
        self.client, self.client_id = ComfyClient(address, timeout=60.0), uuid.uuid4().hex
        self.connections, self.foreign, self.problem = 0, 0, ""

    def run(self) -> None:
        try:
            with Listener(self.client.address, self.client_id) as listener:
                self.barrier.wait()
                for job in self.jobs:
                    self.client.queue(job.workflow, self.client_id, job.prompt_id)
                self._listen(listener)
                self.connections = listener.connections
            for job in self.jobs:
                job.fate = fate_of(self.client, job)
        except (WorkflowError, OSError, threading.BrokenBarrierError) as error:
            self.problem = f"{type(error).__name__}: {error}"
            self.barrier.abort()

    def _listen(self, listener: Listener) -> None:
        runs = {job.prompt_id: RunState(job.prompt_id, job.workflow) for job in self.jobs}
        waiting = {job.prompt_id: job for job in self.jobs}
        queued = time.monotonic()
        ask_at = queued + 1.0
        while waiting and time.monotonic() - queued < self.time_limit:
            message = listener.next(0.05) or {}
            prompt_id = (message.get("data") or {}).get("prompt_id")
            if prompt_id in runs:
                job, run = next(j for j in self.jobs if j.prompt_id == prompt_id), runs[prompt_id]
                job.messages += 1
                if run.hear(message) and run.finished:
                    job.heard_end = True
                    waiting.pop(prompt_id, None)
                elif isinstance(job.cancel, int) and job.messages >= job.cancel and not job.cancelled:
                    job.cancelled = self.client.cancel(prompt_id)
            elif prompt_id:
                self.foreign += 1
            for job in list(waiting.values()):
                due = isinstance(job.cancel, float) and time.monotonic() - queued >= job.cancel
                if due and not job.cancelled:
                    job.cancelled = self.client.cancel(job.prompt_id)
            if time.monotonic() >= ask_at:  # of a prompt that was taken out of the queue no message comes
                over = [i for i, job in waiting.items() if job.cancelled and self.client.status(i) is None]
                for prompt_id in over:
                    del waiting[prompt_id]
                ask_at = time.monotonic() + 1.0


def fate_of(client: ComfyClient, job: Job) -> str:
    """What became of a job, by the server's word."""
    status = client.status(job.prompt_id)
    if status is None:
        return REMOVED if job.cancelled else LOST
    return {"completed": FINISHED, "cancelled": STOPPED, "failed": FAILED}.get(status, LOST)


class Watch(threading.Thread):
    """Asks the server every ``every`` seconds whether it is there, each of `WATCHED` by turns, until `end`."""

    def __init__(self, address: str, every: float = 0.1):
        super().__init__(daemon=True)
        self.http, self.every = RetryingHttp(address, timeout=30.0), every
        self.seconds: dict[str, list[float]] = {path: [] for path in WATCHED}
        self.failed: list[str] = []
        self._over = threading.Event()

    def run(self) -> None:
        turn, due = 0, time.monotonic()
        while not self._over.wait(max(0.0, due - time.monotonic())):
            path, begun = WATCHED[turn % len(WATCHED)], time.monotonic()
            try:
                self.http.once(path)
            except OSError as error:
                self.failed.append(f"{path}: {error}")
            self.seconds[path].append(time.monotonic() - begun)
            turn, due = turn + 1, max(due + self.every, time.monotonic())

    def end(self) -> dict[str, Any]:
        """Stop; milliseconds by path."""
        self._over.set()
        self.join()
        return {path: quantiles(seconds) for path, seconds in self.seconds.items()} | {"failed": len(self.failed)}


def quantiles(seconds: Sequence[float]) -> Mapping[str, float]:
    """Count, and median, 99th percentile (the nearest rank) and worst in milliseconds."""
    ranked = sorted(1000 * value for value in seconds)
    if not ranked:
        return {"requests": 0, "median_ms": None, "p99_ms": None, "worst_ms": None}
    middle, high = (len(ranked) - 1) // 2, -(-99 * len(ranked) // 100) - 1
    shown = {"median_ms": ranked[middle], "p99_ms": ranked[high], "worst_ms": ranked[-1]}
    return {"requests": len(ranked), **{name: round(value, 1) for name, value in shown.items()}}
