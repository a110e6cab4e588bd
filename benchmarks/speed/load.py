"""Many prompts at once: does every one finish or get cancelled, with its own result, while the server answers?

Clients with websockets queue the example workflow, each prompt with a seed of its own, all at once; some prompts are
cancelled, while they wait or while they run. Another thread asks the server all the time and takes the time of its
answers. Afterwards the seeds of all that finished run alone in a fresh server, and the pixels must be the same.

    python dev.py bench load
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.shared.command import aligned, common_options, finish
from benchmarks.shared.record import machine
from benchmarks.speed._load_clients import (
    FAILED,
    FINISHED,
    LOST,
    REMOVED,
    STOPPED,
    WATCHED,
    Job,
    Listening,
    Watch,
    with_cancels,
)
from medsteer_core.run.client import ComfyClient
from medsteer_core.run.demo import ROOT, WORKFLOW, versions
from medsteer_core.run.overrides import applied, changes_for, read_workflow, with_seed
from medsteer_core.run.result import Result
from medsteer_core.run.server import ComfyServer, comfyui_from_environment
from medsteer_core.run.workflow import Workflow, WorkflowError, node_title

IMAGES = ("Factual", "Counterfactual")
IDLE_SECONDS = 3.0


def main(words: list[str]) -> int:
    options = common_options("load", "Prompts queued at once, clients that listen, random cancels.")
    options.add_argument("--n", type=int, default=50, help="prompts (50)")
    options.add_argument("--clients", type=int, default=10, help="clients, each with a websocket (10)")
    options.add_argument(
        "--cancels", type=float, default=0.24, help="the share of the prompts that is cancelled (0.24)"
    )
    options.add_argument("--steps", type=int, default=8, help="sampling steps of a pair (8)")
    options.add_argument(
        "--seed", type=int, default=3000, help="the first prompt's seed; also draws the cancels (3000)"
    )
    options.add_argument("--time-limit", type=float, default=900.0, help="seconds for all prompts together (900)")
    chosen = options.parse_args(words)
    if not (1 <= chosen.clients <= chosen.n and 0 <= chosen.cancels <= 1 and chosen.steps > 0 and chosen.seed >= 0):
        options.error("--clients wants 1 to --n, --cancels 0 to 1, --steps 1 or more, --seed 0 or more")
    record = finish("load", chosen, run, table)
    if isinstance(record, int):
        return record
    for problem in record["problems"]:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if record["problems"] else 0


def run(chosen: argparse.Namespace) -> tuple[dict[str, Any], None]:
    """Load one server, run the same prompts alone in another: the record for load.json, and no picture."""
    example = small(read_workflow(WORKFLOW), chosen.steps)
    workflows = [with_seed(example, chosen.seed + number) for number in range(chosen.n)]
    # Random moments within about half of the run; a pair of 8 steps takes a second on two CPU cores.
    jobs = with_cancels(workflows, chosen.cancels, spread=0.5 * chosen.n, seed=chosen.seed)
    options = {"cpu": True if chosen.cpu else None}
    print("starting ComfyUI ...", flush=True)
    with ComfyServer(comfyui_from_environment(), ROOT, **options) as server:
        idle = watched(server.address, lambda: time.sleep(IDLE_SECONDS))[1]
        print(f"{chosen.n} prompts of {chosen.clients} clients on the {server.device} ...", flush=True)
        begun = time.monotonic()
        clients, busy = watched(server.address, lambda: loaded(server.address, jobs, chosen))
        seconds = time.monotonic() - begun
        client = ComfyClient(server.address)
        found = {job.number: images_of(client, job) for job in jobs if job.fate == FINISHED}
        put_in_order(client, jobs)
        made_with, device = versions(client.system_stats()["system"]), server.device
    print(f"{len(found)} finished in {seconds:.0f} s; each of them alone ...", flush=True)
    with ComfyServer(comfyui_from_environment(), ROOT, **options) as server:
        client = ComfyClient(server.address)
        alone = {number: pixels_of(client.run(workflows[number])) for number in found}
    differences = [change for number in found for change in changes(number, found[number], alone[number])]
    record = {
        "benchmark": "load", "prompts": chosen.n, "clients": chosen.clients, "seconds": round(seconds, 1),
        **fates(jobs), "compared": len(found), "differing": sorted({change["prompt"] for change in differences}),
        "differences": differences, "jobs": [about(job) for job in jobs], "ends_heard": heard_ends(jobs),
        "foreign_messages": sum(one.foreign for one in clients),
        "connections": sum(one.connections for one in clients), "latency": busy, "latency_idle": idle,
        "settings": {"steps": chosen.steps, "seed": chosen.seed, "cancels": chosen.cancels}, "device": device,
        "machine": machine(torch.device(device.lower().replace("gpu", "cuda"))), "versions": made_with,
    }  # fmt: skip
    return {**record, "problems": problems(record, [one.problem for one in clients])}, None


def small(example: Workflow, steps: int) -> Workflow:
    """The example with few steps, a small extraction, and nothing but the pair's images as outputs."""
    kept = ("SaveImage", "MedSteer_", "CLIPTextEncode", "EmptyLatentImage", "VAEDecode")
    dropped = ("Compare", "Panel")
    nodes = {
        i: n for i, n in example.items()
        if n["class_type"].startswith(kept) and not n["class_type"].endswith(dropped)
        and (n["class_type"] != "SaveImage" or node_title(example, i) in IMAGES)
    }  # fmt: skip
    sampler, extract = "MedSteer_CounterfactualSampler", "MedSteer_ExtractPathologyVector"
    settings = [f"{sampler}.steps={steps}", f"{extract}.steps={steps}", f"{extract}.samples=2"]
    return applied(nodes, changes_for(nodes, settings))


def watched(address: str, action) -> tuple[Any, dict[str, Any]]:
    """What ``action`` returns, and how fast the server answered meanwhile."""
    watch = Watch(address)
    watch.start()
    try:
        return action(), watch.end()
    finally:
        watch.end()


def loaded(address: str, jobs: Sequence[Job], chosen: argparse.Namespace) -> list[Listening]:
    """Let the clients do all jobs, which they begin to queue at the same moment."""
    start = threading.Barrier(chosen.clients)
    shares = [jobs[number :: chosen.clients] for number in range(chosen.clients)]
    clients = [Listening(address, share, start, chosen.time_limit) for share in shares]
    for one in clients:
        one.start()
    for one in clients:
        while one.is_alive():
            one.join(0.5)  # in pieces, so that Ctrl-C gets through
    return clients


def images_of(client: ComfyClient, job: Job) -> list[Tensor]:
    """The pixels of a pair that is in the server's history."""
    entry = client.history(job.prompt_id)
    return pixels_of(Result(job.prompt_id, job.workflow, entry["outputs"], 0.0, {}, client))


def pixels_of(result: Result) -> list[Tensor]:
    """The pair's pixels, ``(1, H, W, 3)`` each; WorkflowError when there is no pair.

    Files also hold the workflow, and are not compared.
    """
    try:
        return [torch.from_numpy(result.pixels(title)).short() for title in IMAGES]
    except KeyError as error:
        raise WorkflowError(error.args[0]) from None


def changes(number: int, found: Sequence[Tensor], alone: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Where a prompt's images are not those of the same prompt alone, and by how much (of 255)."""
    return [
        {
            "prompt": number, "image": title, "largest": int((a - b).abs().max()),
            "share": round(float((a != b).float().mean()), 4),
        }
        for title, a, b in zip(IMAGES, found, alone, strict=True) if not torch.equal(a, b)
    ]  # fmt: skip


def put_in_order(client: ComfyClient, jobs: Sequence[Job]) -> None:
    """Note for every job that ran which place it had in the order of the runs, by the server's clock."""
    starts = {}
    for job in (job for job in jobs if job.fate in (FINISHED, STOPPED)):
        starts[job.number] = client.history(job.prompt_id)["status"]["messages"][0][1]["timestamp"]
    order = sorted(starts, key=starts.get)
    for job in jobs:
        job.place = order.index(job.number) if job.number in starts else None


def about(job: Job) -> dict[str, Any]:
    return {"prompt": job.number, "fate": job.fate, "cancel": job.cancel, "place": job.place}


def fates(jobs: Sequence[Job]) -> dict[str, Any]:
    """How many jobs ended how, and how many were asked to be cancelled."""
    counts = Counter(job.fate for job in jobs)
    names = {"finished": FINISHED, "cancelled_running": STOPPED, "cancelled_waiting": REMOVED, "failed": FAILED}
    return {
        **{name: counts[fate] for name, fate in names.items()}, "lost": counts[LOST],
        "to_cancel": sum(job.cancel is not None for job in jobs),
        "cancelled_unasked": sum(job.fate in (STOPPED, REMOVED) and not job.cancelled for job in jobs),
    }  # fmt: skip


def heard_ends(jobs: Sequence[Job]) -> int:
    """Of the jobs that ran, how many ends their clients heard on the websocket."""
    return sum(job.heard_end for job in jobs if job.fate in (FINISHED, STOPPED))


def problems(record: Mapping[str, Any], of_clients: Sequence[str]) -> list[str]:
    """What must not be, as sentences; empty when all is well."""
    found = [f"a client gave up: {problem}" for problem in of_clients if problem]
    wrong = {
        "lost": "prompts neither finished nor were cancelled",
        "failed": "prompts failed",
        "cancelled_unasked": "prompts were cancelled although nobody asked for it",
        "foreign_messages": "messages reached a client that they were not for",
    }
    found += [f"{record[name]} {what}." for name, what in wrong.items() if record[name]]
    if record["differing"]:
        found.append(f"prompts {record['differing']} gave other images than alone.")
    if record["latency"]["failed"]:
        found.append(f"the server left {record['latency']['failed']} requests unanswered.")
    return found


def table(record: Mapping[str, Any]) -> str:
    counts = [("prompts", "clients", "finished", "cancelled running", "cancelled waiting", "lost", "other images", "s")]
    names = ("prompts", "clients", "finished", "cancelled_running", "cancelled_waiting", "lost")
    differing = f"{len(record['differing'])} of {record['compared']}"
    counts.append((*(str(record[name]) for name in names), differing, f"{record['seconds']:.0f}"))
    times = [("request", "while", "requests", "median ms", "p99 ms", "worst ms")]
    for when, latency in (("idle", record["latency_idle"]), ("loaded", record["latency"])):
        for path in WATCHED:
            values = (str(latency[path][name]) for name in ("requests", "median_ms", "p99_ms", "worst_ms"))
            times.append((f"GET {path}", when, *values))
    return "\n".join(["", f"{record['device']}, {record['machine']['cpu']}", *aligned(counts), "", *aligned(times)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
