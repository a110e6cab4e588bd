"""How good the shipped defaults are at pairs: steering against same-seed re-prompting, on noise unseen by extraction.

Everything is taken from the example workflow (prompts, vector, operator, sampler, size) and run in a real ComfyUI; the
pairs are scored as PNGs by the one scorer, `scores.scorer`. The third method, steering at strength 0, is the
control: it must give back the factual image. The judges are EndoPhantom's, so flip rates are a judge's opinion.

    python dev.py bench pair --n 50
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.shared.command import (
    TIME_LIMIT,
    aligned,
    check_scoring,
    common_options,
    finish,
    node,
    tensor,
    values,
    with_interval,
)
from medsteer_core.endophantom.bundle import Bundle
from medsteer_core.errors import MedSteerError
from medsteer_core.pictures.difference import MOST_PAIRS, contact_sheet
from medsteer_core.run.client import ComfyClient, Result
from medsteer_core.run.demo import ROOT, WORKFLOW, ProgressLine, read_workflow, versions
from medsteer_core.run.server import ComfyServer, comfyui_from_environment
from medsteer_core.run.workflow import Workflow
from medsteer_core.scores.scorer import PairScore, class_of, score_pairs, summarise

FACTUAL = "factual"
STEERING, REPROMPTING, CONTROL = METHODS = ("steering", "same-seed re-prompting", "strength 0")
LOAD, EXTRACT, STEER = "MedSteer_LoadEndoPhantom", "MedSteer_ExtractPathologyVector", "MedSteer_Steer"
PAIRED = "MedSteer_CounterfactualSampler"


@dataclass(frozen=True)
class Shipped:
    """What the benchmark takes from the example workflow: the nodes before its sampler, and the sampler's settings."""

    nodes: Workflow
    load: str
    extract: str
    steer: str
    sampling: Mapping[str, Any]
    size: tuple[int, int]

    @classmethod
    def of(cls, example: Workflow) -> Shipped:
        """Read an example workflow; MedSteerError when it lacks one of the nodes that the benchmark measures."""
        load, extract, steer = (_only(example, name) for name in (LOAD, EXTRACT, STEER))
        sampler = _only(example, PAIRED, {"model": [steer, 0]})
        sampling = {name: value for name, value in values(example[sampler]["inputs"]).items() if name != "seed"}
        latent = example[example[sampler]["inputs"]["latent_image"][0]]["inputs"]
        nodes = {node_id: example[node_id] for node_id in _upstream(example, steer)}
        if "operator.strength" not in example[steer]["inputs"]:
            raise MedSteerError(
                "the example's Steer node has no operator.strength; the control needs one. Use suppress."
            )
        return cls(nodes, load, extract, steer, sampling, (latent["height"], latent["width"]))

    @property
    def extraction(self) -> Mapping[str, Any]:
        return self.nodes[self.extract]["inputs"]

    def prompt(self, role: str) -> str:
        """The text of `present`, `absent` or `negative`."""
        return self.nodes[self.extraction[role][0]]["inputs"]["text"]

    def workflow(self, seed: int, count: int) -> Workflow:
        """A workflow that makes ``count`` images of every method from the noise of ``seed``."""
        steering = self.nodes[self.steer]["inputs"]
        off, batch = "100", "101"
        height, width = self.size
        nodes = {
            **self.nodes,
            off: node(STEER, f"steer at {CONTROL}", {**steering, "operator.strength": 0.0}),
            batch: node("EmptyLatentImage", "batch", {"width": width, "height": height, "batch_size": count}),
        }
        # A plain sampler gives an image, the shipped sampler a pair: its second output is the steered one.
        plain = {name: self.sampling[name] for name in ("steps", "cfg", "sampler_name", "scheduler")} | {"denoise": 1.0}
        arms = {
            FACTUAL: (self.load, "present", "KSampler", plain, 0),
            STEERING: (self.steer, "present", PAIRED, self.sampling, 1),
            REPROMPTING: (self.load, "absent", "KSampler", plain, 0),
            CONTROL: (off, "present", PAIRED, self.sampling, 1),
        }
        for number, (name, (model, prompt, sampler, settings, output)) in enumerate(arms.items()):
            sample, decode, image = (str(110 + 10 * number + i) for i in range(3))
            inputs = {
                **settings,
                "seed": seed,
                "model": [model, 0],
                "positive": self.extraction[prompt],
                "negative": self.extraction["negative"],
                "latent_image": [batch, 0],
            }
            nodes[sample] = node(sampler, f"sample {name}", inputs)
            nodes[decode] = node("VAEDecode", f"decode {name}", {"samples": [sample, output], "vae": [self.load, 2]})
            nodes[image] = node("PreviewImage", name, {"images": [decode, 0]})
        return nodes


@dataclass(frozen=True)
class Batch:
    """The images of one seed: method to ``(count, 3, H, W)``, and the seconds of each node."""

    seed: int
    images: Mapping[str, Tensor]
    seconds: Mapping[str, float]

    @classmethod
    def of(cls, seed: int, result: Result) -> Batch:
        images = {name: tensor(result.pixels(name)) for name in (FACTUAL, *METHODS)}
        return cls(seed, images, dict(result.node_seconds))

    def seconds_per_pair(self, method: str) -> float:
        """Sampling of one factual and its counterfactual; the paired sampler makes both."""
        runs = (FACTUAL, method) if method == REPROMPTING else (method,)
        return sum(self.seconds[f"sample {name}"] for name in runs) / len(self.images[FACTUAL])


def main(words: list[str]) -> int:
    options = common_options("pair", "Flip rate and preservation of pairs.")
    options.add_argument("--n", type=int, default=50, help="pairs (50)")
    options.add_argument(
        "--seed", type=int, default=2000, help="the first batch's seed; each batch takes the next (2000)"
    )
    options.add_argument("--batch", type=int, default=1, help="images sampled together, from one seed (1)")
    options.add_argument("--workflow", type=Path, default=WORKFLOW, help="another workflow to measure, in API format")
    chosen = options.parse_args(words)
    if min(chosen.n, chosen.batch) < 1 or chosen.seed < 0:
        options.error("--n and --batch want 1 or more, --seed 0 or more")
    record = finish("pair", chosen, run, table)
    if isinstance(record, int):
        return record
    if not record["control_identical"]:
        print("error: strength 0 did not give back the factual image: something steers that must not.", file=sys.stderr)
    return 0 if record["control_identical"] else 1


def run(chosen: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    """Sample and score everything: the record for pair.json, and the contact sheet."""
    check_scoring()
    shipped = Shipped.of(read_workflow(chosen.workflow))
    source, target = (class_of(shipped.prompt(role)) for role in ("present", "absent"))
    counts = [min(chosen.batch, chosen.n - start) for start in range(0, chosen.n, chosen.batch)]
    seeds = fresh_seeds(chosen.seed, len(counts), shipped.extraction)
    print("starting ComfyUI ...", end="", flush=True)
    with ComfyServer(comfyui_from_environment(), ROOT, cpu=True if chosen.cpu else None) as server:
        print(f" on the {server.device}, {server.seconds_to_start:.1f} s", flush=True)
        client = ComfyClient(server.address, timeout=300.0)
        batches = list(sampled(client, shipped, seeds, counts))
        made_with, device = versions(client.system_stats()["system"]), server.device
    scores = {name: scored(batches, name, source, target) for name in METHODS}
    methods = {name: summarise(scores[name]) for name in METHODS}
    for name in METHODS:
        methods[name]["seconds_per_pair"] = round(statistics.median(b.seconds_per_pair(name) for b in batches), 3)
    record = {
        "benchmark": "pair",
        "source": source,
        "target": target,
        "methods": methods,
        "control_identical": all(torch.equal(b.images[FACTUAL], b.images[CONTROL]) for b in batches),
        "extraction_seconds": _extraction_seconds(shipped, batches),
        "settings": {
            "prompts": {role: shipped.prompt(role) for role in ("present", "absent", "negative")},
            "extraction": values(shipped.extraction),
            "steering": values(shipped.nodes[shipped.steer]["inputs"]),
            "sampling": dict(shipped.sampling),
            "size": list(shipped.size),
            "n": chosen.n,
            "seeds": seeds,
        },
        "device": device,
        "versions": made_with,
        "endophantom_sha256": Bundle().sha256(),
        "judge": "EndoPhantom's own judges, trained on renders only",
        "notice": "Synthetic images for research. Not for diagnosis.",
        "pairs": _per_image(batches, scores),
    }
    return record, overview(batches)


def sampled(client: ComfyClient, shipped: Shipped, seeds: list[int], counts: list[int]) -> Iterator[Batch]:
    """Run one workflow for each seed; ComfyUI keeps the vector between them, so it is extracted once."""
    for number, (seed, count) in enumerate(zip(seeds, counts, strict=True), start=1):
        print(f"batch {number} of {len(seeds)}: seed {seed}, {count} pairs", flush=True)
        show = ProgressLine()
        result = client.run(shipped.workflow(seed, count), show, time_limit=TIME_LIMIT)
        show.end()
        yield Batch.of(seed, result)


def scored(batches: list[Batch], method: str, source: str, target: str) -> list[PairScore]:
    """The score of every pair that ``method`` made, in order."""
    pairs = ((batch.images[FACTUAL], batch.images[method]) for batch in batches)
    return [score for a, b in pairs for score in score_pairs(a, b, source, target)]


def fresh_seeds(first: int, count: int, extraction: Mapping[str, Any]) -> list[int]:
    """``count`` seeds from ``first``; MedSteerError when extraction may have drawn noise with one of them."""
    seeds = list(range(first, first + count))
    used = range(extraction["seed"], extraction["seed"] + 2 * extraction["samples"])
    if set(seeds) & set(used):
        raise MedSteerError(
            f"seeds {seeds[0]} to {seeds[-1]} meet those of the extraction ({used[0]} to {used[-1]}); noise that the "
            "vector never saw was expected. Choose another --seed."
        )
    return seeds


def table(record: Mapping[str, Any]) -> str:
    """The methods as aligned lines; every interval at 95%."""
    head = ("method", "pairs", "accepted", "flip rate [95%]", "SSIM outside [95%]", "drift", "finding left", "s a pair")
    lines = [head]
    for name, row in record["methods"].items():
        flips = with_interval(row["flip_rate"], row["flip_rate_interval"])
        ssim = with_interval(row["ssim_outside"], row["ssim_outside_interval"])
        drift = "-" if row["anatomy_drift"] is None else f"{row['anatomy_drift']:.2f}"
        left = "-" if row["finding_left"] is None else f"{100 * row['finding_left']:.2f}%"
        counts, seconds = (str(row["n"]), str(row["accepted"])), f"{row['seconds_per_pair']:.2f}"
        lines.append((name, *counts, flips, ssim, drift, left, seconds))
    title = f"{record['source']} -> {record['target']}, {record['device']}, judged by EndoPhantom's judges"
    control = "identical" if record["control_identical"] else "NOT identical"
    notes = f"vector extracted once in {record['extraction_seconds']:.1f} s; strength 0 against factual: {control}"
    notes += "; drift: of the anatomy, in the regressors' errors"
    return "\n".join(["", title, *aligned(lines), notes])


def overview(batches: list[Batch]) -> Tensor:
    """The first pairs of every method but the control, as one labelled picture."""
    rows = {"factual": FACTUAL, "steered": STEERING, "re-prompted": REPROMPTING}
    first = {name: torch.cat([batch.images[key] for batch in batches])[:MOST_PAIRS] for name, key in rows.items()}
    return contact_sheet(first)


def _per_image(batches: list[Batch], scores: Mapping[str, list[PairScore]]) -> list[dict[str, Any]]:
    places = [(batch.seed, index) for batch in batches for index in range(len(batch.images[FACTUAL]))]
    return [
        {"seed": seed, "batch_index": index, **{name: scores[name][i].to_dict() for name in METHODS}}
        for i, (seed, index) in enumerate(places)
    ]


def _extraction_seconds(shipped: Shipped, batches: list[Batch]) -> float:
    title = shipped.nodes[shipped.extract].get("_meta", {}).get("title", EXTRACT)
    return round(batches[0].seconds.get(title, 0.0), 2)


def _only(workflow: Workflow, class_type: str, inputs: Mapping[str, Any] | None = None) -> str:
    """The id of the one node of a class that has these inputs."""
    wanted = dict(inputs or {})
    of_class = {i: n["inputs"] for i, n in workflow.items() if n["class_type"] == class_type}
    ids = [i for i, has in of_class.items() if {**has, **wanted} == has]
    if len(ids) != 1:
        where = f" with {wanted}" if wanted else ""
        raise MedSteerError(f"the workflow has {len(ids)} nodes {class_type}{where}; one was expected.")
    return ids[0]


def _upstream(workflow: Workflow, node_id: str) -> list[str]:
    """A node and everything it depends on."""
    links = [value[0] for value in workflow[node_id]["inputs"].values() if isinstance(value, list)]
    return list(dict.fromkeys([*(i for link in links for i in _upstream(workflow, link)), node_id]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
