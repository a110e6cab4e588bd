"""What steering and capturing add to a model call, against an unsteered one and the published repositories' way.

Every round makes each kind of run once, in random order, in one process: on EndoPhantom and on blocks of PixArt-XL's
width. A ratio is the median over the rounds of one kind's time a call by the unsteered time of the same round. The
operators are also timed by themselves, against the time in which the machine could move the bytes that they must.

    python dev.py bench overhead
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.shared.bootstrap import interval
from benchmarks.shared.command import aligned, common_options, finish
from benchmarks.shared.lab import comfyui_version, start_comfyui
from benchmarks.shared.record import machine
from benchmarks.speed import _overhead, _overhead_floor
from medsteer_core.errors import MedSteerError
from medsteer_core.run.demo import versions

STEPS = 20
RESAMPLES = 4000
BASE = "unsteered"
# At most so much of an unsteered call's time; the operator itself, of its floor.
TARGETS = {
    "endophantom": {"steered_1": 1.05, "steered_2": 1.05, "steered_4": 1.05, "affine": 1.05, "capture": 1.05},
    "pixart_xl_width": {"steered_1": 1.02, "steered_2": 1.02, "steered_4": 1.02, "affine": 1.02, "capture": 1.03},
}
OF_FLOOR = 4.0
Times = dict[str, list[tuple[float, float]]]


def main(words: list[str]) -> int:
    options = common_options("overhead", "Time that steering and capturing add to a model call.")
    options.add_argument("--rounds", type=int, default=40, help="runs of each kind on EndoPhantom (40)")
    options.add_argument("--steps", type=int, default=STEPS, help=f"model calls of each of these runs ({STEPS})")
    options.add_argument("--wide-rounds", type=int, default=9, help="calls of each kind at PixArt-XL's width (9)")
    options.add_argument("--blocks", type=int, default=4, help="blocks of PixArt-XL's width (4)")
    options.add_argument("--side", type=int, default=64, help="side of their latent, 64 for 1024 tokens (64)")
    chosen = options.parse_args(words)
    if min(chosen.rounds, chosen.steps, chosen.wide_rounds, chosen.blocks) < 1 or chosen.side < 2:
        options.error("--rounds, --steps, --wide-rounds and --blocks want 1 or more, --side 2 or more")
    record = finish("overhead", chosen, run, table)
    return record if isinstance(record, int) else 0


def run(chosen: argparse.Namespace) -> tuple[dict[str, Any], None]:
    """Measure both models: the record for overhead.json, and no picture."""
    print("starting ComfyUI in this process ...", flush=True)
    start_comfyui(chosen.cpu)
    wanted = {
        "endophantom": (lambda: _overhead.endophantom(chosen.steps), chosen.rounds),
        "pixart_xl_width": (lambda: _overhead.pixart_xl_width(chosen.blocks, chosen.side), chosen.wide_rounds),
    }
    stacks: dict[str, Any] = {}
    for name, (make, rounds) in wanted.items():
        print(f"{name}, {rounds} rounds ...", flush=True)
        stack = make()
        times = measured(_overhead.ways(stack), rounds)
        blocks, shape, dtype = _overhead.activations(stack)
        floor = _overhead_floor.operators(shape, stack.device, dtype, 60)
        stacks[name] = {"blocks": blocks, "rounds": rounds, "calls": summary(times), "operator": floor}
        device = str(stack.device)
    ratios = {name: {way: row["ratio"] for way, row in stack["calls"].items()} for name, stack in stacks.items()}
    record = {
        "benchmark": "overhead",
        "ratios": ratios,
        "stacks": stacks,
        "targets": targets(ratios, stacks),
        "settings": {
            "steered": _overhead.SUPPRESS.to_dict(), "affine": {**_overhead.AFFINE.to_dict(), "rank": _overhead.RANK},
            "rows": "all", "steps": chosen.steps, "side": chosen.side,
        },
        "machine": machine(torch.device(device)),
        "versions": versions({"comfyui_version": comfyui_version(), "pytorch_version": torch.__version__}),
    }  # fmt: skip
    return record, None


def measured(ways: Mapping[str, Any], rounds: int) -> Times:
    """(wall, CPU) milliseconds a call of each way in each round, after one round that does not count."""
    order, draw = list(ways), random.Random(0)
    times: Times = {name: [] for name in ways}
    for number in range(rounds + 1):
        draw.shuffle(order)
        for name in order:
            found = ways[name]()
            if number:
                times[name].append(found)
    return times


def summary(times: Times) -> dict[str, dict[str, Any]]:
    """Each way's median milliseconds a call and its ratio to the unsteered call of the same round, with 95% interval.

    Raises MedSteerError for times that can't be compared.
    """
    rows = {}
    for name, pairs in times.items():
        own, base = np.array(pairs), np.array(times[BASE])
        if not (own > 0).all():
            raise MedSteerError(f"a call of '{name}' took no time at all; the clock of this machine is too coarse.")
        middle, (ratio, cpu_ratio) = np.median(own, axis=0), np.median(own / base, axis=0)
        rows[name] = {
            "ms": round(float(middle[0]), 4), "cpu_ms": round(float(middle[1]), 4),
            "ratio": round(float(ratio), 5), "ratio_ci": median_interval((own / base)[:, 0]),
            "cpu_ratio": round(float(cpu_ratio), 5), "cpu_ratio_ci": median_interval((own / base)[:, 1]),
        }  # fmt: skip
    return rows


def median_interval(values: Sequence[float], resamples: int = RESAMPLES) -> list[float]:
    """The bootstrap's 95% interval of the median."""
    given = np.asarray(values)
    drawn = np.random.default_rng(0).integers(0, len(given), (resamples, len(given)))
    return [round(value, 5) for value in interval(np.median(given[drawn], axis=1))]


def targets(ratios: Mapping[str, Mapping[str, float]], stacks: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What was aimed at, what was found, and whether that is within it."""
    found = {}
    for name, limits in TARGETS.items():
        found |= {f"{name}: {way}": (ratios[name][way], limit) for way, limit in limits.items()}
    for name, stack in stacks.items():
        for operator, row in stack["operator"]["operators"].items():
            found[f"{name}: {operator}, times its floor"] = (row["times_floor"], OF_FLOOR)
    return {what: {"found": value, "most": most, "met": value <= most} for what, (value, most) in found.items()}


def table(record: Mapping[str, Any]) -> str:
    text = []
    for name, stack in record["stacks"].items():
        own = stack["operator"]
        lines = [("run", "ms a call", "of unsteered [95%]", "CPU ms", "of unsteered [95%]")]
        for way, row in stack["calls"].items():
            shown = [f"{row[key]:.3f} [{row[f'{key}_ci'][0]:.3f}, {row[f'{key}_ci'][1]:.3f}]" for key in KINDS]
            lines.append((way, f"{row['ms']:.2f}", shown[0], f"{row['cpu_ms']:.2f}", shown[1]))
        rows, tokens, width = own["shape"]
        title = f"{name}: {stack['blocks']} blocks, {rows} rows of {tokens} tokens, width {width}, {own['dtype']}"
        text += ["", title, *aligned(lines), ""]
        lines = [("operator alone", "microseconds", "times the floor", "times a copy in cache")]
        for operator, row in own["operators"].items():
            shares = (f"{row['times_floor']:.2f}", f"{row['times_warm_floor']:.2f}")
            lines.append((operator, f"{row['microseconds']:.1f}", *shares))
        text += aligned(lines)
        text.append(
            f"floor: {own['bytes_moved'] / 1e6:.2f} MB at {own['memory_gb_s']:.1f} GB/s of memory, "
            f"{own['floor_microseconds']:.1f} microseconds (in cache {own['warm_gb_s']:.1f} GB/s)"
        )
    missed = [
        f"  {what}: {one['found']:.3f} of {one['most']}" for what, one in record["targets"].items() if not one["met"]
    ]
    text += ["", "every target met" if not missed else "NOT met:", *missed]
    return "\n".join(text)


KINDS = ("ratio", "cpu_ratio")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
