"""How much longer does ComfyUI take to start with this pack? Its import, against that of an empty pack.

Fresh processes, in which ComfyUI is ready for custom nodes, take turns: each imports one of the two as ComfyUI does,
on_load and schemas included. What the import brings in is listed: none of it may be a heavy library.

    python dev.py bench imports
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.shared.command import aligned, common_options, finish
from benchmarks.shared.record import machine
from medsteer_core.errors import MedSteerError
from medsteer_core.run.demo import ROOT

MOST_SECONDS = 0.15
# Imported when they are used. ComfyUI itself brings some of them; a pack that does would be slow without ComfyUI's.
HEAVY = (
    "accelerate", "datasets", "diffusers", "matplotlib", "onnx", "onnxruntime", "pandas", "peft", "pyarrow",
    "pycocotools", "ray", "scipy", "sklearn", "timm", "torchmetrics", "torchvision", "transformers",
)  # fmt: skip
EMPTY = "NODE_CLASS_MAPPINGS = {}\n"


def main(words: list[str]) -> int:
    options = common_options("imports", "Import time of the pack inside ComfyUI, over that of an empty pack.")
    options.add_argument("--rounds", type=int, default=30, help="processes with each pack, in turn (30)")
    chosen = options.parse_args(words)
    if chosen.rounds < 10:
        options.error("--rounds wants 10 or more")
    record = finish("imports", chosen, run, table)
    if isinstance(record, int):
        return record
    if not record["within"]:
        print("error: the import takes too long, or brings in a heavy library; see the table.", file=sys.stderr)
    return 0 if record["within"] else 1


def run(chosen: argparse.Namespace) -> tuple[dict[str, Any], None]:
    """Measure: the record for imports.json, and no picture."""
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="medsteer-empty-") as folder:
        (Path(folder) / "__init__.py").write_text(EMPTY, encoding="utf-8")
        folders = {"empty": Path(folder), "pack": ROOT}
        # The first round is left out: it compiles both to bytecode.
        rows = imported(list(folders.values()) * (chosen.rounds + 1))[len(folders) :]
    for place, name in enumerate(folders):
        found[name] = rows[place :: len(folders)]
    times = {
        clock: difference([row[clock] for row in found["pack"]], [row[clock] for row in found["empty"]])
        for clock in ("seconds", "cpu_seconds")
    }
    modules = sorted({module for row in found["pack"] for module in row["modules"]})
    heavy = heavy_of(modules)
    return {
        "benchmark": "imports", "rounds": chosen.rounds, "most_seconds": MOST_SECONDS, **times, "heavy": heavy,
        "within": times["seconds"]["difference"] <= MOST_SECONDS and not heavy,
        "own_modules": len(modules) - len(others_of(modules)), "other_modules": others_of(modules),
        "python": sys.version.split()[0], "machine": machine(torch.device("cpu")),
    }, None  # fmt: skip


def imported(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Seconds, and the modules that are new, of one import after another, each in a process of its own.

    Where the system can copy a process, ComfyUI starts only once. MedSteerError where an import fails.
    """
    rows = []
    for group in [folders] if hasattr(os, "fork") else [[folder] for folder in folders]:
        words = [sys.executable, "-m", "benchmarks.speed._import_once", *map(str, group)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
        if done.returncode:
            raise MedSteerError(f"ComfyUI could not import a pack:\n{done.stderr[-2000:]}")
        rows += [json.loads(line) for line in done.stdout.splitlines()[-len(group) :]]
    return rows


def difference(pack: Sequence[float], empty: Sequence[float]) -> dict[str, Any]:
    """Median of the rounds' differences, with the order statistics that hold it with at least 95% (sign test)."""
    apart = sorted(a - b for a, b in zip(pack, empty, strict=True))
    left = outside(len(apart))
    return {
        "difference": median(apart), "interval": [apart[left], apart[-1 - left]],
        "pack": median(pack), "empty": median(empty),
    }  # fmt: skip


def outside(n: int, error: float = 0.05) -> int:
    """How many of ``n`` sorted values lie outside an interval of the median on each side (with n = 10: 1)."""
    ways, below, left = 1, 0, 0
    for k in range(n // 2):
        below += ways  # the ways in which at most k of n values lie below the median
        if 2 * below > error * 2**n:
            break
        left, ways = k, ways * (n - k) // (k + 1)
    return left


def heavy_of(modules: Sequence[str]) -> list[str]:
    """The heavy libraries among imported modules."""
    return sorted({module.split(".")[0] for module in modules} & set(HEAVY))


def others_of(modules: Sequence[str]) -> list[str]:
    """Imported modules that are not this pack's own: ComfyUI names those after the pack's folder."""
    return [module for module in modules if not module.startswith(str(ROOT).replace(".", "_x_"))]


def table(record: Mapping[str, Any]) -> str:
    lines = [("clock", "empty pack", "this pack", "difference [95%]")]
    for name, row in (("wall", record["seconds"]), ("processor", record["cpu_seconds"])):
        shown = "{:.3f} [{:.3f}, {:.3f}] s".format(row["difference"], *row["interval"])
        lines.append((name, f"{row['empty']:.4f} s", f"{row['pack']:.3f} s", shown))
    said = "within" if record["within"] else "NOT within"
    notes = [
        f"{said} {record['most_seconds']} s; heavy libraries that it brings in: {', '.join(record['heavy']) or 'none'}",
        f"modules: {record['own_modules']} of its own, others {', '.join(record['other_modules']) or 'none'}",
    ]
    return "\n".join(["", *aligned(lines), *notes])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
