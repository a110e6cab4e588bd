"""One worker: a ComfyUI of its own (or one that runs somewhere), the tasks it is given, and the pairs they make.

A plain class; the driver makes a Ray actor of it. What goes wrong is told, not raised, so that the driver can tell a
task's own fault from a machine's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..dataset.pair_dataset import PairDataset
from ..errors import MedSteerError
from ..run.client import ComfyClient
from ..run.server import ComfyServer, ServerError, comfyui_from_environment
from ..run.workflow import Workflow, WorkflowError, WorkflowFailed, WorkflowInterrupted, WorkflowRefused
from .images import upright_png
from .tasks import FOLDER, SAVE, Task

ROOT = Path(__file__).resolve().parent.parent.parent
# How a task ended: done; by its own fault; because ComfyUI died, hung or was not there; because ComfyUI would not
# start at all; because its pairs could not be written.
DONE, FAULT, CRASH, START, OUTPUT = "done", "fault", "crash", "start", "output"


@dataclass(frozen=True)
class Settings:
    """What all workers of a run share. `address`: a server to attach to, instead of starting one."""

    output: str
    comfyui: str | None = None
    address: str | None = None
    cpu: bool | None = None
    extra: tuple[str, ...] = ()
    timeout: float = 1800.0
    start_limit: float = 300.0


@dataclass(frozen=True)
class Outcome:
    """How a task ended: `kind` is one of the five above, `seconds` what it took by part."""

    kind: str
    error: str = ""
    pair_ids: tuple[str, ...] = ()
    new: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    starts: int = 0


class Worker:
    """Runs tasks, one at a time; `close` when there are no more."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.dataset = settings, PairDataset(settings.output)
        self._server: ComfyServer | None = None
        self._stack = contextlib.ExitStack()
        self._starts = 0

    def whoami(self) -> dict[str, Any]:
        """This process's id, and its server's once there is one."""
        server = self._server.process if self._server else None
        return {"pid": os.getpid(), "server": server.pid if server else None}

    def run(self, task: Task) -> Outcome:
        """Make a task's pairs, write them and then the task's marker."""
        begun, starts = time.monotonic(), self._starts
        seconds: dict[str, float] = {}

        def outcome(kind: str, error: object = "", **more: Any) -> Outcome:
            seconds["all"] = time.monotonic() - begun
            return Outcome(kind, str(error), seconds=seconds, starts=self._starts - starts, **more)

        try:
            with _timed(seconds, "start"):
                client = self._client()
        except (ServerError, WorkflowError, OSError) as error:
            self.close()
            return outcome(START, error)
        try:
            with _timed(seconds, "comfyui"):
                result = client.run(_uploaded(task, client), time_limit=self.settings.timeout)
            with _timed(seconds, "download"):
                records, files = collect(result.output(SAVE), client.view)
        except (WorkflowFailed, WorkflowRefused, MedSteerError, KeyError) as error:
            return outcome(FAULT, error)
        except (WorkflowError, OSError) as error:
            what = self._last_words(error)
            if not isinstance(error, WorkflowInterrupted):  # that one somebody pressed, and the server is well
                self.close()
            return outcome(CRASH, what)
        try:
            with _timed(seconds, "write"):
                new = sum(add(self.dataset, record, files) for record in records)
                ids = tuple(sorted(record["pair_id"] for record in records))
                mark(self.dataset, task, ids)
        except MedSteerError as error:
            # The dataset says which storage trouble it met, and keeps the cause; the rest is the pairs' own fault.
            return outcome(OUTPUT if isinstance(error.__cause__, OSError) else FAULT, error)
        except OSError as error:
            return outcome(OUTPUT, f"{self.settings.output}: {error}")
        self._forget(task)
        return outcome(DONE, pair_ids=ids, new=new)

    def close(self) -> None:
        """Stop the server, if it is ours."""
        self._stack.close()
        self._server = None

    def _client(self) -> ComfyClient:
        """A client of a server that answers; starts one where there is none."""
        if self.settings.address:
            client = ComfyClient(self.settings.address, retries=3)
            client.system_stats()
            return client
        if self._server is not None and self._server.process.poll() is not None:
            self.close()
        if self._server is None:
            comfyui = Path(self.settings.comfyui) if self.settings.comfyui else comfyui_from_environment()
            server = ComfyServer(comfyui, ROOT, cpu=self.settings.cpu, extra=self.settings.extra,
                                 start_limit=self.settings.start_limit)  # fmt: skip
            self._server = self._stack.enter_context(server)
            self._starts += 1
        return ComfyClient(self._server.address, retries=1)

    def _last_words(self, error: Exception) -> str:
        """Why the server gave no result, as far as can be known."""
        process = self._server.process if self._server else None
        with contextlib.suppress(Exception):
            process.wait(0.5)
        if process is None or process.poll() is None:
            return str(error)
        return f"ComfyUI ended with status {process.returncode}. Its log ends:\n{self._server.log_tail(12)}"

    def _forget(self, task: Task) -> None:
        """Delete the pairs from our own server's output folder: they stand in the dataset now."""
        if self._server is not None:
            shutil.rmtree(self._server.base / "output" / FOLDER / task.task_id, ignore_errors=True)
            if task.image is not None:
                (self._server.base / "input" / task.workflow[task.load]["inputs"]["image"]).unlink(missing_ok=True)


def _uploaded(task: Task, client: ComfyClient) -> Workflow:
    """The task's workflow, whose real image is on the server now: its pixels, without what the file says of itself."""
    if task.image is None:
        return task.workflow
    inputs = task.workflow[task.load]["inputs"]
    name = client.upload(upright_png(*task.image), inputs["image"])
    return {**task.workflow, task.load: {**task.workflow[task.load], "inputs": {**inputs, "image": name}}}


def collect(shown: Mapping[str, Any], view: Callable[..., bytes]) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """The records of a saved task, and its files by name, fetched with ``view``. MedSteerError without pairs."""
    records = shown.get("medsteer_pairs")
    if not isinstance(records, list) or not records:
        raise MedSteerError("Save Counterfactual Pairs told of no pairs; ComfyUI runs another version of the pack.")
    return records, {item["filename"]: view(**item) for item in shown.get("images", [])}


def add(dataset: PairDataset, record: Mapping[str, Any], files: Mapping[str, bytes]) -> bool:
    """Add one pair to the dataset; False when it was there."""
    names = [record.get(f"{kind}_file_name") for kind in ("factual", "counterfactual", "mask")]
    images = [files.get(name.rsplit("/", 1)[-1]) if name else None for name in names]
    if any(name and image is None for name, image in zip(names, images, strict=True)):
        raise MedSteerError(f"Pair {record.get('pair_id')} came without all of its images.")
    return dataset.add(record, *images)


def mark(dataset: PairDataset, task: Task, pair_ids: tuple[str, ...]) -> None:
    """Write the task's marker, after its pairs: who finds it need not make the task again."""
    made_of = {"file_sha256": task.file_sha256} if task.image is not None else {"seed": task.seed}
    data = {"task_id": task.task_id, **made_of, "pair_ids": list(pair_ids)}
    dataset.store.write_whole(f"tasks/{task.task_id}.json", (json.dumps(data, indent=1) + "\n").encode(), "tasks")


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str):
    begun = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = time.monotonic() - begun
