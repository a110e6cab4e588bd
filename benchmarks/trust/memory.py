"""Does a server that goes on and on keep its size? Runs of five kinds in one queue, and what each leaves behind.

Steered, unsteered, extracting, cancelled and failing runs take turns in one real server. After each a probe inside it
counts living hooks, tensors, ModelPatchers and MedSteer objects, and the resident memory of its process is read, once
as it is and once after the C library gave back what is free: it keeps that for later as it likes, in steps of many
megabytes, so only the second reading tells what is held. All must stay flat. Then extractions of few and of many
samples: their peaks must not differ.

    python dev.py bench memory
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.shared.command import aligned, common_options, finish
from benchmarks.shared.probe import Probed, probed_server
from benchmarks.shared.record import machine
from benchmarks.trust._memory_runs import KINDS, PERIOD, CycleOfRuns
from benchmarks.trust._slope import BLOCK, slope_of
from medsteer_core.run.demo import versions

MOST_BYTES_A_RUN = 50_000
MOST_OBJECTS_A_RUN = 0.05  # less than one more in 20 runs
PEAK_SAMPLES = (8, 64, 128)  # up to 32, batches and what is kept of tokens still fill
PEAK_STEPS, PEAK_ROUNDS = 2, 2
PEAK_NOISES = ("same state", "paired")
RESIDENT = ("resident", "resident_before_trim")
IN_BYTES = (*RESIDENT, "tensor_bytes")
COUNTED = ("tensors", "tensor_bytes", "patchers", "medsteer", "modules", "hooks")
CLASSIC = ("--cache-classic",)  # the default keeps outputs of earlier workflows where more than 128 GB are free


def main(words: list[str]) -> int:
    options = common_options("memory", "Memory and living objects of a server over many runs.")
    options.add_argument("--runs", type=int, default=200, help="runs that are measured (200)")
    options.add_argument("--warm-up", type=int, default=20, help="runs before them (20)")
    options.add_argument("--keep-history", action="store_true", help="let ComfyUI's history grow as it does")
    chosen = options.parse_args(words)
    if chosen.runs < 2 * BLOCK * PERIOD or chosen.warm_up < 0:
        options.error(f"--runs wants {2 * BLOCK * PERIOD} or more, --warm-up 0 or more")
    record = finish("memory", chosen, run, table)
    if isinstance(record, int):
        return record
    if not record["flat"]:
        print("error: something grows from run to run; see the table.", file=sys.stderr)
    return 0 if record["flat"] else 1


def run(chosen: argparse.Namespace) -> tuple[dict[str, Any], None]:
    """Measure everything: the record for memory.json, and no picture."""
    print("starting ComfyUI ...", end="", flush=True)
    with probed_server(True if chosen.cpu else None, CLASSIC) as probed:
        print(f" on the {probed.server.device}, {probed.server.seconds_to_start:.1f} s", flush=True)
        readings = run_cycles(probed, chosen.warm_up + chosen.runs, forget=not chosen.keep_history, told=True)
        peaks = peaks_of_extraction(probed)
        made_with, device = versions(probed.client.system_stats()["system"]), probed.server.device
    measured = readings[chosen.warm_up :]
    growth = growths(measured)
    return {
        "benchmark": "memory", "runs": chosen.runs, "warm_up": chosen.warm_up, "kinds": list(KINDS),
        "flat": all(row["flat"] in (True, None) for row in growth.values()), "growth": growth, "peaks": peaks,
        "most_bytes_a_run": MOST_BYTES_A_RUN, "most_objects_a_run": MOST_OBJECTS_A_RUN,
        "history_kept": chosen.keep_history, "estimator": " ".join(slope_of.__doc__.split()),
        "device": device, "machine": machine(torch.device(device.lower().replace("gpu", "cuda"))),
        "versions": made_with, "readings": readings,
    }, None  # fmt: skip


def run_cycles(probed: Probed, runs: int, forget: bool = True, told: bool = False) -> list[dict[str, Any]]:
    """Runs of every kind in turn; what there was after each.

    forget: empty ComfyUI's history after each run, since it is to grow.
    """
    cycle = CycleOfRuns(probed)
    readings = []
    for number in range(runs):
        kind, seconds = cycle.run(number)
        if forget:
            probed.forget()
        counts, untrimmed = probed.counts(), probed.resident()
        probed.trim()
        resident = {"resident": probed.resident(), "resident_before_trim": untrimmed}
        readings.append({"kind": kind, "seconds": round(seconds, 3), **resident, **counts})
        if told and number % 25 == 24:
            print(f"  run {number + 1} of {runs}: {readings[-1]['resident'] / 1e6:.1f} MB", flush=True)
    return readings


def growths(readings: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For the resident memory and every count: least and most, slope a run with its interval, and whether it is flat.

    No hook may be left after any run; all else is flat by the upper end of the slope's interval. The memory before
    free memory was given back is shown, not judged: None.
    """
    result = {}
    for name in (*RESIDENT, *COUNTED):
        values = [reading[name] for reading in readings]
        slope = slope_of(values, PERIOD)
        most = MOST_BYTES_A_RUN if name in IN_BYTES else MOST_OBJECTS_A_RUN
        flat = not any(values) if name == "hooks" else slope.high < most
        flat = None if name == "resident_before_trim" else flat
        result[name] = {"least": min(values), "most": max(values), **slope.to_dict(), "flat": flat}
    return result


def peaks_of_extraction(
    probed: Probed, samples: Sequence[int] = PEAK_SAMPLES, rounds: int = PEAK_ROUNDS
) -> list[dict[str, Any]]:
    """The most memory that extractions take over what the server held before, in turn, unused memory returned first."""
    cycle = CycleOfRuns(probed)
    rows = []
    for noise in PEAK_NOISES:
        found: dict[int, list[int]] = {count: [] for count in samples}
        for turn in range(rounds + 1):
            for count in samples:
                probed.trim()
                before = probed.resident()
                with probed.peak() as most:
                    cycle.extract_of(count, noise, PEAK_STEPS, seed=10**6 * (turn + 1) + 10**4 * count)
                if turn:  # the first turn loads what every later one finds there
                    found[count].append({"before": before, "peak": most[0]})
        rows += [{"noise": noise, "samples": count, "readings": readings} for count, readings in found.items()]
        print(f"  peaks of extraction, noise {noise}: done", flush=True)
    return rows


def table(record: Mapping[str, Any]) -> str:
    lines = [("after each run", "least", "most", "change a run [95%]", "flat")]
    for name, row in record["growth"].items():
        in_bytes = name in IN_BYTES
        unit, form = (1e6, "{:.1f} MB") if in_bytes else (1, "{:.0f}")
        ends = [form.format(row[key] / unit) for key in ("least", "most")]
        numbers = [value / (1e3 if in_bytes else 1) for value in (row["slope"], *row["interval"])]
        shown = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*numbers) + (" kB" if in_bytes else "")
        lines.append((name.replace("_", " "), *ends, shown, {True: "yes", False: "NO", None: "-"}[row["flat"]]))
    peaks = [("extraction", "samples", "peak over what was there, MB")]
    for row in record["peaks"]:
        over = ", ".join(f"{(reading['peak'] - reading['before']) / 1e6:.1f}" for reading in row["readings"])
        peaks.append((row["noise"], str(row["samples"]), over))
    head = f"{record['runs']} runs ({', '.join(record['kinds'])}) after {record['warm_up']}, {record['device']}"
    return "\n".join(["", head, *aligned(lines), "", *aligned(peaks)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
