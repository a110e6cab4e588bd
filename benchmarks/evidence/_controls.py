"""The control that pushes as far as steering does, but elsewhere: along directions drawn from within the classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.evidence._method import Chunk, Method, Vectors
from benchmarks.shared import presets as _presets
from benchmarks.shared.lab import Lab
from benchmarks.shared.presets import Pair, Preset
from medsteer_core.steering.operators import Operator
from medsteer_core.vectors.pathology_vector import PathologyVector, SiteDirections
from medsteer_core.vectors.random_direction import drawn, normal_weights


@dataclass(frozen=True)
class PushElsewhere(Operator):
    """`a - strength * max(0, a.d) * r`: the push of suppress, along another unit vector `r` than `d`.

    A vector of rank 2 carries both: its rows are `d` and a unit vector `e` across it, and its first projections the
    coordinates of `r` on them (see `with_random_direction`).
    """

    name: ClassVar[str] = "random_direction"
    strength: float = 2.0

    def __call__(self, a: Tensor, step: Any, in_place: bool = False) -> Tensor:
        elsewhere = step.projections[0] @ step.directions
        push = self.strength * (a @ step.directions[0]).clamp_min(0)[..., None] * elsewhere
        return a.sub_(push) if in_place else a - push


@dataclass
class TokenMeans:
    """An observer that keeps every image's token mean: site -> sigma -> tensors ``(images, C)``."""

    kept: dict[str, dict[float, list[Tensor]]] = field(default_factory=dict)

    def observe(self, site: str, sigma: float, activation: Tensor) -> None:
        mean = activation.detach().mean(dim=1, dtype=torch.float32).cpu()
        self.kept.setdefault(site, {}).setdefault(float(sigma), []).append(mean)

    def centred(self) -> dict[str, Tensor]:
        """Each site's means about their own average, ``(steps, images, C)``, steps by falling sigma."""
        stacked = {
            site: torch.stack([torch.cat(levels[sigma]) for sigma in sorted(levels, reverse=True)])
            for site, levels in self.kept.items()
        }
        return {site: means - means.mean(dim=1, keepdim=True) for site, means in stacked.items()}


def within_class(lab: Lab, pair: Pair) -> dict[str, Tensor]:
    """How images of one class differ from their class's average, for both classes: site -> ``(steps, images, C)``."""
    from medsteer_core.host.patching import patch

    groups = []
    for number, name in enumerate((pair.source, pair.target)):
        first = _presets.COVARIANCE_SEED + number * _presets.COVARIANCE_SAMPLES
        means = TokenMeans()
        noise = lab.noise(range(first, first + _presets.COVARIANCE_SAMPLES))
        lab.sample(patch.observed(lab.model, means), lab.prompt(name), noise)
        groups.append(means.centred())
    return {site: torch.cat([group[site] for group in groups], dim=1) for site in groups[0]}


def with_random_direction(vector: PathologyVector, deviations: Mapping[str, Tensor], draw: int) -> PathologyVector:
    """A vector for `PushElsewhere`: beside each `d` a unit vector drawn from the within-class covariance.

    ``deviations`` are the class-centred sample means; the draw is the Random Direction node's.
    """
    weights = normal_weights(next(iter(deviations.values())).shape[1], draw)
    sites = {name: _beside(site, weights, deviations[name]) for name, site in vector.sites.items()}
    return PathologyVector(sites, vector.sigmas, {**vector.provenance, "random_direction": draw}, vector.flow)


def _beside(site: SiteDirections, weights: Tensor, deviations: Tensor) -> SiteDirections:
    control = drawn(deviations, weights)
    direction = site.directions[:, 0]
    along = (control * direction).sum(-1, keepdim=True)
    across = F.normalize(control - along * direction, dim=-1)
    coordinates = torch.cat([along, (control * across).sum(-1, keepdim=True)], dim=1)  # (steps, 2)
    return SiteDirections(
        directions=torch.stack([direction, across], dim=1),
        gaps=torch.cat([site.gaps, torch.zeros_like(site.gaps)], dim=1),
        centres=site.centres,
        projections=torch.stack([coordinates, torch.zeros_like(coordinates)], dim=1),
        spreads=site.spreads,
    )


def random_direction(lab: Lab, vectors: Vectors, pair: Pair, preset: Preset) -> Method:
    def run(chunk: Chunk, strength: float) -> Tensor:
        from medsteer_core.host.patching import levels, patch
        from medsteer_core.steering.plan import Steering

        result = torch.empty_like(chunk.latents)
        for draw in range(_presets.DRAWS):
            mine = [place for place, seed in enumerate(chunk.seeds) if seed % _presets.DRAWS == draw]
            if mine:
                vector = vectors.random_vector(pair, preset.noise, preset.samples, draw)
                window = levels.window(lab.model, preset.start, preset.end)
                steering = Steering(vector, PushElsewhere(strength), window, vector.site_names, preset.rows)
                model = patch.steered(lab.model, steering)
                result[mine] = lab.sample(model, lab.prompt(pair.source), chunk.noise[mine])
        return result

    settings = {key: getattr(preset, key) for key in ("noise", "samples", "rows", "start", "end")}
    settings |= {"draws": _presets.DRAWS, "covariance_samples": _presets.COVARIANCE_SAMPLES}
    needed = ((pair, preset.noise, preset.samples),)
    return Method("random_direction", "strength", (preset.headline,), settings, run, vectors=needed)
