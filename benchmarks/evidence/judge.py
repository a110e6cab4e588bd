"""What judge do a few hundred images and a laptop give: a small timm model trained without any download.

The images are renders of the eight phantom classes, every one with an anatomy of its own, as PNG files in a folder of
each class. The documented command trains on them; its own held-out images, and many more renders that it never saw, say
how often it is right. Renders are easier than clinical images: the accuracy here is a ceiling, the time is not.

    python dev.py bench judge --images 300 --model resnet18 --epochs 40
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared.command import aligned, common_options, finish, with_interval
from benchmarks.shared.record import machine
from medsteer_core.endophantom.phantom import CLASSES, Anatomy, render
from medsteer_core.errors import needs
from medsteer_core.intervals import wilson
from medsteer_core.judges import training
from medsteer_core.judges.files import load_judge
from medsteer_core.pictures.difference import png

SIDE = 128
FRESH_SEED = 1 << 20  # of the renders that only measure


def main(words: list[str]) -> int:
    options = common_options("judge", "A judge from a few hundred images on a CPU: its accuracy and its time.")
    options.add_argument("--images", type=int, default=300, help="images in the folder, all classes together (300)")
    options.add_argument("--model", default="resnet18", help="a name of timm's; begins without weights (resnet18)")
    options.add_argument("--epochs", type=int, default=40, help="epochs at most (40)")
    options.add_argument("--rate", type=float, default=1e-3, help="peak learning rate (0.001)")
    options.add_argument("--fresh", type=int, default=50, help="unseen renders of each class to measure on (50)")
    options.add_argument("--seed", type=int, default=0, help="seed of the renders and of the training (0)")
    chosen = options.parse_args(words)
    if chosen.images < 10 * len(CLASSES) or chosen.fresh < 1:
        options.error(f"--images wants {10 * len(CLASSES)} or more, --fresh 1 or more")
    record = finish("judge", chosen, run, table)
    return record if isinstance(record, int) else 0


def run(chosen: argparse.Namespace) -> tuple[dict[str, Any], None]:
    """Render, train and measure in a folder that is gone afterwards."""
    with needs("timm"):
        import timm  # noqa: F401
    with tempfile.TemporaryDirectory() as place:
        folder, output = Path(place) / "images", Path(place) / "judge"
        for index, name in enumerate(CLASSES):
            inside = folder / name.replace(" ", "-")
            inside.mkdir(parents=True)
            count = chosen.images // len(CLASSES) + (index < chosen.images % len(CLASSES))
            for i, image in enumerate(drawn(name, count, chosen.seed * len(CLASSES) + index)):
                (inside / f"case{index}{i:04d}_1.png").write_bytes(png(image))
        words = [str(folder), "--model", chosen.model, "--no-pretrained", "--output", str(output), "--device", "cpu"]
        words += ["--size", str(SIDE), "--epochs", str(chosen.epochs), "--patience", str(chosen.epochs)]
        words += ["--rate", str(chosen.rate), "--batch", "32", "--seed", str(chosen.seed), "--workers", "0"]
        start = time.monotonic()
        metrics = training.run(training.parser().parse_args(words))
        seconds = time.monotonic() - start
        judge = load_judge(output)
        right = {}
        for index, name in enumerate(CLASSES):
            images = drawn(name, chosen.fresh, FRESH_SEED + index)
            label = judge.terms.labels.index(name.replace(" ", "-"))
            right[name] = int((judge(images).probabilities.argmax(1) == label).sum())
    total, hits = chosen.fresh * len(CLASSES), sum(right.values())
    return {
        "settings": {name: getattr(chosen, name) for name in ("images", "model", "epochs", "rate", "fresh", "seed")},
        "machine": machine(torch.device("cpu")),
        "minutes": seconds / 60,
        "held_out": {name: metrics[name] for name in ("accuracy", "accuracy_interval", "images")},
        "fresh": {"accuracy": hits / total, "accuracy_interval": list(wilson(hits, total)), "right": right},
    }, None


def drawn(name: str, count: int, seed: int) -> torch.Tensor:
    """Renders ``(count, 3, SIDE, SIDE)`` of one class, of anatomies that this seed draws."""
    return render(Anatomy.sample(count, seed), name, SIDE).image


def table(record: Mapping[str, Any]) -> str:
    settings, fresh, own = record["settings"], record["fresh"], record["held_out"]
    told = f"{settings['model']} from nothing, {settings['images']} images, {record['minutes']:.1f} minutes"
    lines = [("renders", "images", "accuracy [95%]")]
    lines.append(("held out", str(own["images"]["test"]), with_interval(own["accuracy"], own["accuracy_interval"])))
    count = str(settings["fresh"] * len(CLASSES))
    lines.append(("never in the folder", count, with_interval(fresh["accuracy"], fresh["accuracy_interval"])))
    lines += [(f"  {name}", str(settings["fresh"]), f"{hits / settings['fresh']:.2f}")
              for name, hits in fresh["right"].items()]  # fmt: skip
    return "\n".join([told, *aligned(lines)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
