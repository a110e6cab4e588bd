"""The images of `bench downstream`: a small confounded real set, what each arm adds to it, an unconfounded test set.

Images are uint8 ``(n, 3, 64, 64)``: made at 128x128, rounded to 8 bits as a saved file is, resized as for the judges.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.shared.command import as_saved
from medsteer_core.endophantom.judges import resize
from medsteer_core.endophantom.phantom import CLASSES, Anatomy, render
from medsteer_core.files.whole_file import write_whole

PRESENT, ABSENT = "polyps", "normal cecum"
NOTHING, REPROMPTED, COUNTERFACTUAL, TRUE = ARMS = ("nothing", "re-prompted", "counterfactual", "true")
SIDE = 128
# Scene seeds; none is the training's, the judges' or the design search's (7,000,000 and up).
TEST_SEED, REAL_SEED, TRUE_SEED = 3_000_000, 3_100_000, 3_200_000
# Noise seeds of generated images; none is the extraction's (1000 and up).
IMAGE_SEED = 400_000


@dataclass(frozen=True)
class Labelled:
    """Images ``(n, 3, 64, 64)`` uint8 and labels ``(n,)``, 1 where there are polyps."""

    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, present: Tensor, absent: Tensor) -> Labelled:
        labels = [torch.ones(len(present)), torch.zeros(len(absent))]
        return cls(torch.cat([present, absent]), torch.cat(labels).long())

    def __add__(self, other: Labelled) -> Labelled:
        return Labelled(torch.cat([self.images, other.images]), torch.cat([self.labels, other.labels]))

    def floats(self) -> Tensor:
        """Images in 0..1."""
        return self.images.float() / 255


@dataclass(frozen=True)
class Generated:
    """Images of the same seeds, each ``(n, 3, 64, 64)`` uint8: polyps, polyps steered away, and the other prompt."""

    factual: Tensor
    counterfactual: Tensor
    reprompted: Tensor


def small(images: Tensor) -> Tensor:
    """Images ``(n, 3, H, W)`` in 0..1 as a detector's pixels."""
    saved = as_saved(images)
    return (resize(saved) * 255).round().to(torch.uint8)


def real_anatomy(n: int, seed: int, confounding: float) -> tuple[Anatomy, list[str]]:
    """Scenes of the small real set and their classes, half each; anatomy leans with the class."""
    names = [PRESENT] * (n // 2) + [ABSENT] * (n - n // 2)
    labels = torch.tensor([CLASSES.index(name) for name in names])
    return Anatomy.sample(n, REAL_SEED + seed, labels, confounding), names


def real_set(n: int, seed: int, confounding: float) -> Labelled:
    """The small real set of a training seed: ``n`` renders."""
    anatomy, names = real_anatomy(n, seed, confounding)
    images = small(render(anatomy, names, SIDE, noise_seed=1).image)
    return Labelled.of(images[: n // 2], images[n // 2 :])


def true_pairs(n: int, seed: int, confounding: float) -> Labelled:
    """``n`` scenes that lean as polyps do, each rendered with and without them: what perfect pairs would be."""
    labels = torch.full((n,), CLASSES.index(PRESENT))
    return both_ways(Anatomy.sample(n, TRUE_SEED + seed, labels, confounding))


def test_set(n: int) -> Labelled:
    """``n`` unconfounded scenes, each rendered with and without polyps: image i and image n + i show one scene."""
    return both_ways(Anatomy.sample(n, TEST_SEED))


def both_ways(anatomy: Anatomy) -> Labelled:
    """Every scene as both classes, with sensor noise of its own."""
    renders = [render(anatomy, name, SIDE, noise_seed=noise).image for noise, name in enumerate((PRESENT, ABSENT))]
    return Labelled.of(*map(small, renders))


def added(arm: str, made: Generated, true: Labelled) -> Labelled | None:
    """What an arm adds to the real set; None for nothing. Every other arm adds as many images, half of each class."""
    choices = {
        NOTHING: lambda: None,
        REPROMPTED: lambda: Labelled.of(made.factual, made.reprompted),
        COUNTERFACTUAL: lambda: Labelled.of(made.factual, made.counterfactual),
        TRUE: lambda: true,
    }
    return choices[arm]()


def image_seeds(n: int, seed: int) -> list[int]:
    """Noise seeds of a training seed's generated images; no two training seeds share one, up to 10,000 pairs."""
    first = IMAGE_SEED + 10_000 * seed
    return list(range(first, first + n))


def generated(
    folder: Path, settings: Mapping[str, Any], n: int, seed: int, make: Callable[[list[int]], Generated]
) -> tuple[Generated, bool]:
    """A training seed's generated images, from their file or from ``make``, and whether they were made now.

    The file's name has a hash of ``settings`` (weights, steering, sampling): others never meet.
    """
    from safetensors.torch import load_file, save

    seeds = image_seeds(n, seed)
    facts = json.dumps({**settings, "image_seeds": [seeds[0], seeds[-1]]}, sort_keys=True)
    path = folder / f"images-{seed}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.safetensors"
    if path.exists():
        return Generated(**load_file(path)), False
    made = make(seeds)
    write_whole(path, save({name: value.contiguous() for name, value in vars(made).items()}, metadata={"made": facts}))
    return made, True
