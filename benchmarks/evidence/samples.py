"""How many extraction samples a pathology vector needs with each noise mode.

For each number of samples and each noise mode the vector is extracted three times, from noise that no other extraction
has. Two things are asked of them: do the three agree (stability), and do they flip images (flip rate, on development
seeds, by the one scorer `scores.scorer`; a judge's opinion) with the preset that takes such vectors: the
MedSteer preset those of "paired" and "unpaired", ours those of "same state". The default number of samples of Extract
Pathology Vector follows by `RULE`. What was made is kept in output/bench/samples, so a run that was stopped goes on.

    python dev.py bench samples
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence import _stability
from benchmarks.evidence._methods import steered
from benchmarks.evidence._samples_plot import RECOMMENDED, plot
from benchmarks.evidence._stability import MEANING, NOISES, PAIRED, PRESET_OF, REPEATS, SAME_STATE, recommended, said
from benchmarks.evidence._store import SCORING, STEERING, Store, code_digest, digest, score_of
from benchmarks.shared.command import aligned, check_scoring, common_options, finish, with_interval
from benchmarks.shared.lab import Lab, comfyui_version, start_comfyui
from benchmarks.shared.presets import PAIRS, SPLITS, Pair, Preset, Presets, check_pairs
from benchmarks.shared.record import machine
from medsteer_core.endophantom.bundle import Bundle
from medsteer_core.files.whole_file import write_whole
from medsteer_core.run.demo import versions
from medsteer_core.scores.scorer import PairScore, score_pairs
from medsteer_core.vectors import file as vector_file
from medsteer_core.vectors.pathology_vector import PathologyVector

COUNTS = (1, 2, 4, 8, 16, 32)
MOST_SAMPLES = 999
# Extraction r with n samples has the seed FIRST + 1000 r + n: the same for all noise modes and all pairs, no image's.
FIRST_SEED = 60000
DEFAULT_PAIRS = ("polyps -> normal cecum", "esophagitis -> normal z-line")
SPLIT = "development"
MOST_IMAGES = 10000
SECONDS_AN_IMAGE = 0.25  # of 20 steps with guidance on two cores; only for the estimate that is printed
# Code that decides what an extraction and an image steered by it are.


@dataclass(frozen=True)
class Extraction:
    """One extraction of the benchmark; ``repeat`` counts those that differ in nothing but their noise."""

    pair: Pair
    noise: str
    samples: int
    repeat: int

    @property
    def seed(self) -> int:
        return FIRST_SEED + 1000 * self.repeat + self.samples

    @property
    def cost(self) -> float:
        """Runs of the sampler. With "same state" ``samples`` is of both prompts, and a step takes three evaluations
        instead of the two of guidance; else it is of each prompt.
        """
        return 1.5 * self.samples if self.noise == SAME_STATE else 2 * self.samples


def main(words: list[str]) -> int:
    options = common_options("samples", "Stability and flip rate against the number of extraction samples.")
    options.add_argument("--n", type=int, default=12, help="images steered with each of the vectors (12)")
    options.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), help="numbers of samples (1 2 4 .. 32)")
    options.add_argument("--pairs", nargs="+", metavar="PAIR", default=list(DEFAULT_PAIRS), help="concept pairs, such "
                         "as 'polyps -> normal cecum'")  # fmt: skip
    chosen = options.parse_args(words)
    if not 1 <= chosen.n <= MOST_IMAGES or not all(1 <= count <= MOST_SAMPLES for count in chosen.counts):
        options.error(f"--n wants 1 to {MOST_IMAGES}, --counts 1 to {MOST_SAMPLES}")
    check_pairs(options, chosen.pairs)
    chosen.counts = sorted(set(chosen.counts))
    record = finish(name_of(chosen), chosen, run, table)
    return record if isinstance(record, int) else 0


def name_of(chosen: argparse.Namespace) -> str:
    """The results' file name: other pairs or numbers of samples never replace the whole benchmark's."""
    whole = set(chosen.pairs) == set(DEFAULT_PAIRS) and tuple(chosen.counts) == COUNTS
    return "samples" if whole else "samples-part"


def run(chosen: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    """Make and score everything that is not there yet: the record for samples.json, and the plot."""
    check_scoring()
    print("starting ComfyUI in this process ...", flush=True)
    start_comfyui(chosen.cpu)
    lab, comfyui = Lab(), comfyui_version()
    presets, seeds = Presets(), range(SPLITS[SPLIT], SPLITS[SPLIT] + chosen.n)
    bench = Bench(Store(lab, chosen.output / "samples", comfyui), presets, seeds)
    pairs = [pair for pair in PAIRS if pair.name in chosen.pairs]
    bench.make([Extraction(*cell) for cell in product(pairs, NOISES, chosen.counts, range(REPEATS))])
    cells = {pair.name: bench.cells(pair, chosen.counts) for pair in pairs}
    record = {
        "benchmark": "samples",
        "pairs": cells,
        "recommended": recommended(cells, PAIRED),  # the default noise of Extract Pathology Vector
        "recommended_same_state": recommended(cells, SAME_STATE),
        "seeds": {
            SPLIT: [seeds[0], seeds[-1]],
            "extraction": {str(n): [FIRST_SEED + 1000 * r + n for r in range(REPEATS)] for n in chosen.counts},
        },
        "meaning": MEANING,
        "machine": machine(lab.model.load_device),
        "versions": versions({"comfyui_version": comfyui, "pytorch_version": torch.__version__}),
        "settings": {**bench.store.settings, "n": chosen.n, "presets": {
            pair.name: {name: asdict(preset) for name, preset in presets_of(presets, pair).items()} for pair in pairs
        }},
        "endophantom_sha256": Bundle().sha256(),
        "judges": "EndoPhantom's own, trained on renders only: flip rates are a judge's opinion",
        "notice": "Synthetic images for research. Not for diagnosis.",
    }  # fmt: skip
    return record, plot(record)


def presets_of(presets: Presets, pair: Pair) -> dict[str, Preset]:
    """The presets that steer, by name (see `PRESET_OF`). Their samples and noise give way to the extraction's."""
    return {"medsteer": presets.medsteer, "ours": presets.ours_for(pair)}


class Bench:
    """Vectors and scores, each made once and kept in the store's folder."""

    def __init__(self, store: Store, presets: Presets, seeds: range):
        self.store, self.presets, self.seeds = store, presets, seeds
        self._extracted_by, self._scored_by = code_digest(STEERING), code_digest(SCORING)
        self._factuals: dict[Pair, tuple[Tensor, Tensor]] = {}

    def make(self, extractions: Sequence[Extraction]) -> None:
        """Make what is not there yet, with a line for each extraction."""
        left = [self.cost(extraction) for extraction in extractions]
        pairs = {e.pair for e, cost in zip(extractions, left, strict=True) if cost}
        factuals = len(self.seeds) * sum(not self.store.has_factual(pair, self.seeds) for pair in pairs)
        total, made, begun = sum(left) + factuals, 0, time.monotonic()
        minutes = total * SECONDS_AN_IMAGE / 60
        print(f"{total:g} runs of the sampler: about {minutes:.0f} min at {SECONDS_AN_IMAGE:g} s an image", flush=True)
        for extraction, cost in zip(extractions, left, strict=True):
            if not cost:
                continue
            self.vector(extraction)
            flips = sum(score.flipped for score in self.scores(extraction))
            made += cost
            spent = (time.monotonic() - begun) / 60
            what = f"{extraction.pair.name}: {extraction.noise}, {extraction.samples} samples, {extraction.repeat + 1}"
            rest = spent * max(0, total - factuals - made) / made
            share = f"{100 * made / (total - factuals):3.0f}%"
            print(f"{share}  {what}: flips {flips} of {len(self.seeds)}; {spent:.1f} min, about {rest:.0f} min left",
                  flush=True)  # fmt: skip

    def cost(self, extraction: Extraction) -> float:
        """Runs of the sampler that are still to be made for an extraction, those of the factual images aside."""
        extract = 0 if self._path(extraction).is_file() else extraction.cost
        return extract + (0 if self._score_path(extraction).is_file() else len(self.seeds))

    def vector(self, extraction: Extraction) -> tuple[PathologyVector, float]:
        """The extraction's vector, source minus target, and the seconds that it took."""
        done = self._path(extraction)
        if not done.is_file():
            begun, pair = time.perf_counter(), extraction.pair
            # not `Store.vector`: that has one seed for all
            vector = self.store.lab.extract(
                pair.source, pair.target, extraction.samples, extraction.seed, extraction.noise
            )
            seconds = time.perf_counter() - begun
            done.parent.mkdir(parents=True, exist_ok=True)
            vector_file.save(vector, done.with_suffix(".safetensors"))
            write_whole(done, json.dumps({"seconds": seconds}).encode())  # last: it says that the vector is there
        return vector_file.load(done.with_suffix(".safetensors")), json.loads(done.read_bytes())["seconds"]

    def scores(self, extraction: Extraction) -> list[PairScore]:
        """How the pairs fared that are steered with the extraction's vector, in the seeds' order."""
        path, pair = self._score_path(extraction), extraction.pair
        if not path.is_file():
            lab, (noise, factual) = self.store.lab, self._factual(pair)
            preset = self._preset(extraction)
            model = steered(lab, self.vector(extraction)[0], preset, preset.headline)
            steered_images = lab.images(lab.sample(model, lab.prompt(pair.source), noise))
            made = score_pairs(factual, steered_images, pair.source, pair.target)
            write_whole(path, json.dumps([score.to_dict() for score in made]).encode())
        return [score_of(values) for values in json.loads(path.read_bytes())]

    def _preset(self, extraction: Extraction) -> Preset:
        return presets_of(self.presets, extraction.pair)[PRESET_OF[extraction.noise]]

    def _factual(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """The pair's noise and factual images, decoded once."""
        if pair not in self._factuals:
            chunk, _ = self.store.factual(pair, self.seeds)
            self._factuals[pair] = chunk.noise, self.store.lab.images(chunk.latents)
        return self._factuals[pair]

    def _path(self, extraction: Extraction) -> Path:
        """The file of an extraction's seconds, which lies beside its vector."""
        name = f"{extraction.noise.replace(' ', '_')}-{extraction.samples}-seed_{extraction.seed}.json"
        return self.store.folder / extraction.pair.slug / self._extracted_by / name

    def _score_path(self, extraction: Extraction) -> Path:
        how = asdict(self._preset(extraction))
        how = {key: how[key] for key in how if key not in ("strengths", "noise", "samples")}
        by = f"{PRESET_OF[extraction.noise]}-{digest(how)}-{self.seeds[0]}-{self.seeds[-1]}.scores-{self._scored_by}"
        path = self._path(extraction)
        return path.with_name(f"{path.stem}.{by}.json")

    def cells(self, pair: Pair, counts: Sequence[int]) -> dict[str, dict[str, dict[str, Any]]]:
        """The numbers of each noise mode and number of samples."""

        def repeats(noise: str, n: int) -> list[Extraction]:
            return [Extraction(pair, noise, n, r) for r in range(REPEATS)]

        def weights(noise: str) -> dict[str, Tensor]:
            """Those of modes whose vectors are of one kind are one, so that their stabilities can be compared."""
            kind = [mode for mode in NOISES if PRESET_OF[mode] == PRESET_OF[noise]]
            return _stability.mean_weights(self.vector(one)[0] for mode in kind for one in repeats(mode, counts[-1]))

        def cell(noise: str, n: int, weigh: Mapping[str, Tensor]) -> dict[str, Any]:
            vectors, seconds = zip(*(self.vector(one) for one in repeats(noise, n)), strict=True)
            numbers, preset = _stability.pooled([self.scores(one) for one in repeats(noise, n)]), PRESET_OF[noise]
            return {
                **_stability.stability(vectors, weigh),
                "preset": preset,
                **numbers,
                "ours": numbers if preset == "ours" else None,
                "seconds": round(median(seconds), 3),
            }

        weighed = {noise: weights(noise) for noise in NOISES}
        return {noise: {str(n): cell(noise, n, weighed[noise]) for n in counts} for noise in NOISES}


def table(record: Mapping[str, Any]) -> str:
    """One aligned table a pair, and what follows."""
    settings, images = record["settings"], record["seeds"][SPLIT]
    title = f"{REPEATS} extractions each, {settings['n']} images a vector, {SPLIT} seeds {images[0]} to {images[1]}, "
    text = [f"\n{title}{settings['steps']} steps, cfg {settings['cfg']:g}"]
    head = ("noise", "samples", "stability [range]", "least stable site", "preset", "flip [95%]", "SSIM outside",
            "anatomy drift", "s")  # fmt: skip
    for name, modes in record["pairs"].items():
        lines = [head]
        for noise, n in product(NOISES, modes[NOISES[0]]):
            cell = modes[noise][n]
            least = cell["least_stable_site"]
            steady = with_interval(cell["stability"], cell["stability_range"])
            kept = ["-" if cell[key] is None else f"{cell[key]:.3f}" for key in ("ssim_outside", "anatomy_drift")]
            lines.append((
                noise, n, steady, f"{least['stability']:.3f} {least['name']}", cell["preset"],
                with_interval(cell["flip"], cell["flip_ci"]), *kept, f"{cell['seconds']:.1f}",
            ))  # fmt: skip
        text += ["", name, *aligned(lines)]
    enough = "; ".join(f"{noise}: {n or 'none'}" for noise, n in record["recommended"]["enough"].items())
    return "\n".join([*text, "", f"enough are: {enough}", *(said(record[name]) for name in RECOMMENDED)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
