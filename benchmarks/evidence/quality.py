"""Does steering do what it claims: steering against four baselines and three controls, over five concept pairs.

Every method starts from the same factual images, its parameter swept; pairs are scored by the one scorer,
`scores.scorer`, against the noise ceiling. Truth is known for renders only: what is said of generated images
is the judges' opinion. What was made is kept in output/bench/quality, so a run that was stopped goes on.

    python dev.py bench quality --n 40
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence import _curves, _paired
from benchmarks.evidence._methods import BASELINES, CONTROLS, METHODS, Method, methods
from benchmarks.evidence._store import Result, Store
from benchmarks.shared import presets as _presets
from benchmarks.shared.command import check_scoring, common_options, finish
from benchmarks.shared.lab import BATCH, Lab, comfyui_version, start_comfyui
from benchmarks.shared.presets import PAIRS, SPLITS, Pair, Presets
from benchmarks.shared.record import machine, seeds_record, table
from benchmarks.shared.sheet import sheet
from medsteer_core.endophantom.bundle import Bundle
from medsteer_core.files.whole_file import write_whole
from medsteer_core.pictures.difference import png
from medsteer_core.run.demo import versions
from medsteer_core.scores import scorer as evaluate

SHEET_ROWS = 3
CEILING_RENDERS = 64
BYTES_CHECKED = "strength_0"


def main(words: list[str]) -> int:
    options = common_options("quality", "Steering against baselines and controls over five concept pairs.")
    options.add_argument("--n", type=int, default=40, help="pairs of each concept pair (40)")
    options.add_argument("--n-curve", type=int, help="pairs of the settings that are only on a curve (as --n)")
    options.add_argument("--split", choices=list(SPLITS), default="test", help="which seeds (test)")
    options.add_argument("--pairs", nargs="+", metavar="PAIR", help="only these, such as 'polyps -> normal cecum'")
    options.add_argument("--methods", nargs="+", metavar="METHOD", choices=[*METHODS, *CONTROLS], help="only these")
    options.add_argument("--preset", metavar="JSON", help="change our presets; development seeds only")
    chosen = options.parse_args(words)
    if not 1 <= chosen.n <= _presets.MOST:
        options.error(f"--n wants 1 to {_presets.MOST}")
    if chosen.n_curve is None or chosen.n_curve > chosen.n:
        chosen.n_curve = chosen.n
    if chosen.n_curve < 1:
        options.error("--n-curve wants 1 or more")
    if chosen.preset and chosen.split != "development":
        options.error("--preset is for --split development: nothing may be chosen on the test seeds")
    _presets.check_pairs(options, chosen.pairs)
    record = finish(name_of(chosen), chosen, run, table)
    return record if isinstance(record, int) else 0


def name_of(chosen: argparse.Namespace) -> str:
    """The results' file name: what is not the whole benchmark on test seeds never replaces it."""
    parts = ["quality", "" if chosen.split == "test" else chosen.split]
    return "-".join([*filter(None, parts), *(["part"] if chosen.pairs or chosen.methods else [])])


def run(chosen: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    """Make and score everything that is not there yet: the record for quality.json, and the plot."""
    check_scoring()
    presets = Presets().varied(chosen.preset) if chosen.preset else Presets()
    print("starting ComfyUI in this process ...", flush=True)
    start_comfyui(chosen.cpu)
    comfyui = comfyui_version()
    lab = Lab()
    store = Store(lab, chosen.output / "quality", comfyui)
    first = SPLITS[chosen.split]
    seeds = Seeds(range(first, first + chosen.n), range(first, first + chosen.n_curve))
    jobs = planned(lab, store, presets, chosen.pairs, chosen.methods)
    show = Progress(cost_left(store, jobs, seeds))
    pairs, blocks = {}, {}
    for pair, chosen_methods in jobs.items():
        ceiling = named(evaluate.noise_ceiling(pair.source, pair.target, CEILING_RENDERS, _presets.CEILING_SEED))
        rows = {m.name: method_record(store, pair, m, seeds, ceiling, show) for m in chosen_methods.values()}
        pairs[pair.name] = {
            "methods": rows, "ceiling": ceiling, "diffuse": pair.diffuse, "kind": pair.kind, "split": chosen.split,
            **domination(rows, pair.diffuse), "other_vector_of": _presets.OTHER[pair].name,
            "differences_from_ours": differences(store, pair, chosen_methods, seeds),
        }  # fmt: skip
        blocks[pair.name] = shown(store, pair, chosen_methods, seeds.headline)
    chosen.output.mkdir(parents=True, exist_ok=True)
    columns = ["factual", *(name for name in next(iter(jobs.values())) if name != BYTES_CHECKED)]
    write_whole(chosen.output / f"{name_of(chosen)}_pairs.png", png(sheet(columns, blocks)))
    record = {
        "benchmark": "quality",
        "pairs": pairs,
        "seeds": seeds_record(chosen.split, chosen.n),
        "machine": machine(lab.model.load_device),
        "versions": versions({"comfyui_version": comfyui, "pytorch_version": torch.__version__}),
        "settings": {
            **store.settings,
            "n": chosen.n,
            "n_curve": chosen.n_curve,
            "batch": BATCH,
            "presets": presets.to_dict(),
        },
        "endophantom_sha256": Bundle().sha256(),
        "judges": "EndoPhantom's own, trained on renders only: flip rates are a judge's opinion",
        "seconds": "of sampling a pair, factual and counterfactual, with what the method needs besides for it",
        "notice": "Synthetic images for research. Not for diagnosis.",
    }
    return record, _curves.plot(pairs)


@dataclass(frozen=True)
class Seeds:
    """The seeds of a method's reported setting, and the first of them, for the settings that are only on its curve."""

    headline: range
    curve: range

    def of(self, method: Method, value: float) -> range:
        return self.headline if value == method.headline else self.curve


def planned(
    lab: Lab, store: Store, presets: Presets, pair_names: Sequence[str] | None, method_names: Sequence[str] | None
) -> dict[Pair, dict[str, Method]]:
    """The methods to run for each pair, of those that are asked for (None: all)."""
    pairs = [pair for pair in PAIRS if not pair_names or pair.name in pair_names]
    return {
        pair: {
            name: method
            for name, method in methods(lab, store, pair, presets).items()
            if not method_names or name in method_names
        }
        for pair in pairs
    }


def chunks(seeds: range) -> list[range]:
    """Seeds by the batch; whole batches are the same for every --n, so that a larger run goes on from a smaller."""
    return [seeds[start : start + BATCH] for start in range(0, len(seeds), BATCH)]


def results(store: Store, pair: Pair, method: Method, value: float, seeds: range) -> list[Result]:
    """The scored chunks of a method at one value of its parameter."""
    return [store.result(pair, method, value, part, method.name == BYTES_CHECKED) for part in chunks(seeds)]


def summary(found: Sequence[Result]) -> dict[str, Any]:
    """Chunks as one record: the scorer's summary under the benchmark's names, and the seconds a pair."""
    scores = [score for result in found for score in result.scores]
    record = named(evaluate.summarise(scores))
    record["seconds"] = round(sum(result.seconds for result in found) / len(scores), 4)
    del record["identical"]  # counts equal pixels of accepted pairs; here it means every byte of every pair
    if all(result.identical is not None for result in found):
        record["identical"] = sum(result.identical for result in found) == len(scores)
    return record


def named(record: Mapping[str, Any]) -> dict[str, Any]:
    """The scorer's record under the benchmark's shorter names."""
    return {name.replace("flip_rate", "flip").replace("_interval", "_ci"): value for name, value in record.items()}


def method_record(
    store: Store, pair: Pair, method: Method, seeds: Seeds, ceiling: Mapping[str, float], show: Progress
) -> dict[str, Any]:
    """A method's record: its numbers at the reported setting, and its curve over the parameter."""
    curve, numbers = [], {}
    for value in method.values:
        cost = cost_left(store, {pair: {method.name: method}}, seeds, (value,))
        numbers[value] = summary(results(store, pair, method, value, seeds.of(method, value)))
        show.done(cost, pair, method, value, numbers[value])
        curve.append({"parameter": method.parameter, "value": value, **numbers[value]})
    head = numbers[method.headline]
    ceilings = {"ssim_ceiling": ceiling["ssim_outside"], "anatomy_drift_ceiling": ceiling["anatomy_drift"]}
    return {**head, **ceilings, "parameter": method.parameter, "value": method.headline, "curve": curve}


def differences(store: Store, pair: Pair, chosen: Mapping[str, Method], seeds: Seeds) -> dict[str, Any]:
    """Each method's reported setting minus ours, seed by seed (`_paired.differences`)."""
    found = {
        name: [score for part in results(store, pair, method, method.headline, seeds.headline) for score in part.scores]
        for name, method in chosen.items()
    }
    return _paired.differences(found, "ours")


def domination(rows: Mapping[str, Mapping[str, Any]], diffuse: bool) -> dict[str, dict[str, bool | None]]:
    """Whether ours dominates each baseline: by the curves (`_curves.dominates`), and at the reported settings alone."""
    if "ours" not in rows:
        return {"dominates": {}, "dominates_at_headline": {}}
    there = [name for name in BASELINES if name in rows]
    ours = rows["ours"]

    def compare(of: Callable[[Mapping[str, Any]], Sequence[Mapping[str, Any]]]) -> dict[str, bool | None]:
        mine = _curves.points(of(ours), diffuse)
        return {name: _curves.dominates(mine, _curves.points(of(rows[name]), diffuse)) for name in there}

    return {"dominates": compare(lambda row: row["curve"]), "dominates_at_headline": compare(lambda row: [row])}


def cost_left(store: Store, jobs: Mapping[Pair, Mapping[str, Method]], seeds: Seeds, values=None) -> float:
    """Runs of the sampler that are still to be made; scoring and decoding count as nothing."""
    cost, extractions, factuals = 0.0, set(), set()
    for pair, some in jobs.items():
        for method in some.values():
            for value in values or method.values:
                parts = chunks(seeds.of(method, value))
                left = [part for part in parts if not store.is_scored(pair, method, value, part)]
                cost += method.cost(value) * sum(len(part) for part in left)
                factuals |= {(pair, part) for part in left if not store.has_factual(pair, part)}
                if left:
                    extractions |= {needed for needed in method.vectors if not store.vector_path(*needed).is_file()}
    return cost + sum(len(part) for _, part in factuals) + sum(2 * samples for *_, samples in extractions)


@dataclass
class Progress:
    """A line for every setting that is done, with the time that the rest will take at the rate so far."""

    total: float
    made: float = 0.0

    def __post_init__(self) -> None:
        self._begun = time.monotonic()

    def done(self, cost: float, pair: Pair, method: Method, value: float, numbers: Mapping[str, Any]) -> None:
        self.made += cost
        share = self.made / self.total if self.total else 1.0
        spent = time.monotonic() - self._begun
        rest = f"about {spent * (1 / share - 1) / 60:.0f} min left" if self.made else "from what is stored"
        flip = "-" if numbers["flip"] is None else f"{numbers['flip']:.2f}"
        what = f"{pair.name}: {method.name} {value:g}, n {numbers['n']}, flip {flip}"
        print(f"{100 * share:3.0f}%  {what}; {spent / 60:.1f} min, {rest}", flush=True)


def shown(store: Store, pair: Pair, chosen: Mapping[str, Method], seeds: range) -> Tensor:
    """A pair's first factual images, each with the methods' counterfactuals at their reported settings.

    ``(rows, 1 + methods, 3, H, W)``; strength 0 is left out, since it shows the factual.
    """
    part = chunks(seeds)[0]
    columns = [store.factual(pair, part)[0].latents]
    columns += [
        store.latents(pair, method, method.headline, part)[0]
        for method in chosen.values()
        if method.name != BYTES_CHECKED
    ]
    return torch.stack([store.lab.images(latents[:SHEET_ROWS]) for latents in columns], dim=1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
