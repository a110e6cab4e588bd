"""What the judges get wrong: on held-out renders, where the truth is known, as they are and through the autoencoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..judges import FACTORS, LABELS, NONE, Judges, resize
from ..phantom import CLASSES, FINDINGS
from .augment import distort, nonsense
from .data import render_batch
from .regressor import accuracy, targets

HELD_OUT_SEED = 9_000_000
FINDING_FREE = ("normal cecum", "normal pylorus", "normal z-line")


@torch.no_grad()
def held_out(judges: Judges, autoencoder: nn.Module, n: int = 1024) -> dict[str, float]:
    """Numbers of every judge on ``n`` held-out renders: as "renders: ..." and as "through the autoencoder: ...".

    ``autoencoder`` has ``encode`` (images in -1..1) and ``decode``. Errors of factors are in their own units, also of
    those that are too poorly regressed to be in a verdict; areas and overlaps are shares.
    """

    def through(images: Tensor) -> Tensor:
        return ((autoencoder.decode(autoencoder.encode(images * 2 - 1)) + 1) / 2).clamp(0, 1)

    ways: dict[str, Callable[[Tensor], Tensor]] = {"renders": lambda x: x, "through the autoencoder": through}
    return {f"{way}: {k}": v for way, shown in ways.items() for k, v in _measure(judges, shown, n).items()}


def _measure(judges: Judges, shown: Callable[[Tensor], Tensor], n: int) -> dict[str, float]:
    draw = torch.Generator().manual_seed(1)
    right, labels, factors, guesses, found, truth = [], [], [], [], [], []
    far: dict[str, list[Tensor]] = {"renders": [], "distorted renders": [], "nonsense": [], "blends of two": []}
    rejected = []
    for i in range(0, n, 64):
        image, mask, label = render_batch(64, HELD_OUT_SEED + i)
        seen = shown(image)
        verdict = judges(seen)
        spoiled = judges(shown(nonsense(resize(image), draw)))
        right.append(verdict.probabilities.argmax(1) == label)
        labels.append(label)
        found.append(verdict.masks)
        truth.append(mask.bool())
        factors.append(targets(Anatomy.sample(64, HELD_OUT_SEED + i)))
        guesses.append(judges.regressor(resize(seen)))
        rejected.append(spoiled.probabilities.argmax(1) == LABELS.index(NONE))
        far["renders"].append(verdict.distances)
        far["distorted renders"].append(judges(shown(distort(image, draw))).distances)
        far["nonsense"].append(spoiled.distances)
        far["blends of two"].append(judges(shown(0.5 * (image + image.roll(1, 0)))).distances)
    out = {f"accuracy of {name}": _mean(torch.cat(right)[torch.cat(labels) == i]) for i, name in enumerate(CLASSES)}
    out = {"accuracy": _mean(torch.cat(right))} | out | {"nonsense rejected": _mean(torch.cat(rejected))}
    out |= {f"{name} over the limit": _mean(torch.cat(parts) > 1) for name, parts in far.items()}
    return out | _masks(torch.cat(found), torch.cat(truth), torch.cat(labels)) | _factors(guesses, factors)


def _mean(values: Tensor) -> float:
    return float(values.float().mean())


def _masks(found: Tensor, truth: Tensor, labels: Tensor) -> dict[str, float]:
    """Dice of each finding over all pixels, and the share of finding-free images' pixels that are marked."""
    out = {}
    for i, finding in enumerate(FINDINGS):
        both, either = (found[:, i] & truth[:, i]).sum(), found[:, i].sum() + truth[:, i].sum()
        out[f"Dice of {finding}"] = float(2 * both / either)
    free = torch.isin(labels, torch.tensor([CLASSES.index(name) for name in FINDING_FREE]))
    return out | {"area marked where no finding is": _mean(found[free].any(1))}


def _factors(guesses: list[Tensor], factors: list[Tensor]) -> dict[str, float]:
    rmse, explained = accuracy(torch.cat(guesses), torch.cat(factors))
    errors = {f"RMSE of {name}": float(v) for name, v in zip(FACTORS, rmse, strict=True)}
    return errors | {f"R2 of {name}": float(v) for name, v in zip(FACTORS, explained, strict=True)}
