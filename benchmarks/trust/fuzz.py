"""Hostile files: a million changed files through every reader, and what the readers did about them.

Each reader runs in a process of its own that may hold at most 256 MB more than before, may take seconds at most, and
must not open another file, write, start a program, use the network or import anything. Files are changed with their
format in mind (headers of safetensors with the right hash, zips, opcodes of pickles, JSON), led by the lines of the
reader that they reach. Fails when a reader raised anything but MedSteerError or went beyond a limit.

    python dev.py bench fuzz
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared.command import aligned, common_options, finish
from benchmarks.shared.record import machine
from benchmarks.trust._fuzz_targets import TARGETS
from benchmarks.trust._fuzz_worker import MEMORY_LIMIT, SECONDS_LIMIT
from medsteer_core.errors import MedSteerError
from medsteer_core.run.demo import ROOT

EXECUTIONS, SEED, TIME_LIMIT = 1_000_000, 1000, 3600


def main(words: list[str]) -> int:
    options = common_options("fuzz", __doc__)
    options.add_argument("--executions", type=int, default=EXECUTIONS, help="files over all readers (%(default)s)")
    options.add_argument("--seed", type=int, default=SEED, help="of the changes (%(default)s)")
    options.add_argument("--only", choices=TARGETS, action="append", help="a reader; may be given several times")
    options.add_argument("--jobs", type=int, default=1, help="readers at once, each on a core (%(default)s)")
    options.add_argument("--plain", action="store_true", help="without atheris: hypothesis draws the changes")
    record = finish("fuzz", options.parse_args(words), run, table)
    return record if isinstance(record, int) else failed(record)


def failed(record: Mapping[str, Any]) -> int:
    """1 when a reader failed, else 0."""
    return int(any(row["failures"] for row in record["readers"].values()))


def run(chosen: argparse.Namespace) -> tuple[dict[str, Any], None]:
    begun, names = time.monotonic(), chosen.only or list(TARGETS)
    whole = sum(TARGETS[name].share for name in names)
    counts = {name: max(1, round(chosen.executions * TARGETS[name].share / whole)) for name in names}

    def one(name: str) -> dict[str, Any]:
        row = fire(name, counts[name], chosen.seed, chosen.plain)
        print(f"{name}: {counts[name]:,} files, {row['seconds']:.0f} s, {len(row['failures'])} failures", flush=True)
        return row

    with ThreadPoolExecutor(chosen.jobs) as pool:
        rows = dict(zip(names, pool.map(one, names), strict=True))
    record = {
        "settings": {"executions": chosen.executions, "seed": chosen.seed, "jobs": chosen.jobs,
                     "guided": _guided(chosen.plain), "memory_limit_mb": MEMORY_LIMIT // 2**20,
                     "seconds_limit": SECONDS_LIMIT},
        "machine": machine(torch.device("cpu")),
        "executions": sum(row["executions"] for row in rows.values()),
        "seconds": round(time.monotonic() - begun, 1),
        "readers": rows,
    }  # fmt: skip
    return record, None


def fire(name: str, executions: int, seed: int, plain: bool = False) -> dict[str, Any]:
    """What became of so many files at one reader. A process that ended before its time is a failure too."""
    with tempfile.TemporaryDirectory(prefix="medsteer-fuzz-") as folder:
        job, result = Path(folder) / "job.json", Path(folder) / "result.json"
        facts = {"target": name, "executions": executions, "seed": seed, "plain": plain, "folder": folder}
        job.write_text(json.dumps({**facts, "result": str(result)}), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.trust._fuzz_worker", str(job)]
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        log = Path(folder) / "log.txt"
        with open(log, "wb") as output:
            try:
                code = subprocess.run(
                    command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, timeout=TIME_LIMIT,
                    check=False,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired as error:
                raise MedSteerError(
                    f"'{name}' took more than {TIME_LIMIT} s; fewer --executions are needed."
                ) from error
        text = log.read_text(encoding="utf-8", errors="replace")
        if not result.exists():
            stopped = sorted(Path(folder).glob("stopped-*"))
            kept = stopped[0].read_bytes()[:3000].hex() if stopped else ""
            why = f"its process ended with status {code}: {text[-1500:]}"
            row = {"executions": 0, "accepted": 0, "refused": 0, "worst_memory_mb": 0.0, "worst_seconds": 0.0,
                   "seconds": 0.0, "failures": {why: {"times": 1, "file": kept}}}  # fmt: skip
        else:
            row = json.loads(result.read_text(encoding="utf-8"))
        covered = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", text)
        edges, _, kept = map(int, covered[-1]) if covered else (None, None, None)
        return {**row, "edges": edges, "kept_files": kept}


def _guided(plain: bool) -> str:
    import importlib.util

    return "hypothesis" if plain or importlib.util.find_spec("atheris") is None else "atheris"


def table(record: Mapping[str, Any]) -> str:
    lines = [("reader", "files", "read", "refused", "edges", "kept", "most memory", "longest", "failures")]
    for name, row in record["readers"].items():
        lines.append(
            (
                name, f"{row['executions']:,}", f"{row['accepted']:,}", f"{row['refused']:,}", str(row["edges"] or "-"),
                str(row["kept_files"] or "-"), f"+{row['worst_memory_mb']:.0f} MB", f"{row['worst_seconds']:.2f} s",
                str(len(row["failures"])),
            )
        )  # fmt: skip
    text = ["", *aligned(lines), "", f"{record['executions']:,} files in {record['seconds']:.0f} s"]
    for name, row in record["readers"].items():
        text += [f"  {name}: {what[:300]} ({found['times']} times)" for what, found in row["failures"].items()]
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
