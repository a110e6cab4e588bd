"""The benchmarks that want a GPU, one after the other within a time limit: what a machine lent for minutes is used for.

overhead, paired, determinism and memory, each a process of its own and as large as a few minutes on a GPU allow; with
`--small` as small as a try on the CPU allows. Each one's record is kept in gpu.json with its exit status and seconds;
one that fails or takes too long leaves the others their time.

    python dev.py bench gpu
    python dev.py bench gpu --cpu --small
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.shared.command import aligned, common_options, finish
from medsteer_core.errors import MedSteerError
from medsteer_core.run.demo import ROOT

# Name, module, share of the time, arguments on a GPU, arguments of a small try.
PARTS = (
    ("overhead", "benchmarks.speed.overhead", 0.25, ["--rounds", "40", "--blocks", "28"],
     ["--rounds", "2", "--steps", "2", "--wide-rounds", "1", "--blocks", "1", "--side", "8"]),
    ("paired", "benchmarks.speed.paired", 0.35, ["--repeats", "3", "--blocks", "28"],
     ["--repeats", "1", "--only", "EndoPhantom"]),
    ("determinism", "benchmarks.trust.determinism", 0.2, ["--n", "4", "--others", "2", "--servers", "2"],
     ["--n", "2", "--servers", "1", "--templates", "counterfactual_pair"]),
    ("memory", "benchmarks.trust.memory", 0.2, ["--runs", "60", "--warm-up", "10"], ["--runs", "4", "--warm-up", "1"]),
)  # fmt: skip
END = 4000  # characters of what a part printed that are kept


def main(words: list[str]) -> int:
    options = common_options("gpu", "The benchmarks that want a GPU, within a time limit.")
    options.add_argument("--minutes", type=float, default=10.0, help="for all of them together (10)")
    options.add_argument("--small", action="store_true", help="as small as a try on the CPU allows")
    options.add_argument("--only", nargs="+", choices=[part[0] for part in PARTS], help="only these")
    chosen = options.parse_args(words)
    if chosen.minutes <= 0:
        options.error("--minutes wants more than 0")
    record = finish("gpu", chosen, run, table)
    return record if isinstance(record, int) else int(any(part["status"] for part in record["parts"].values()))


def run(chosen: argparse.Namespace) -> tuple[dict[str, Any], None]:
    """Run every part; the record for gpu.json, and no picture."""
    if not chosen.cpu and not torch.cuda.is_available():
        raise MedSteerError("There is no CUDA device here. Run it where there is one, or with --cpu --small to try it.")
    wanted = [part for part in PARTS if chosen.only is None or part[0] in chosen.only]
    end, left, parts = time.monotonic() + 60 * chosen.minutes, sum(part[2] for part in wanted), {}
    for name, module, share, large, small in wanted:
        limit = (end - time.monotonic()) * share / left
        left -= share
        print(f"{name}: at most {limit:.0f} s ...", flush=True)
        parts[name] = one(module, name, small if chosen.small else large, chosen, limit)
        print(f"{name}: status {parts[name]['status']} after {parts[name]['seconds']:.0f} s", flush=True)
    device = "CPU" if chosen.cpu else torch.cuda.get_device_name()
    record = {"benchmark": "gpu", "device": device, "small": chosen.small, "minutes": chosen.minutes, "parts": parts}
    return record, None


def one(module: str, name: str, words: list[str], chosen: argparse.Namespace, limit: float) -> dict[str, Any]:
    """One benchmark in a process of its own: status (-1: out of time), seconds, its record, the end of its words."""
    folder = chosen.output / "gpu"
    command = [sys.executable, "-m", module, *words, "--output", str(folder), *(["--cpu"] if chosen.cpu else [])]
    file = folder / f"{name}.json"
    file.unlink(missing_ok=True)
    begun = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = process.communicate(timeout=limit)
        status = process.returncode
    except subprocess.TimeoutExpired:
        process.terminate()  # a benchmark ends its servers when it is asked to
        try:
            said, _ = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
        status = -1
    finally:
        if process.poll() is None:
            process.kill()
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return {"status": status, "seconds": round(time.monotonic() - begun, 1), "arguments": words, "said": said[-END:],
            "record": found}  # fmt: skip


def table(record: Mapping[str, Any]) -> str:
    """A line for each part, and what each printed at its end."""
    lines = [("benchmark", "status", "seconds")]
    for name, part in record["parts"].items():
        said = "out of time" if part["status"] == -1 else "done" if part["status"] == 0 else f"status {part['status']}"
        lines.append((name, said, f"{part['seconds']:.0f}"))
    ends = [f"\n{name}\n{part['said'].rstrip()}" for name, part in record["parts"].items()]
    return "\n".join(["", record["device"], *aligned(lines), *ends])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
