"""Does a vector that was recorded with one sampler steer under another: against that sampler's own vector.

A vector of each removal is extracted under euler with 20 steps and used under four other schedules; each of these also
gets a vector that was extracted under itself. Both steer the same factual images of that schedule, by Counterfactual
Sampler with our preset for that kind of pair, so that ancestral noise is shared as well; development seeds. Asked is
whether the flip rates are within 5 points. What was made is kept in output/bench/schedules, so a run that was stopped
goes on.

    python dev.py bench schedules --n 60
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence._methods import GivenNoise, steered
from benchmarks.evidence._operators_numbers import WITHIN, numbers, paired_difference
from benchmarks.evidence._schedules_table import rate, table
from benchmarks.evidence._store import SCORING, STEERING, Result, Store, code_digest, digest
from benchmarks.evidence.quality import chunks
from benchmarks.shared import presets as _presets
from benchmarks.shared.command import check_scoring, common_options, finish
from benchmarks.shared.lab import BATCH, CFG, SCHEDULER, STEPS, Lab, comfyui_version, start_comfyui
from benchmarks.shared.presets import PAIRS, SPLITS, Pair, Preset, Presets
from benchmarks.shared.record import machine
from medsteer_core.endophantom.bundle import Bundle
from medsteer_core.errors import MedSteerError
from medsteer_core.files.whole_file import write_whole
from medsteer_core.run.demo import versions
from medsteer_core.scores.scorer import score_pairs
from medsteer_core.vectors import file as vector_file
from medsteer_core.vectors.pathology_vector import PathologyVector

SPLIT = "development"
REMOVALS = tuple(pair for pair in PAIRS if pair.kind == "removing")
# How many times a sampler evaluates the model in a step; only for the time that is foretold.
EVALUATIONS = {"euler": 1, "heun": 2, "dpmpp_2m": 1, "dpmpp_2s_ancestral": 2}
MOST_APART = 1e-4  # of two factual latents that are one image


@dataclass(frozen=True)
class Way:
    """A sampler and its number of steps."""

    sampler: str
    steps: int

    @property
    def name(self) -> str:
        return f"{self.sampler} {self.steps}"

    @property
    def cost(self) -> float:
        """A run in runs of the recorded way."""
        return self.steps * EVALUATIONS[self.sampler] / STEPS


RECORDED = Way("euler", 20)
OTHERS = (Way("euler", 30), Way("heun", 15), Way("dpmpp_2m", 20), Way("dpmpp_2s_ancestral", 20))
WHOSE = ("recorded", "own")  # whose vector steers: the one recorded under `RECORDED`, or that of the way itself


def main(words: list[str]) -> int:
    options = common_options("schedules", "A vector of one sampler under others, against their own vectors.")
    options.add_argument("--n", type=int, default=60, help="pairs of each concept pair and schedule (60)")
    options.add_argument("--pairs", nargs="+", metavar="PAIR", help="only these, such as 'polyps -> normal cecum'")
    chosen = options.parse_args(words)
    if not 1 <= chosen.n <= _presets.MOST:
        options.error(f"--n wants 1 to {_presets.MOST}")
    _presets.check_pairs(options, chosen.pairs, REMOVALS, "removal")
    record = finish(name_of(chosen), chosen, run, table)
    return record if isinstance(record, int) else 0


def name_of(chosen: argparse.Namespace) -> str:
    """The results' file name: some pairs never replace all of them."""
    return "schedules-part" if chosen.pairs else "schedules"


def run(chosen: argparse.Namespace) -> tuple[dict[str, Any], None]:
    """Make and score everything that is not there yet: the record for schedules.json, and no picture."""
    check_scoring()
    print("starting ComfyUI in this process ...", flush=True)
    start_comfyui(chosen.cpu)
    lab, comfyui = Lab(), comfyui_version()
    store = Store(lab, chosen.output / "schedules", comfyui)
    pairs = [pair for pair in REMOVALS if not chosen.pairs or pair.name in chosen.pairs]
    seeds = range(SPLITS[SPLIT], SPLITS[SPLIT] + chosen.n)
    rows = Bench(store, pairs, seeds).rows()
    record = {
        "benchmark": "schedules",
        "rows": rows,
        "pooled": pooled(rows),
        "recorded": asdict(RECORDED),
        "within": WITHIN,
        "seeds": {SPLIT: [seeds[0], seeds[-1]], "used": SPLIT, "extraction": _presets.EXTRACTION_SEED},
        "machine": machine(lab.model.load_device),
        "versions": versions({"comfyui_version": comfyui, "pytorch_version": torch.__version__}),
        "settings": {
            "scheduler": SCHEDULER, "cfg": CFG, "side": store.settings["side"], "n": chosen.n, "batch": BATCH,
            "presets": {pair.name: asdict(preset_of(pair)) for pair in pairs},
        },
        "endophantom_sha256": Bundle().sha256(),
        "judges": "EndoPhantom's own, trained on renders only: flip rates are a judge's opinion",
        "notice": "Synthetic images for research. Not for diagnosis.",
    }  # fmt: skip
    return record, None


def preset_of(pair: Pair) -> Preset:
    return Presets().ours_for(pair)


class Bench:
    """Vectors and scores of every pair and way, each made once and kept in the store's folder."""

    def __init__(self, store: Store, pairs: Sequence[Pair], seeds: range):
        self.store, self.pairs, self.seeds = store, pairs, seeds
        self._steered_by = code_digest((*STEERING, "benchmarks/evidence/schedules.py"))
        self._scored_by = code_digest(SCORING)
        self._labs: dict[Way, Lab] = {}

    def rows(self) -> list[dict[str, Any]]:
        """A row for every pair and way, with a line for each. The recorded way has no other vector than its own."""
        todo = [(pair, way) for pair in self.pairs for way in (RECORDED, *OTHERS)]
        left = {cell: self.cost(*cell) for cell in todo}
        total, made, begun, rows = sum(left.values()), 0.0, time.monotonic(), []
        for pair, way in todo:
            row = self.row(pair, way)
            rows.append(row)
            made += left[pair, way]
            spent = (time.monotonic() - begun) / 60
            rest = f"about {spent * (total - made) / made:.0f} min left" if made else "from what is stored"
            rates = ", ".join(f"{whose} {rate(row[whose])}" for whose in WHOSE if row[whose])
            share = 100 * made / total if total else 100
            print(f"{share:3.0f}%  {pair.name}: {way.name}, flips {rates}; {spent:.1f} min, {rest}", flush=True)
        return rows

    def row(self, pair: Pair, way: Way) -> dict[str, Any]:
        """The numbers of both vectors, and ``difference``, the flip rate of the recorded one minus the own one's."""
        found = [self.scored(pair, way, part) for part in chunks(self.seeds)]
        per = {whose: [part[whose] for part in found] for whose in WHOSE if whose in found[0]}
        row = {"pair": pair.name, "sampler": way.sampler, "steps": way.steps, "recorded": None, "difference": None}
        row |= {whose: numbers(results) for whose, results in per.items()}
        if len(per) == len(WHOSE):
            # of one factual image both vectors' pairs are accepted or neither's
            row["difference"] = paired_difference(*(flips(per[whose]) for whose in WHOSE))
        return row

    def scored(self, pair: Pair, way: Way, seeds: range) -> dict[str, Result]:
        """One chunk's scores by whose vector steered."""
        path = self._score_path(pair, way, seeds)
        if not path.is_file():
            made = {whose: result.to_json().decode() for whose, result in self._made(pair, way, seeds).items()}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(made).encode())
        return {whose: Result.of_json(text.encode()) for whose, text in json.loads(path.read_bytes()).items()}

    def _made(self, pair: Pair, way: Way, seeds: range) -> dict[str, Result]:
        lab = self.lab(way)
        vectors = {"own": self.vector(pair, way)}
        if way != RECORDED:
            vectors = {"recorded": self.vector(pair, RECORDED), **vectors}
        factual, results = None, {}
        for whose, vector in vectors.items():
            begun = time.perf_counter()
            latents, steered_latents = pair_of(lab, pair, vector, seeds)
            seconds = time.perf_counter() - begun
            factual = latents if factual is None else factual
            check_same(factual, latents, way)
            scores = score_pairs(lab.images(factual), lab.images(steered_latents), pair.source, pair.target)
            results[whose] = Result(tuple(seeds), tuple(scores), seconds)
        return results

    def lab(self, way: Way) -> Lab:
        """The lab with another sampler and number of steps."""
        if way not in self._labs:
            from medsteer_core.host.sampling import runs as sampling

            self._labs[way] = copy.copy(self.store.lab)
            self._labs[way].schedule = sampling.schedule(self.store.lab.model, way.steps, way.sampler, SCHEDULER)
        return self._labs[way]

    def vector(self, pair: Pair, way: Way) -> PathologyVector:
        """The pair's vector, source minus target, extracted under a way."""
        path, preset = self._vector_path(pair, way), preset_of(pair)
        if not path.is_file():
            amount = (preset.samples, _presets.EXTRACTION_SEED, preset.noise)
            path.parent.mkdir(parents=True, exist_ok=True)
            vector_file.save(self.lab(way).extract(pair.source, pair.target, *amount), path)
        return vector_file.load(path)

    def cost(self, pair: Pair, way: Way) -> float:
        """What is still to be made of a row, in runs of the recorded way."""
        preset = preset_of(pair)
        left = sum(len(part) for part in chunks(self.seeds) if not self._score_path(pair, way, part).is_file())
        steered_share = 1 - preset.start
        runs = (1.0 if preset.lock == "none" else 2.0) + steered_share
        extraction = 0.0 if self._vector_path(pair, way).is_file() or not left else 1.5 * preset.samples
        return way.cost * (extraction + left * runs * (1 if way == RECORDED else len(WHOSE)))

    def _vector_path(self, pair: Pair, way: Way) -> Path:
        preset = preset_of(pair)
        name = f"vector-{preset.noise}-{preset.samples}-{way.name}.safetensors".replace(" ", "_")
        return self.store.folder / pair.slug / self._steered_by / name

    def _score_path(self, pair: Pair, way: Way, seeds: range) -> Path:
        preset = {key: value for key, value in asdict(preset_of(pair)).items() if key != "strengths"}
        name = f"{way.name}-{digest(preset)}-{seeds[0]}-{seeds[-1]}.scores-{self._scored_by}.json".replace(" ", "_")
        return self.store.folder / pair.slug / self._steered_by / name


def pair_of(lab: Lab, pair: Pair, vector: PathologyVector, seeds: range) -> tuple[Tensor, Tensor]:
    """Factual and counterfactual latents under the lab's schedule, by Counterfactual Sampler with our preset."""
    from medsteer_core.host.sampling.counterfactual import PairRequest, sample_pair

    preset, noise = preset_of(pair), lab.noise(seeds)
    request = PairRequest(
        lab.prompt(pair.source), lab.conditioning(""), {"samples": torch.zeros_like(noise)}, seeds[0], CFG,
        lab.schedule, lock=preset.lock, threshold=preset.lock_threshold, dilation=preset.lock_dilation,
        noise=GivenNoise(noise, seeds[0]),
    )  # fmt: skip
    made = sample_pair(steered(lab, vector, preset, preset.headline), request)
    return made.factual, made.counterfactual


def check_same(one: Tensor, other: Tensor, way: Way) -> None:
    """MedSteerError unless two vectors' factual images are the same: only then are their flips comparable."""
    apart = float((one - other).abs().max())
    if apart > MOST_APART:
        raise MedSteerError(
            f"{way.name}: the factual images of two runs differ by {apart:.2g}; at most {MOST_APART:g} was expected, "
            "since they have the same noise. Choose a sampler whose noise can be given."
        )


def flips(results: Sequence[Result]) -> list[bool]:
    """Whether each accepted pair flipped, in the seeds' order."""
    return [score.flipped for result in results for score in result.scores if score.accepted]


def pooled(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The differences of each way over all pairs."""
    found = {}
    for way in OTHERS:
        counts = [row["difference"] for row in rows if (row["sampler"], row["steps"]) == (way.sampler, way.steps)]
        answers = [answer for count in counts for answer in _answers(count)]
        found[way.name] = paired_difference([one for one, _ in answers], [other for _, other in answers])
    return found


def _answers(count: Mapping[str, Any]) -> list[tuple[bool, bool]]:
    """The pairs of answers that were counted."""
    kinds = {"both": (True, True), "only_one": (True, False), "only_other": (False, True), "neither": (False, False)}
    return [answer for name, answer in kinds.items() for _ in range(count[name])]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
