"""Workers as Ray actors. The only module that imports Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import MedSteerError
from .tasks import Task
from .worker import FAULT, Outcome, Settings, Worker
from .yaml_file import missing


class WorkerLost(Exception):
    """A worker's process or its whole machine is gone."""


class RayPool:
    """Makes workers on a Ray cluster, gives them tasks and waits for them; a context manager.

    address: None for a Ray of this machine alone, which ends with the block; else as `ray.init` takes it.
    workers: how many; None: one for each GPU, else one. servers: running ComfyUIs to attach to, one for each worker.
    kind: the class of a worker; tests and the scheduling benchmark have their own.
    """

    def __init__(
        self,
        settings: Any,
        address: str | None = None,
        workers: int | None = None,
        servers: Sequence[str] = (),
        kind: type = Worker,
    ) -> None:
        self.settings, self.address, self.servers, self.kind = settings, address, tuple(servers), kind
        self.workers, self.gpus = workers, 0.0
        self._made = 0

    def __enter__(self) -> RayPool:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ModuleNotFoundError as error:
            raise missing("ray") from error
        self.ray = ray
        wanted = self.workers or len(self.servers)
        quiet = {"logging_level": "error", "log_to_driver": False, "configure_logging": True}
        # A worker only waits for its ComfyUI: more workers than cores is a choice, not a mistake.
        local = {} if self.address else {"num_cpus": max(os.cpu_count() or 1, wanted)}
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=self.address or "local", **quiet, **local)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise MedSteerError(
                f"No Ray cluster answers at '{self.address}': {' '.join(str(error).split())[:300]} Start one with "
                "'ray start --head', or leave --address out to use this machine alone."
            ) from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own would end this process before workers are ended
        found = int(ray.cluster_resources().get("GPU", 0))
        self.gpus = 1.0 if found and not self.servers else 0.0
        self.workers = wanted or max(1, found)
        if self.gpus and self.workers > found:
            self.gpus = found / self.workers
        return self

    def __exit__(self, *_exception: Any) -> None:
        self.ray.shutdown()

    def start(self) -> Any:
        """A new worker. It may have to wait for its place; `ready` tells when it has one."""
        settings = self.settings
        if self.servers:
            settings = replace(settings, address=self.servers[self._made % len(self.servers)])
        elif isinstance(settings, Settings) and settings.cpu is None and not self.gpus:
            settings = replace(settings, cpu=True)
        self._made += 1
        # Ray is not to start it again by itself: the driver makes a new one, and gives its task to whoever is free.
        actor = self.ray.remote(self.kind).options(num_cpus=1, num_gpus=self.gpus, max_restarts=0, max_task_retries=0)
        return actor.remote(settings)

    def ready(self, worker: Any) -> Any:
        """A reference that is fulfilled once the worker runs."""
        return worker.whoami.remote()

    def submit(self, worker: Any, task: Task) -> Any:
        """Give a worker a task; returns a reference to its Outcome."""
        return worker.run.remote(task)

    def wait(self, references: Sequence[Any], seconds: float) -> list[Any]:
        """Those of the references that are fulfilled (or never will be), after at most so many seconds."""
        if not references:
            return []
        return self.ray.wait(list(references), num_returns=1, timeout=seconds)[0]

    def result(self, reference: Any) -> Any:
        """What a reference is fulfilled with. Raises WorkerLost."""
        lost = (self.ray.exceptions.RayActorError, self.ray.exceptions.WorkerCrashedError,
                self.ray.exceptions.NodeDiedError)  # fmt: skip
        try:
            return self.ray.get(reference)
        except lost as error:
            raise WorkerLost(" ".join(str(error).split())[:500]) from error
        except self.ray.exceptions.RayTaskError as error:
            return Outcome(FAULT, f"the worker itself failed: {error}")

    def end(self, worker: Any, grace: float = 0.0) -> None:
        """End a worker: in order when it does so within `grace` seconds, else at once."""
        with contextlib.suppress(Exception):
            if grace:
                self.ray.get(worker.close.remote(), timeout=grace)
        with contextlib.suppress(Exception):
            self.ray.kill(worker)
