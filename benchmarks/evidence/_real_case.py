"""The images of a pair with their truth, what an edit of them is worth, and the numbers of many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.evidence._real_methods import Real
from benchmarks.shared.command import as_saved
from benchmarks.shared.lab import Lab
from benchmarks.shared.presets import Pair
from medsteer_core.endophantom.true_pairs import true_pairs
from medsteer_core.intervals import bootstrap, wilson
from medsteer_core.pictures.own_pixels import edited, without_ghosts
from medsteer_core.scores.images import mean, psnr, ssim_map
from medsteer_core.scores.regions import mean_where
from medsteer_core.scores.scorer import score_pairs

SEEDS = {"development": 700_000, "test": 800_000}
AROUND, SHOWN = 3, 4  # pixels about the true change that are not yet outside of it; images in the sheet
MEASURES = ("psnr", "ssim_outside", "anatomy_drift")


class Case:
    """The images of one pair, their truth, and what is outside the true change."""

    def __init__(self, lab: Lab, pair: Pair, n: int, seed: int, change: Callable[[Tensor], Tensor] = lambda one: one):
        drawn = true_pairs(pair.source, pair.target, n, seed)
        self.lab, self.pair, self.image, self.truth = lab, pair, change(drawn.image), change(drawn.truth)
        self.outside = F.max_pool2d(drawn.mask[:, None], 2 * AROUND + 1, 1, AROUND)[:, 0] == 0
        self.mask = drawn.mask
        self.latents = torch.cat([lab.vae.encode(part.movedim(1, -1)) for part in self.image.split(20)])
        self._decoded = self._pixels(self.latents)

    def _pixels(self, latents: Tensor) -> Tensor:
        return torch.cat([self.lab.vae.decode(part)[..., :3].movedim(-1, 1) for part in latents.split(20)])

    def real(self) -> Real:
        """The images as methods take them, free to change."""
        free = torch.ones(len(self.latents), *self.latents.shape[-2:], dtype=torch.bool)
        return Real(self.pair, self.latents, free)

    def masked(self) -> Real:
        """The same under a user's mask: the true change, on the latents' grid and a pixel of it wider."""
        real = self.real()
        side = self.mask.shape[-1] // real.latents.shape[-1]
        return replace(real, allowed=F.max_pool2d(self.mask[:, None], 3 * side, side, side)[:, 0] > 0, drawn=True)

    def edited(self, latents: Tensor, locked: bool) -> Tensor:
        """The images with what an edit of their latents changes, in 8 bits as they are saved; as the node does it."""
        difference = self._pixels(latents) - self._decoded
        if locked:
            difference = without_ghosts(difference, self.image, self._decoded)
        return as_saved(edited(self.image, difference))

    def scores(self, images: Tensor) -> dict[str, list[Any]]:
        """Of each counterfactual: whether it flipped, drift, PSNR to the truth, SSIM outside the true change."""
        judged = score_pairs(self.image, images, self.pair.source, self.pair.target)
        errors = (images - self.truth).square().flatten(1).mean(1)
        return {
            "flip": [bool(score.flipped) for score in judged],
            "psnr": [psnr(float(error)) for error in errors],
            "ssim_outside": [mean_where(*one) for one in zip(ssim_map(images, self.image), self.outside, strict=True)],
            "anatomy_drift": [score.anatomy_drift for score in judged],
        }


def row_of(scores: Mapping[str, Sequence[Any]], rows: float, seconds: float) -> dict[str, Any]:
    """Rates and means with 95% intervals of `Case.scores`, and the numbers of each image."""
    flips = scores["flip"]
    row = {"n": len(flips), "flip": sum(flips) / len(flips), "flip_ci": list(wilson(sum(flips), len(flips)))}
    for name in MEASURES:
        row |= {name: None, **mean_of(name, [value for value in scores[name] if value is not None])}
    return row | {"rows": rows, "seconds": seconds, "each": dict(scores)}


def mean_of(name: str, values: list[float]) -> dict[str, Any]:
    """The mean under ``name`` and its interval under ``name_ci``; nothing without values."""
    return {name: mean(values), f"{name}_ci": list(bootstrap(values) or ())} if values else {}
