"""A plan's pairs while processes are killed: `python dev.py bench faults`.

An undisturbed run of a plan comes first. Then the same plan runs into another folder, and at random moments (seeded)
the ComfyUI of a worker, a Ray worker or the driver is killed with SIGKILL; a killed driver is started again by the same
command. In the end both folders must hold the same pairs, byte for byte.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.shared.command import aligned, common_options, finish
from benchmarks.shared.small_pair import SIDE, STEPS, workflow
from medsteer_core.dataset.pair_dataset import PairDataset
from medsteer_core.errors import MedSteerError
from medsteer_core.run.demo import ROOT
from medsteer_core.run.server import signals_as_interrupt

COMFYUI, WORKER, DRIVER = "ComfyUI", "worker", "driver"
TARGETS = (COMFYUI, WORKER, DRIVER)
CHUNK = 5
MOST_SECONDS = 1800.0


def main(words: list[str]) -> int:
    options = common_options("faults", __doc__.splitlines()[0])
    options.add_argument("--pairs", type=int, default=200, help="how many pairs the plan makes (a multiple of 5)")
    options.add_argument("--kills", type=int, default=10, help="how many processes are killed")
    options.add_argument("--workers", type=int, default=2, help="how many workers there are")
    options.add_argument("--seed", type=int, default=7, help="of the moments and the victims")
    chosen = options.parse_args(words)
    with signals_as_interrupt():
        record = finish("faults", chosen, run, table)
    return record if isinstance(record, int) else 0 if survived(record) else 1


def survived(record: Mapping[str, Any]) -> bool:
    """Whether every pair is there once, readable and as in the undisturbed run, after all the kills."""
    whole = record["pairs"] == record["expected"] and record["kills"] == record["planned_kills"]
    return whole and not any(record[name] for name in ("duplicates", "differing", "unreadable", "missing", "left_over"))


def run(chosen) -> tuple[dict[str, Any], None]:
    with tempfile.TemporaryDirectory(prefix="medsteer-faults-") as name:
        folder = Path(name)
        seeds = chosen.pairs // CHUNK
        extra = ["--workers", str(chosen.workers), *(["--cpu"] if chosen.cpu else [])]
        whole = Trial(folder, "undisturbed", seeds, extra)
        begun = time.monotonic()
        whole.finish()
        undisturbed = time.monotonic() - begun
        print(f"undisturbed: {undisturbed:.0f} s", flush=True)
        harmed = Trial(folder, "harmed", seeds, extra)
        kills = moments(random.Random(chosen.seed), chosen.kills, chosen.pairs)
        begun = time.monotonic()
        done = harm(harmed, kills, random.Random(chosen.seed + 1), say=lambda text: print(text, flush=True))
        seconds = time.monotonic() - begun
        record = {**compared(whole.output, harmed.output, seeds * CHUNK), "kills": len(done),
                  "planned_kills": len(kills), "killed": dict(Counter(kill["what"] for kill in done)), "moments": done,
                  "driver_starts": harmed.starts, "workers": chosen.workers, "seed": chosen.seed,
                  "images": f"{SIDE} x {SIDE}, {STEPS} steps, {CHUNK} a task",
                  "seconds": {"undisturbed": round(undisturbed, 1), "harmed": round(seconds, 1)}}  # fmt: skip
    return record, None


def moments(chance: random.Random, kills: int, pairs: int) -> list[tuple[int, float, str]]:
    """When to kill what: after so many pairs and so many more seconds. Every kind of victim is among three in a row."""
    victims = [victim for _ in range(-(-kills // 3)) for victim in chance.sample(TARGETS, 3)][:kills]
    # Not in the last tenth: a run that is over can't be harmed.
    counts = sorted(chance.randrange(0, max(1, int(0.9 * pairs))) for _ in victims)
    return [(count, chance.uniform(0.0, 2.0), victim) for count, victim in zip(counts, victims, strict=True)]


class Trial:
    """One output folder and the command that fills it."""

    def __init__(self, folder: Path, name: str, seeds: int, extra: Sequence[str], chunk: int = CHUNK) -> None:
        self.output, self.starts = folder / name, 0
        (folder / "workflow.json").write_text(json.dumps(workflow()))
        plan = folder / f"{name}.yaml"
        pairs = "pairs:\n  - {present: polyps, absent: normal cecum}"
        limits = "limits: {timeout: 300, crashes: 20}"  # on a busy machine nothing may look like a hang
        text = f"workflow: workflow.json\noutput: {self.output}\n{pairs}\nseeds: 1..{seeds}\nchunk: {chunk}\n{limits}\n"
        plan.write_text(text)
        self.command = [sys.executable, "-m", "medsteer_core.scale", str(plan), *extra]
        self.log = folder / f"{name}.log"

    def start(self) -> subprocess.Popen:
        """The driver, running; what it says is in `log`."""
        self.starts += 1
        with open(self.log, "ab") as log:
            return subprocess.Popen(self.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    def finish(self) -> None:
        """Run to the end. MedSteerError when the driver does not end well."""
        driver = self.start()
        try:
            self.ended(driver, driver.wait(MOST_SECONDS))
        finally:
            if driver.poll() is None:
                driver.terminate()
                driver.wait()

    def ended(self, driver: subprocess.Popen, status: int) -> None:
        if status:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-12:])
            raise MedSteerError(f"the run ended with status {status}. Its log ends:\n{tail}")

    def pairs(self) -> int:
        """How many pairs are whole."""
        return sum(1 for _ in self.output.glob("records/*/*.json"))


def harm(trial: Trial, kills: Sequence[tuple[int, float, str]], chance: random.Random, say=print) -> list[dict]:
    """Run a trial to its end and kill on the way; returns what was killed, and when."""
    begun, left, done, driver = time.monotonic(), list(kills), [], trial.start()
    try:
        while True:
            time.sleep(0.05)
            if driver.poll() is not None:
                trial.ended(driver, driver.returncode)
                return done
            if time.monotonic() - begun > MOST_SECONDS:
                raise MedSteerError(f"the harmed run was not over after {MOST_SECONDS:.0f} s")
            if not left or trial.pairs() < left[0][0] or not (victims := found(driver.pid, left[0][2])):
                continue
            _, wait, what = left.pop(0)
            time.sleep(wait)
            victims = [pid for pid in found(driver.pid, what) if alive(pid)] or victims
            victim = chance.choice(victims)
            if driver.poll() is not None or not alive(victim):
                left.insert(0, (0, 0.0, what))  # it was gone before: take the next chance
                continue
            os.kill(victim, signal.SIGKILL)
            done.append({"what": what, "pairs": trial.pairs(), "second": round(time.monotonic() - begun, 1)})
            say(f"  {done[-1]['second']:6.1f} s  {done[-1]['pairs']:4} pairs  killed: {what}")
            if what == DRIVER:
                driver.wait()
                driver = trial.start()
    finally:
        if driver.poll() is None:
            driver.terminate()
            driver.wait()


def found(driver: int, what: str) -> list[int]:
    """The processes of a kind that belong to a driver: its own id; ComfyUIs below it; the workers that own those."""
    import psutil

    if what == DRIVER:
        return [driver]
    pids = []
    try:
        below = psutil.Process(driver).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    for process in below:
        try:
            words = process.cmdline()
            if "--base-directory" in words:
                pids.append(process.pid if what == COMFYUI else process.ppid())
        except psutil.Error:
            continue
    return [pid for pid in pids if pid > 1]


def alive(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def compared(whole: Path, harmed: Path, expected: int) -> dict[str, Any]:
    """Two folders of the same plan: pairs, those that are there twice, files that are missing, differ or can't be read,
    and files that only one of them has."""
    from PIL import Image

    files = [{str(p.relative_to(root)): p for p in root.rglob("*") if p.is_file() and ".medsteer" not in p.parts}
             for root in (whole, harmed)]  # fmt: skip
    lines = [json.loads(line) for path in harmed.glob("*/metadata.jsonl") for line in path.read_text().splitlines()]
    listed = Counter(line["pair_id"] for line in lines)
    unreadable = 0
    for name, path in files[1].items():
        try:
            if name.endswith(".png"):
                Image.open(io.BytesIO(path.read_bytes())).load()
            elif name.endswith(".json"):
                json.loads(path.read_text())
        except (OSError, ValueError):
            unreadable += 1
    both = set(files[0]) & set(files[1])
    return {
        "pairs": len(PairDataset(harmed).ids()),
        "expected": expected,
        "duplicates": sum(count - 1 for count in listed.values()) + len(listed.keys() ^ set(PairDataset(harmed).ids())),
        "differing": sum(files[0][name].read_bytes() != files[1][name].read_bytes() for name in both),
        "missing": len(set(files[0]) - set(files[1])),
        "left_over": len(set(files[1]) - set(files[0])),
        "unreadable": unreadable,
        "files": len(files[0]),
    }


def table(record: Mapping[str, Any]) -> str:
    names = ("pairs", "expected", "kills", "duplicates", "differing", "missing", "left_over", "unreadable", "files")
    head = aligned([names, [str(record[name]) for name in names]])
    kinds = ", ".join(f"{count} x {what}" for what, count in sorted(record["killed"].items()))
    taken = record["seconds"]
    line = f"killed: {kinds}; {taken['undisturbed']:.0f} s undisturbed, {taken['harmed']:.0f} s with the kills"
    return "\n".join([*head, "", line])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
