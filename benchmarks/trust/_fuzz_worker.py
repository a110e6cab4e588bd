"""One reader under fire, in a process of its own: `python -m benchmarks.trust._fuzz_worker JOB.json`.

With atheris, changes that reach new lines of the reader are kept and changed further; without it, hypothesis draws them
from the valid files. Either way every file is read under the guard, and a result is written when all have been read.
"""

from __future__ import annotations

import base64
import gc
import importlib.util
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEMORY_LIMIT = 256 * 2**20  # bytes that reading may add, by the project's own rule
SECONDS_LIMIT = 5.0  # of one file, in the process's own time; the fuzzer itself stops a hang at HANG
HANG = 30
MOST_FAILURES = 20
# Large files are read slowly, so few are: what a reader's lines do with them, small ones show too.
USUAL, LARGEST, LARGE_SHARE = 2**12, 10**6, 0.005
SAMPLE = 3000  # bytes of a file that are kept with a failure


class Range:
    """Reads files under the guard and keeps the worst of each kind."""

    def __init__(self, read: Callable[[bytes], None], guard: Any, job: dict[str, Any]) -> None:
        self._read, self._guard, self._job = read, guard, job
        self.done = self.accepted = self.refused = 0
        self.worst_seconds, self.slowest = 0.0, b""
        self.first_memory = self.last_memory = 0
        self.failures: dict[str, dict[str, Any]] = {}
        self._begun = time.monotonic()

    def begin(self) -> None:
        """Count memory from here on."""
        from benchmarks.trust._fuzz_guard import memory

        self.first_memory = self.last_memory = memory()
        self._begun = time.monotonic()

    def shoot(self, data: bytes) -> None:
        """Read one file. What is no MedSteerError is a failure of the reader."""
        from benchmarks.trust._fuzz_guard import CodeRun, memory, seconds
        from medsteer_core.errors import MedSteerError

        begun, self._guard.active = seconds(), True
        try:
            self._read(data)
            self.accepted += 1
        except MedSteerError as error:
            self.refused += 1
            if "\n" in str(error) or len(str(error)) > 2000:
                self._fail(f"a message of {len(str(error))} characters or several lines", data)
        except CodeRun as error:
            self._fail(f"ran: {error}", data)
        except BaseException as error:
            self._guard.active = False  # what follows looks into source files
            self._fail(_where(error), data)
        finally:
            self._guard.active = False
        took, held = seconds() - begun, memory()
        if took > self.worst_seconds:
            self.worst_seconds, self.slowest = took, data
        if took > SECONDS_LIMIT:
            self._fail(f"took more than {SECONDS_LIMIT:g} s", data)
        if held - self.first_memory > MEMORY_LIMIT and held > self.last_memory:
            self._fail("more memory than the limit", data)
        self.last_memory = held
        self.done += 1

    def _fail(self, what: str, data: bytes) -> None:
        if what in self.failures:
            self.failures[what]["times"] += 1
        elif len(self.failures) < MOST_FAILURES:
            start = base64.b64encode(data[:SAMPLE]).decode()
            self.failures[what] = {"times": 1, "bytes": len(data), "file": start}

    def report(self) -> None:
        """Write the result where the job wants it."""
        made = {
            "executions": self.done, "accepted": self.accepted, "refused": self.refused,
            "worst_memory_mb": round((self.last_memory - self.first_memory) / 2**20, 1),
            "worst_seconds": round(self.worst_seconds, 3), "slowest_bytes": len(self.slowest),
            "seconds": round(time.monotonic() - self._begun, 1), "failures": self.failures,
        }  # fmt: skip
        Path(self._job["result"]).write_text(json.dumps(made), encoding="utf-8")


def _where(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "medsteer_core" in f.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside"
    return f"{type(error).__name__} at {place}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def main(path: str) -> None:
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    coverage = importlib.util.find_spec("atheris") is not None and not job["plain"]
    if coverage:
        import atheris

        with atheris.instrument_imports(include=["medsteer_core"]):
            from benchmarks.trust._fuzz_targets import TARGETS
    else:
        from benchmarks.trust._fuzz_targets import TARGETS
    from benchmarks.trust._fuzz_guard import Guard, limit_memory

    target, folder = TARGETS[job["target"]], Path(tempfile.mkdtemp(dir=job["folder"]))
    guard = Guard(folder)
    found = Range(target.files(folder), guard, job)
    chance = random.Random(job["seed"])
    for data in target.seeds():
        # Once without the guard: readers import what they need when they first need it.
        for changed in (data, *(target.mutate(data, chance) for _ in range(20))):
            _quietly(lambda changed=changed: found._read(changed))
    gc.collect()
    guard.watch()
    found.begin()
    limit_memory(3 * MEMORY_LIMIT)
    (_covered if coverage else _drawn)(target, found, job)


def _quietly(read: Callable[[], None]) -> None:
    try:
        read()
    except Exception:  # counted when it is read again
        return


def _covered(target: Any, found: Range, job: dict[str, Any]) -> None:
    import atheris

    corpus = Path(job["folder"]) / "corpus"
    corpus.mkdir()
    seeds = target.seeds()
    for number, data in enumerate(seeds):
        (corpus / str(number)).write_bytes(data)

    usual = max(USUAL, 2 * max(map(len, seeds)))

    def one(data: bytes) -> None:
        found.shoot(data)
        if found.done >= job["executions"]:
            found.report()
            os._exit(0)

    def changed(data: bytes, most: int, seed: int) -> bytes:
        chance = random.Random(seed)
        kind = chance.random()
        most = min(most, usual if chance.random() > LARGE_SHARE else LARGEST)
        if kind < 0.2:
            return atheris.Mutate(data[:most], most)
        # Often from a valid file: of changes on changes most are refused at the first look.
        try:
            return target.mutate(chance.choice(seeds) if kind < 0.6 else data, chance)[:most]
        except Exception:  # a file so broken that its own format is of no use
            return atheris.Mutate(data[:most], most)

    options = [f"-seed={job['seed']}", f"-timeout={HANG}", "-rss_limit_mb=0", f"-max_len={LARGEST}",
               "-len_control=0", "-mutate_depth=1", f"-artifact_prefix={job['folder']}/stopped-",
               str(corpus)]  # fmt: skip
    atheris.Setup([sys.argv[0], *options], one, custom_mutator=changed)
    atheris.Fuzz()


def _drawn(target: Any, found: Range, job: dict[str, Any]) -> None:
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis import strategies as st

    seeds = target.seeds()

    @seed(job["seed"])
    @settings(max_examples=job["executions"], database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.sampled_from(seeds), st.integers(0, 2**64), st.integers(0, 6))
    def one(data: bytes, number: int, times: int) -> None:
        chance = random.Random(number)
        for _ in range(times):
            data = target.mutate(data, chance)
        found.shoot(data)

    while found.done < job["executions"]:  # fewer than wanted where it finds no more that are new
        one()
    found.report()


if __name__ == "__main__":
    main(sys.argv[1])
