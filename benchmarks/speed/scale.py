"""How much of a worker's time is work: `python dev.py bench scale`.

First eight stub workers that only sleep, on a Ray of this machine: what scheduling costs. Then real workers, one and
two, each with its own ComfyUI on EndoPhantom: pairs a minute, how busy each worker is, and where its time goes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.shared.command import aligned, common_options, finish
from benchmarks.shared.small_pair import workflow
from medsteer_core.dataset.pair_dataset import PairDataset
from medsteer_core.errors import MedSteerError
from medsteer_core.run.demo import ROOT
from medsteer_core.run.server import signals_as_interrupt
from medsteer_core.scale.driver import Driver
from medsteer_core.scale.plan import Plan
from medsteer_core.scale.pool import RayPool
from medsteer_core.scale.tasks import Tasks
from medsteer_core.scale.worker import DONE, Outcome

STUBS, NAPS, NAP = 8, 480, 0.25
SIDE, STEPS, CHUNK = 128, 20, 4
AIMS = {"efficiency": 0.95, "busy": 0.90}


def main(words: list[str]) -> int:
    options = common_options("scale", __doc__.splitlines()[0])
    options.add_argument("--pairs", type=int, default=48, help="how many pairs each real worker makes")
    options.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="numbers of real workers")
    chosen = options.parse_args(words)
    with signals_as_interrupt():
        record = finish("scale", chosen, run, table)
    return record if isinstance(record, int) else 0


class Stub:
    """A worker whose tasks are naps of `NAP` seconds; it tells when each began and ended."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def whoami(self) -> dict[str, Any]:
        return {"pid": os.getpid()}

    def close(self) -> None:
        pass

    def run(self, task: Any) -> Outcome:
        begun = time.monotonic()
        time.sleep(NAP)
        return Outcome(DONE, new=task.pairs, seconds={"begun": begun, "ended": time.monotonic()})


class Noting(RayPool):
    """A pool that keeps every outcome and waits until all of its workers are there."""

    def __init__(self, **options: Any) -> None:
        super().__init__(None, **options)
        self.outcomes: list[Outcome] = []

    def ready(self, worker: Any) -> Any:
        reference = super().ready(worker)
        self.ray.get(reference)
        return reference

    def result(self, reference: Any) -> Any:
        outcome = super().result(reference)
        if isinstance(outcome, Outcome):
            self.outcomes.append(outcome)
        return outcome


def naps(workers: int = STUBS, tasks: int = NAPS) -> dict[str, Any]:
    """Scheduling efficiency: the share of the workers' time, from the first nap to the last one's end, that was nap."""
    with tempfile.TemporaryDirectory(prefix="medsteer-scale-") as folder:
        plan = Plan(workflow(), folder, range(1, tasks + 1))
        with Noting(workers=workers, kind=Stub) as pool:
            Driver(Tasks(plan), PairDataset(folder), pool, index=False, say=lambda _: None).run()
            times = [(one.seconds["begun"], one.seconds["ended"]) for one in pool.outcomes]
    wall = max(ended for _, ended in times) - min(begun for begun, _ in times)
    slept = sum(ended - begun for begun, ended in times)
    return {"workers": workers, "tasks": len(times), "nap": NAP, "seconds": round(wall, 2),
            "efficiency": round(slept / (workers * wall), 4)}  # fmt: skip


def real(folder: Path, workers: int, pairs: int, cpu: bool) -> dict[str, Any]:
    """A run of the command with real workers: pairs a minute, each worker's busy share, where the seconds went."""
    (folder / "workflow.json").write_text(json.dumps(workflow(SIDE, STEPS)))
    plan, stats, log = folder / f"{workers}.yaml", folder / f"{workers}.json", folder / f"{workers}.log"
    seeds = max(2 * workers, workers * pairs // CHUNK)
    plan.write_text(
        f"workflow: workflow.json\noutput: {folder / f'pairs_{workers}'}\nseeds: 1..{seeds}\nchunk: {CHUNK}\n"
        "pairs:\n  - {present: polyps, absent: normal cecum}\n"
    )
    command = [sys.executable, "-m", "medsteer_core.scale", str(plan), "--workers", str(workers), "--stats", str(stats)]
    with open(log, "wb") as output:
        status = subprocess.call([*command, *(["--cpu"] if cpu else [])], cwd=ROOT, stdout=output, stderr=output)
    if status:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
        raise MedSteerError(f"the run with {workers} workers ended with status {status}:\n{end}")
    told = json.loads(stats.read_text())
    seconds = told["seconds"]
    inner = {name: round(seconds.get(name, 0.0), 1) for name in ("start", "comfyui", "download", "write")}
    steady = workers * told["working"] - seconds.get("start", 0.0)
    return {"workers": workers, "pairs": told["pairs"], "working": round(told["working"], 1),
            "pairs_per_minute": round(60 * told["pairs"] / told["working"], 2),
            "pairs_per_minute_started": round(60 * told["pairs"] * workers / steady, 2),
            "busy": [round(share / told["working"], 3) for share in told["busy"].values()], "seconds": inner,
            "comfyui_share": round(seconds["comfyui"] / steady, 3)}  # fmt: skip


def run(chosen) -> tuple[dict[str, Any], None]:
    stubs = naps()
    print(f"{stubs['workers']} stub workers: efficiency {stubs['efficiency']:.3f}", flush=True)
    rows = []
    with tempfile.TemporaryDirectory(prefix="medsteer-scale-") as name:
        for workers in chosen.workers:
            rows.append(real(Path(name), workers, chosen.pairs, chosen.cpu))
            print(f"{workers} real workers: {rows[-1]['pairs_per_minute']:.1f} pairs a minute", flush=True)
    load = os.getloadavg() if hasattr(os, "getloadavg") else ()
    setting = {"images": f"{SIDE} x {SIDE}, {STEPS} steps, {CHUNK} a task", "cores": os.cpu_count()}
    return {"stubs": stubs, "real": rows, "aims": AIMS, "load": [round(part, 1) for part in load], **setting}, None


def table(record: Mapping[str, Any]) -> str:
    head: Sequence[str] = ("workers", "pairs/min", "once started", "busy", "in ComfyUI", "writing s", "starting s")
    rows = [[str(row["workers"]), f"{row['pairs_per_minute']:.1f}", f"{row['pairs_per_minute_started']:.1f}",
             ", ".join(f"{share:.2f}" for share in row["busy"]), f"{row['comfyui_share']:.2f}",
             f"{row['seconds']['write']:.1f}", f"{row['seconds']['start']:.1f}"] for row in record["real"]]  # fmt: skip
    stubs = record["stubs"]
    line = f"{stubs['workers']} stub workers, {stubs['tasks']} tasks of {stubs['nap']} s: {stubs['efficiency']:.3f}"
    return "\n".join([line, "", *aligned([head, *rows])])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
