"""Does EndoPhantom draw what the prompt says: how often the judge sees the prompted class, for each of the eight.

Images are sampled by core nodes in a real ComfyUI, without any steering. The judge is EndoPhantom's own classifier, so
a share is a judge's opinion.

    python dev.py bench classes --n 100
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from benchmarks.shared.command import (
    TIME_LIMIT,
    aligned,
    check_scoring,
    common_options,
    finish,
    node,
    tensor,
    with_interval,
)
from medsteer_core.endophantom.bundle import Bundle
from medsteer_core.endophantom.phantom import CLASSES
from medsteer_core.pictures.difference import MOST_PAIRS, contact_sheet
from medsteer_core.run.client import ComfyClient
from medsteer_core.run.demo import ROOT, ProgressLine, versions
from medsteer_core.run.server import ComfyServer, comfyui_from_environment
from medsteer_core.run.workflow import Workflow
from medsteer_core.scores.scorer import embedded_judges, wilson

SAMPLING = {"steps": 20, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}


def main(words: list[str]) -> int:
    options = common_options("classes", "How often the judge sees the class that the prompt names.")
    options.add_argument("--n", type=int, default=50, help="images of each class (50)")
    options.add_argument("--seed", type=int, default=5000, help="seed of the images' noise (5000)")
    options.add_argument("--cfg", type=float, default=4.0, help="guidance scale (4)")
    chosen = options.parse_args(words)
    if chosen.n < 1 or chosen.seed < 0:
        options.error("--n wants 1 or more, --seed 0 or more")
    record = finish("classes", chosen, run, table)
    return record if isinstance(record, int) else 0


def workflow(name: str, count: int, seed: int, cfg: float) -> Workflow:
    """Core nodes around Load EndoPhantom: ``count`` images of one class."""
    text = f"An endoscopic image of {name}"
    sampling = {**SAMPLING, "seed": seed, "cfg": cfg}
    links = {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
    return {
        "1": node("MedSteer_LoadEndoPhantom", "load", {}),
        "2": node("CLIPTextEncode", "prompt", {"clip": ["1", 1], "text": text}),
        "3": node("CLIPTextEncode", "empty prompt", {"clip": ["1", 1], "text": ""}),
        "4": node("EmptyLatentImage", "size", {"width": 128, "height": 128, "batch_size": count}),
        "5": node("KSampler", f"sample {name}", {**links, **sampling}),
        "6": node("VAEDecode", "decode", {"samples": ["5", 0], "vae": ["1", 2]}),
        "7": node("PreviewImage", "images", {"images": ["6", 0]}),
    }


def run(chosen: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    """Sample and judge every class: the record for classes.json, and a sheet of the first images."""
    check_scoring()
    judges = embedded_judges()
    print("starting ComfyUI ...", end="", flush=True)
    with ComfyServer(comfyui_from_environment(), ROOT, cpu=True if chosen.cpu else None) as server:
        print(f" on the {server.device}, {server.seconds_to_start:.1f} s", flush=True)
        client, images = ComfyClient(server.address, timeout=300.0), {}
        for name in CLASSES:
            show = ProgressLine()
            result = client.run(workflow(name, chosen.n, chosen.seed, chosen.cfg), show, time_limit=TIME_LIMIT)
            show.end()
            images[name] = tensor(result.pixels("images"))
        made_with, device = versions(client.system_stats()["system"]), server.device
    classes = {name: judged(name, judges(shown).labels) for name, shown in images.items()}
    record = {
        "benchmark": "classes",
        "classes": classes,
        "settings": {**SAMPLING, "n": chosen.n, "seed": chosen.seed, "cfg": chosen.cfg},
        "device": device,
        "versions": made_with,
        "endophantom_sha256": Bundle().sha256(),
        "judge": "EndoPhantom's own classifier, trained on renders only",
        "notice": "Synthetic images for research. Not for diagnosis.",
    }
    return record, contact_sheet({name: shown[:MOST_PAIRS] for name, shown in images.items()})


def judged(name: str, labels: list[str]) -> dict[str, Any]:
    """How many of a class's images the judge calls by its name, Wilson's interval, and what it says of the rest."""
    right = labels.count(name)
    others = Counter(label for label in labels if label != name)
    share, interval = right / len(labels), list(wilson(right, len(labels)))
    return {"n": len(labels), "right": right, "share": share, "interval": interval, "others": dict(others)}


def table(record: Mapping[str, Any]) -> str:
    """One aligned line a class; intervals at 95%."""
    lines = [("prompted class", "images", "judged so [95%]", "otherwise")]
    for name, row in record["classes"].items():
        others = ", ".join(f"{count} {label}" for label, count in row["others"].items()) or "-"
        lines.append((name, str(row["n"]), with_interval(row["share"], row["interval"]), others))
    cfg = record["settings"]["cfg"]
    title = f"EndoPhantom at 20 steps and cfg {cfg:g}, {record['device']}, judged by its own classifier"
    return "\n".join(["", title, *aligned(lines)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
