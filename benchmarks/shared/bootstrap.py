"""Paired bootstrap of AUROC over training seeds and test scenes.

Every test scene is rendered with and without the finding, so a scene is drawn with both of its images. Arms and
detectors share each draw of seeds and scenes: differences between them are paired.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000


@dataclass(frozen=True)
class Draws:
    """How often each resample takes each seed ``(resamples, seeds)`` and each scene ``(resamples, scenes)``."""

    seeds: np.ndarray
    scenes: np.ndarray

    @classmethod
    def make(cls, seeds: int, scenes: int, resamples: int = RESAMPLES, seed: int = 0) -> Draws:
        generator = np.random.default_rng(seed)
        counts = [generator.multinomial(n, np.full(n, 1 / n), size=resamples) for n in (seeds, scenes)]
        return cls(*(count.astype(float) for count in counts))


def wins(present: np.ndarray, absent: np.ndarray) -> np.ndarray:
    """``(scenes, scenes)``: 1 where the image with the finding scores higher than the one without, 1/2 at a tie."""
    above = present[:, None] - absent[None]
    return (above > 0) + 0.5 * (above == 0)


def resampled_auroc(present: np.ndarray, absent: np.ndarray, draws: Draws) -> np.ndarray:
    """AUROC, the mean over training seeds, of each resample: scores ``(seeds, scenes)`` twice -> ``(resamples,)``.

    AUROC is the share of (present, absent) couples that stand in the right order; a scene drawn twice counts twice.
    """
    couples = draws.scenes.sum(1) ** 2
    right = [((draws.scenes @ wins(a, b)) * draws.scenes).sum(1) for a, b in zip(present, absent, strict=True)]
    areas = [count / couples for count in right]
    return (draws.seeds * np.stack(areas, 1)).sum(1) / draws.seeds.sum(1)


def interval(values: np.ndarray) -> list[float]:
    """The middle 95% of resampled values."""
    return [float(value) for value in np.quantile(values, (0.025, 0.975))]


def differences(resampled: Mapping[str, np.ndarray], areas: Mapping[str, float]) -> dict[str, dict]:
    """Every arm minus every arm before it: ``{"b - a": {"difference": .., "interval": [.., ..]}}``."""
    names = list(areas)
    return {
        f"{b} - {a}": {"difference": areas[b] - areas[a], "interval": interval(resampled[b] - resampled[a])}
        for i, b in enumerate(names)
        for a in names[:i]
    }
