"""Which operator with which estimator: flips and structure of every combination that means something.

This is where defaults are chosen, so it runs on development seeds only. Every vector comes from the same recorded
samples, every counterfactual from the same factual images; operators are swept over a few strengths, in the window and
rows of our preset for that kind of pair, without a structure lock. The best row is the one with the most clean flips
(`_operators_numbers`), and is then run under the lock as well. What was made is kept in output/bench/operators, so a
run that was stopped goes on.

    python dev.py bench operators --n 24
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence import _operators
from benchmarks.evidence._method import Method
from benchmarks.evidence._operators import (
    LEFT_OUT,
    LateRuns,
    Vectors,
    arms,
    method,
    methods,
    records_needed,
    same_direction,
)
from benchmarks.evidence._operators_numbers import LEAST_SSIM, MOST_DRIFT, numbers, paired_difference, ranking
from benchmarks.evidence._operators_plot import plot
from benchmarks.evidence._operators_table import table
from benchmarks.evidence._store import Store
from benchmarks.evidence.quality import Progress, Seeds, cost_left, results
from benchmarks.shared import presets as _presets
from benchmarks.shared.command import check_scoring, common_options, finish
from benchmarks.shared.lab import BATCH, Lab, comfyui_version, start_comfyui
from benchmarks.shared.presets import PAIRS, SPLITS, Pair
from benchmarks.shared.record import machine
from medsteer_core.endophantom.bundle import Bundle
from medsteer_core.run.demo import versions

SPLIT = "development"
Jobs = dict[Pair, dict[tuple[str, str], Method]]


def main(words: list[str]) -> int:
    options = common_options("operators", "Flips and structure of every operator with every estimator.")
    options.add_argument("--n", type=int, default=24, help="pairs of each concept pair (24)")
    options.add_argument("--split", choices=list(SPLITS), default=SPLIT, help=f"only {SPLIT}: defaults are chosen here")
    options.add_argument("--pairs", nargs="+", metavar="PAIR", help="only these, such as 'polyps -> normal cecum'")
    chosen = options.parse_args(words)
    if not 1 <= chosen.n <= _presets.MOST:
        options.error(f"--n wants 1 to {_presets.MOST}")
    if chosen.split != SPLIT:
        options.error(f"--split wants {SPLIT}: defaults are chosen here, and nothing may be chosen on the test seeds")
    _presets.check_pairs(options, chosen.pairs)
    record = finish(name_of(chosen), chosen, run, table)
    return record if isinstance(record, int) else 0


def name_of(chosen: argparse.Namespace) -> str:
    """The results' file name: some pairs never replace all of them."""
    return "operators-part" if chosen.pairs else "operators"


def run(chosen: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    """Make and score everything that is not there yet: the record for operators.json, and the plot."""
    check_scoring()
    print("starting ComfyUI in this process ...", flush=True)
    start_comfyui(chosen.cpu)
    lab, comfyui = Lab(), comfyui_version()
    store = Store(lab, chosen.output / "operators", comfyui)
    vectors, runs = Vectors(store), LateRuns(lab)
    first = SPLITS[SPLIT]
    seeds = range(first, first + chosen.n)
    pairs = [pair for pair in PAIRS if not chosen.pairs or pair.name in chosen.pairs]
    record_samples(vectors, pairs)
    equal = {pair.name: same_direction(vectors, pair) for pair in pairs}
    rows = swept(store, {pair: methods(vectors, runs, pair) for pair in pairs}, seeds)
    ranked = ranking(rows)
    best = {**ranked[0], "lock": locked_rows(vectors, runs, pairs, seeds, ranked[0])}
    record = {
        "benchmark": "operators",
        "rows": rows,
        "ranking": ranked,
        "best": best,
        "pairs": [pair.name for pair in pairs],
        "same_direction": equal,
        "left_out": LEFT_OUT,
        "clean": {"ssim_outside_at_least": LEAST_SSIM, "anatomy_drift_at_most": MOST_DRIFT},
        "seeds": {SPLIT: [seeds[0], seeds[-1]], "used": SPLIT, "extraction": _presets.EXTRACTION_SEED},
        "machine": machine(lab.model.load_device),
        "versions": versions({"comfyui_version": comfyui, "pytorch_version": torch.__version__}),
        "settings": {
            **store.settings, "n": chosen.n, "batch": BATCH, "samples": _operators.SAMPLES,
            "switch_against": _operators.COMMON,
            "windows": {pair.name: windows_of(pair) for pair in pairs},
        },
        "endophantom_sha256": Bundle().sha256(),
        "judges": "EndoPhantom's own, trained on renders only: flip rates are a judge's opinion",
        "notice": "Synthetic images for research. Not for diagnosis.",
    }  # fmt: skip
    return record, plot(record)


def windows_of(pair: Pair) -> dict[str, Any]:
    """What every operator but the published presets has for a pair: window, rows, sites, and the focus of affine."""
    ours = _presets.Presets().ours_for(pair)
    return {
        "start": ours.start, "end": ours.end, "rows": ours.rows, "sites": ours.sites,
        "focus of affine": ours.parameters["focus"],
    }  # fmt: skip


def record_samples(vectors: Vectors, pairs: Sequence[Pair]) -> None:
    """Record what is not there yet, with a line for each class."""
    left = [needed for needed in records_needed(pairs) if not vectors.record_path(*needed).is_file()]
    begun = time.monotonic()
    for done, (name, start) in enumerate(left, 1):
        vectors.record(name, start)
        spent = (time.monotonic() - begun) / 60
        what = f"samples {start} to {start + _operators.SAMPLES - 1} of {name}"
        rest = spent * (len(left) / done - 1)
        print(f"recorded {what}; {spent:.1f} min, about {rest:.1f} min of recording left", flush=True)


def kind_of(pair: Pair) -> str:
    """The kind of pair that a strength is chosen for: as our presets'."""
    return f"{pair.kind} diffuse" if pair.diffuse else pair.kind


def swept(store: Store, jobs: Jobs, seeds: range) -> list[dict[str, Any]]:
    """The row of every pair, operator, estimator and strength, with a line for each."""
    ours = Seeds(seeds, seeds)
    by_name = {pair: {method.name: method for method in some.values()} for pair, some in jobs.items()}
    show, rows = Progress(cost_left(store, by_name, ours)), []
    for pair, some in jobs.items():
        for (operator, estimator), one in some.items():
            for strength in one.values:
                cost = cost_left(store, {pair: {one.name: one}}, ours, (strength,))
                found = results(store, pair, one, strength, seeds)
                row = {
                    "pair": pair.name, "kind": kind_of(pair), "operator": operator, "estimator": estimator,
                    "strength": strength, "start": one.settings["start"], "rows": one.settings["rows"],
                    **numbers(found),
                }  # fmt: skip
                rows.append(row)
                show.done(cost, pair, one, strength, row)
    return rows


def locked_rows(
    vectors: Vectors, runs: LateRuns, pairs: Sequence[Pair], seeds: range, best: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The best row under our structure lock against itself without: the focal removals; None where there are none.

    ``difference``: flip rate with minus without, of the same factuals.
    """
    focal = [pair for pair in pairs if kind_of(pair) == "removing"]
    if not focal:
        return None
    arm = next(arm for arm in arms() if (arm.operator, arm.estimator) == (best["operator"], best["estimator"]))
    strength, store, ours = best["strengths"]["removing"], vectors.store, Seeds(seeds, seeds)
    both = {pair: [method(vectors, runs, pair, arm, lock) for lock in (True, False)] for pair in focal}
    show = Progress(cost_left(store, {pair: {one.name: one for one in two} for pair, two in both.items()}, ours,
                              (strength,)))  # fmt: skip
    rows, flips = {}, ([], [])
    for pair, (with_lock, without) in both.items():
        cost = cost_left(store, {pair: {with_lock.name: with_lock}}, ours, (strength,))
        found = [results(store, pair, one, strength, seeds) for one in (with_lock, without)]
        flipped = [[s.flipped for result in part for s in result.scores if s.accepted] for part in found]
        rows[pair.name] = {
            "with": numbers(found[0]), "without": numbers(found[1]), "difference": paired_difference(*flipped),
        }  # fmt: skip
        show.done(cost, pair, with_lock, strength, rows[pair.name]["with"])
        for pooled, part in zip(flips, flipped, strict=True):
            pooled += part
    ours_lock = _presets.OURS["removing"]
    return {
        "lock": ours_lock.lock, "threshold": ours_lock.lock_threshold, "dilation": ours_lock.lock_dilation,
        "strength": strength, "pairs": rows, "difference": paired_difference(*flips),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
