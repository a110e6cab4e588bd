"""The same graph on the same machine: are the files the same, byte for byte, run after run and server after server?

Each template runs as it is shipped, extraction included, its runs spread over several servers that start anew. Before
every run ComfyUI forgets all outputs and unloads its models, and the samples that extractions keep on disk and the
saved vectors are deleted. A run of which ComfyUI says that it served a node all the same does not count. Compared are
the SHA-256 of every image file, saved or shown, of every saved vector, and the texts that nodes show.

    python dev.py bench determinism
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.shared.command import TIME_LIMIT, aligned, common_options, finish
from benchmarks.shared.probe import Probed
from benchmarks.shared.record import machine
from medsteer_core.errors import MedSteerError
from medsteer_core.run.client import Result
from medsteer_core.run.demo import ROOT, WORKFLOW, read_workflow, versions
from medsteer_core.run.server import ComfyServer, comfyui_from_environment
from medsteer_core.run.workflow import Workflow, node_title

MAIN = WORKFLOW.stem
TEMPLATES = (MAIN, "strength_sweep", "extract_inspect_save", "add_a_finding", "remove_dye_keep_polyp")


def main(words: list[str]) -> int:
    options = common_options("determinism", "Are the files of the shipped templates the same, byte for byte?")
    options.add_argument("--n", type=int, default=20, help=f"runs of {MAIN} (20)")
    options.add_argument("--others", type=int, default=6, help="runs of every other template (6)")
    options.add_argument("--servers", type=int, default=3, help="servers that they are spread over (3)")
    options.add_argument("--templates", nargs="+", default=list(TEMPLATES), choices=TEMPLATES, help="only these")
    chosen = options.parse_args(words)
    if chosen.servers < 1 or min(chosen.n, chosen.others) < max(2, chosen.servers):
        options.error("--n and --others want 2 or more, and no fewer than --servers, which wants 1 or more")
    record = finish("determinism", chosen, run, table)
    if isinstance(record, int):
        return record
    if not record["identical"]:
        print("error: a template gave other files in another run; see the table.", file=sys.stderr)
    return 0 if record["identical"] else 1


def run(chosen: argparse.Namespace) -> tuple[dict[str, Any], None]:
    """Run everything: the record for determinism.json, and no picture."""
    digests: dict[str, list[list[dict[str, str]]]] = {name: [] for name in chosen.templates}
    seconds: dict[str, list[float]] = {name: [] for name in chosen.templates}
    for place in range(chosen.servers):
        print(f"server {place + 1} of {chosen.servers} ...", end="", flush=True)
        with ComfyServer(comfyui_from_environment(), ROOT, cpu=True if chosen.cpu else None) as server:
            print(f" on the {server.device}, {server.seconds_to_start:.1f} s", flush=True)
            probed = Probed(server)
            for name in chosen.templates:
                workflow = read_workflow(WORKFLOW.with_name(f"{name}.json"))
                count = share(chosen.n if name == MAIN else chosen.others, chosen.servers, place)
                digests[name].append([])
                for _ in range(count):
                    begun = time.monotonic()
                    digests[name][-1].append(fresh_run(probed, workflow))
                    seconds[name].append(time.monotonic() - begun)
                said = "the same so far" if compared(digests[name])["identical"] else "NOT the same"
                print(f"  {name}: {count} runs, {sum(seconds[name][-count:]):.0f} s, {said}", flush=True)
            made_with, device = versions(probed.client.system_stats()["system"]), server.device
    templates = {
        name: {**compared(digests[name]), "seconds": round(median(seconds[name]), 2)} for name in chosen.templates
    }
    return {
        "benchmark": "determinism", "identical": all(row["identical"] for row in templates.values()),
        "templates": templates, "servers": chosen.servers, "device": device,
        "machine": machine(torch.device(device.lower().replace("gpu", "cuda"))), "versions": made_with,
    }, None  # fmt: skip


def share(runs: int, servers: int, place: int) -> int:
    """How many of the runs the server at this place makes."""
    return runs // servers + (place < runs % servers)


def fresh_run(probed: Probed, workflow: Workflow, attempts: int = 5) -> dict[str, str]:
    """One run of which nothing was known before: what it left, by name and SHA-256.

    MedSteerError where ComfyUI served a node in each of the attempts. On a busy machine a prompt may come before
    ComfyUI has forgotten; it forgets after that one.
    """
    for _ in range(attempts):
        forget_files(probed.server.base)
        probed.free()
        result = probed.client.run(workflow, time_limit=TIME_LIMIT)
        served = [node for node in cached_nodes(probed.client.history(result.prompt_id)) if node in workflow]
        if not served:
            return left_by(result, probed.server.base)
    titles = ", ".join(node_title(workflow, node) for node in served)
    raise MedSteerError(f"ComfyUI served {titles} from its cache {attempts} times; a run of all nodes was expected.")


def forget_files(base: Path) -> None:
    """Delete the samples that extractions kept, and the saved vectors."""
    shutil.rmtree(base / "user" / "__medsteer" / "samples", ignore_errors=True)
    for path in (base / "models" / "medsteer").rglob("*.safetensors"):
        path.unlink()


def cached_nodes(entry: Mapping[str, Any]) -> list[str]:
    """The nodes that ComfyUI did not run, by the history's messages."""
    return [node for kind, data in entry["status"]["messages"] if kind == "execution_cached" for node in data["nodes"]]


def left_by(result: Result, base: Path) -> dict[str, str]:
    """SHA-256 of every image file, text and saved vector of a run, by node title or file name."""
    left: dict[str, bytes] = {}
    for node_id, output in result.outputs.items():
        title = node_title(result.workflow, node_id)
        for place, item in enumerate(output.get("images", [])):
            left[f"{title}, image {place}"] = result.client.view(**item)
        for place, text in enumerate(output.get("text", [])):
            left[f"{title}, text {place}"] = str(text).encode()
    for path in sorted((base / "models" / "medsteer").rglob("*.safetensors")):
        left[f"vector {path.name}"] = path.read_bytes()
    if not left:
        raise MedSteerError("a run left no image, no text and no vector; something to compare was expected.")
    return {name: hashlib.sha256(data).hexdigest() for name, data in left.items()}


def compared(by_server: Sequence[Sequence[Mapping[str, str]]]) -> dict[str, Any]:
    """Whether all runs of all servers left the same: counts, what differs, and the hashes of the first run."""
    runs = [run for server in by_server for run in server]
    first = runs[0]
    names = sorted({name for run in runs for name in run})
    differing = [name for name in names if any(run.get(name) != first.get(name) for run in runs)]
    return {
        "runs": len(runs), "runs_by_server": [len(server) for server in by_server], "compared": len(names),
        "identical": not differing, "differing": differing, "sha256": dict(first),
    }  # fmt: skip


def table(record: Mapping[str, Any]) -> str:
    lines = [("template", "runs", "servers", "files and texts", "the same", "s a run")]
    for name, row in record["templates"].items():
        same = "all" if row["identical"] else f"NOT: {', '.join(row['differing'])}"
        counts = (str(row["runs"]), str(len(row["runs_by_server"])), str(row["compared"]))
        lines.append((name, *counts, same, f"{row['seconds']:.1f}"))
    return "\n".join(["", f"{record['device']}, {record['machine']['cpu']}", *aligned(lines)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
