"""Does steering do what it claims: steering against seven baselines and three controls, over eight concept pairs.

Every method starts from the same factual images and is offered the same windows and locks; its setting is chosen on
development seeds by one rule (`_choice`), and reported of test seeds. Pairs are scored by the one scorer,
`scores.scorer`, against the noise ceiling. Truth is known for renders only: what is said of generated images
is the judges' opinion. What was made is kept in output/bench/quality, so a run that was stopped goes on.

    python dev.py bench quality --split development --n 24 --choose
    python dev.py bench quality --n 200 --n-curve 60
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence import _choice, _curves, _paired
from benchmarks.evidence._method import Method
from benchmarks.evidence._methods import BASELINES, CONTROLS, METHODS, RECIPE, methods
from benchmarks.evidence._store import Result, Store
from benchmarks.shared import presets as _presets
from benchmarks.shared.command import check_scoring, common_options, finish
from benchmarks.shared.lab import BATCH, Lab, comfyui_version, start_comfyui
from benchmarks.shared.presets import ALL_PAIRS, SPLITS, Pair, Presets
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

Setting = tuple[Method, float]  # an arm and a value of its parameter


def main(words: list[str]) -> int:
    options = common_options("quality", "Steering against baselines and controls over eight concept pairs.")
    options.add_argument("--n", type=int, default=40, help="pairs of each concept pair (40)")
    options.add_argument("--n-curve", type=int, help="pairs of settings that are only on a curve (as --n; 0: none)")
    options.add_argument("--split", choices=list(SPLITS), default="test", help="which seeds (test)")
    options.add_argument("--pairs", nargs="+", metavar="PAIR", help="only these, such as 'polyps -> normal cecum'")
    options.add_argument("--methods", nargs="+", metavar="METHOD", choices=[*METHODS, *CONTROLS], help="only these")
    options.add_argument("--choose", action="store_true", help="write what development seeds say into chosen.json")
    options.add_argument("--preset", metavar="JSON", help="change our presets; development seeds only")
    chosen = options.parse_args(words)
    if not 1 <= chosen.n <= _presets.MOST:
        options.error(f"--n wants 1 to {_presets.MOST}")
    if chosen.n_curve is None or chosen.n_curve > chosen.n:
        chosen.n_curve = chosen.n
    if chosen.n_curve < 0:
        options.error("--n-curve wants 0 or more")
    if (chosen.preset or chosen.choose) and chosen.split != "development":
        options.error("--preset and --choose are for --split development: nothing may be chosen on the test seeds")
    if chosen.split == "development":
        chosen.n_curve = chosen.n
    _presets.check_pairs(options, chosen.pairs, ALL_PAIRS)
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
    known = None if chosen.split == "development" else _choice.read()
    reported = {pair: reported_of(pair, jobs[pair], known) for pair in jobs}
    show = Progress(cost_left(store, settings_of(jobs, reported, seeds)))
    pairs, blocks = {}, {}
    for pair, chosen_methods in jobs.items():
        ceiling = named(evaluate.noise_ceiling(pair.source, pair.target, CEILING_RENDERS, _presets.CEILING_SEED))
        rows, heads = {}, {}
        for name, arms in chosen_methods.items():
            rows[name], heads[name] = method_record(store, pair, arms, reported[pair][name], seeds, ceiling, show)
        pairs[pair.name] = {
            "methods": rows, "ceiling": ceiling, "diffuse": pair.diffuse, "kind": pair.kind, "split": chosen.split,
            **domination(rows, pair.diffuse), "other_vector_of": _presets.OTHER[pair].name,
            "differences_from_ours": differences(store, pair, heads, seeds),
        }  # fmt: skip
        blocks[pair.name] = shown(store, pair, heads, seeds.headline)
    if chosen.choose:
        _choice.keep({name: {m: row["setting"] for m, row in pair["methods"].items() if m in METHODS}
                      for name, pair in pairs.items()})  # fmt: skip
    chosen.output.mkdir(parents=True, exist_ok=True)
    columns = ["factual", *(name.replace("_", " ") for name in next(iter(jobs.values())) if name != BYTES_CHECKED)]
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

    def of(self, reported: Setting | None, setting: Setting) -> range:
        """Of a setting; ``reported`` is the method's own, None where every setting may still be that."""
        return self.headline if reported is None or setting == reported else self.curve


def planned(
    lab: Lab, store: Store, presets: Presets, pair_names: Sequence[str] | None, method_names: Sequence[str] | None
) -> dict[Pair, dict[str, tuple[Method, ...]]]:
    """The methods to run for each pair with their arms, of those that are asked for (None: all)."""
    pairs = [pair for pair in ALL_PAIRS if not pair_names or pair.name in pair_names]
    return {
        pair: {
            name: arms
            for name, arms in methods(lab, store, pair, presets).items()
            if not method_names or name in method_names
        }
        for pair in pairs
    }


def reported_of(
    pair: Pair, jobs: Mapping[str, Sequence[Method]], known: Mapping[str, Mapping[str, str]] | None
) -> dict[str, Setting | None]:
    """Each method's setting that is reported: as it was chosen, None where it is still to be (``known`` is None)."""
    return {
        name: _choice.chosen_of(pair.name, arms, known) if known is not None or _settings(arms) == 1 else None
        for name, arms in jobs.items()
    }


def _settings(arms: Sequence[Method]) -> int:
    return sum(len(arm.values) for arm in arms)


def settings_of(
    jobs: Mapping[Pair, Mapping[str, Sequence[Method]]],
    reported: Mapping[Pair, Mapping[str, Setting | None]],
    seeds: Seeds,
) -> list[tuple[Pair, Method, float, range]]:
    """Everything that is to be made: pair, arm, value and seeds."""
    return [
        (pair, arm, value, seeds.of(reported[pair][name], (arm, value)))
        for pair, some in jobs.items()
        for name, arms in some.items()
        for arm in arms
        for value in arm.values
    ]  # fmt: skip


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
    store: Store,
    pair: Pair,
    arms: Sequence[Method],
    reported: Setting | None,
    seeds: Seeds,
    ceiling: Mapping[str, float],
    show: Progress,
) -> tuple[dict[str, Any], Setting]:
    """A method's record: its numbers at the reported setting, and its curves over arms and parameter; the setting."""
    curve, settings = [], {}
    for arm in arms:
        some = [value for value in arm.values if len(seeds.of(reported, (arm, value)))]
        cost = cost_left(store, [(pair, arm, value, seeds.of(reported, (arm, value))) for value in some])
        if reported is None and arm.run_many is not None:
            for part in chunks(seeds.headline):
                store.make_many(pair, arm, some, part)
        for value in some:
            numbers = summary(results(store, pair, arm, value, seeds.of(reported, (arm, value))))
            curve.append({"parameter": arm.parameter, "value": value, "setting": arm.setting(value), **numbers})
            settings[arm.setting(value)] = arm, value
            show.done(cost / len(some), pair, arm, value, numbers)
    if reported is None:
        head = _choice.best(curve, pair.diffuse)
    else:
        head = next(point for point in curve if point["setting"] == reported[0].setting(reported[1]))
    ceilings = {"ssim_ceiling": ceiling["ssim_outside"], "anatomy_drift_ceiling": ceiling["anatomy_drift"]}
    return {**head, **ceilings, "curve": curve}, settings[head["setting"]]


def differences(store: Store, pair: Pair, heads: Mapping[str, Setting], seeds: Seeds) -> dict[str, Any]:
    """Each method's reported setting minus our recipe, seed by seed (`_paired.differences`)."""
    found = {
        name: [score for part in results(store, pair, *setting, seeds.headline) for score in part.scores]
        for name, setting in heads.items()
    }
    return _paired.differences(found, RECIPE)


def domination(rows: Mapping[str, Mapping[str, Any]], diffuse: bool) -> dict[str, dict[str, bool | None]]:
    """Whether our recipe's point dominates every point of a baseline, and whether any point of it dominates ours."""
    if RECIPE not in rows:
        return {"dominates": {}, "dominated_by": {}}
    mine = _curves.points([rows[RECIPE]], diffuse)
    theirs = {name: _curves.points(rows[name]["curve"], diffuse) for name in BASELINES if name in rows}
    return {
        "dominates": {name: _curves.dominates(mine, points) for name, points in theirs.items()},
        "dominated_by": {name: any(_curves.dominates([point], mine) for point in points)
                         for name, points in theirs.items()},
    }  # fmt: skip


def cost_left(store: Store, settings: Sequence[tuple[Pair, Method, float, range]]) -> float:
    """Runs of the sampler that are still to be made; scoring and decoding count as nothing."""
    cost, extractions, factuals = 0.0, set(), set()
    for pair, method, value, seeds in settings:
        left = [part for part in chunks(seeds) if not store.is_scored(pair, method, value, part)]
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
        kept = numbers["anatomy_drift" if pair.diffuse else "ssim_outside"]
        kept = "-" if kept is None else f"{kept:.3f}"
        what = f"{pair.name}: {method.name} {method.setting(value)}, n {numbers['n']}, flip {flip}, {kept}"
        print(f"{100 * share:3.0f}%  {what}; {spent / 60:.1f} min, {rest}", flush=True)


def shown(store: Store, pair: Pair, heads: Mapping[str, Setting], seeds: range) -> Tensor:
    """A pair's first factual images, each with the methods' counterfactuals at their reported settings.

    ``(rows, 1 + methods, 3, H, W)``; strength 0 is left out, since it shows the factual.
    """
    part = chunks(seeds)[0]
    columns = [store.factual(pair, part)[0].latents]
    columns += [
        store.latents(pair, method, value, part)[0] for method, value in heads.values() if method.name != BYTES_CHECKED
    ]
    return torch.stack([store.lab.images(latents[:SHEET_ROWS]) for latents in columns], dim=1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
