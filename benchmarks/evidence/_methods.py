"""The methods of the quality benchmark, each from the same factual images: steering presets, baselines, controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.evidence import _baselines
from benchmarks.shared import presets as _presets
from benchmarks.shared.lab import BATCH, CFG, Lab
from benchmarks.shared.presets import Pair, Preset, Presets, Sweep
from medsteer_core.steering.operators import Operator
from medsteer_core.vectors.pathology_vector import PathologyVector, SiteDirections
from medsteer_core.vectors.random_direction import drawn, normal_weights

OURS = ("ours", "ours_sparse", "prompt_locked")
METHODS = (*OURS, "medsteer", "polypsteer", "reprompt", "sdedit", "ddim_inversion", "pnp")
CONTROLS = ("random_direction", "strength_0", "other_vector")
BASELINES = ("reprompt", "sdedit", "ddim_inversion", "pnp")


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some factual images: their seeds, noise and latents ``(n, C, H, W)``."""

    seeds: Sequence[int]
    noise: Tensor
    latents: Tensor


class Vectors(Protocol):
    """Where vectors come from (`_store.Store`, which keeps them)."""

    def vector(self, pair: Pair, noise: str, samples: int) -> PathologyVector: ...

    def random_vector(self, pair: Pair, noise: str, samples: int, draw: int) -> PathologyVector: ...


@dataclass(frozen=True, eq=False)
class Method:
    """One way to make counterfactuals of a pair. ``run(chunk, value)`` gives latents ``(n, C, H, W)``.

    ``settings`` is everything that decides the result besides the value; ``cost(value)`` how many runs of the sampler
    an image takes; ``vectors`` the extractions needed, as (pair, noise, samples).
    """

    name: str
    parameter: str
    values: tuple[float, ...]
    headline: float
    settings: Mapping[str, Any]
    run: Callable[[Chunk, float], Tensor]
    cost: Callable[[float], float] = lambda value: 1.0
    vectors: tuple[tuple[Pair, str, int], ...] = ()


def methods(lab: Lab, vectors: Vectors, pair: Pair, presets: Presets) -> dict[str, Method]:
    """Every method and control for a pair, by name, in the order in which they are shown."""
    ours, medsteer = presets.ours_for(pair), presets.medsteer
    made = [
        _steering("ours", lab, vectors, pair, ours),
        _steering("ours_sparse", lab, vectors, pair, ours, sparse=True),
        _prompt_locked(lab, pair, ours),
        _steering("medsteer", lab, vectors, pair, medsteer),
        _steering("polypsteer", lab, vectors, pair, presets.polypsteer),
        *_baseline_methods(lab, pair),
        _random_direction(lab, vectors, pair, medsteer),
        _steering("strength_0", lab, vectors, pair, medsteer, strengths=(0.0,)),
        _steering("other_vector", lab, vectors, pair, medsteer, _presets.OTHER[pair], (medsteer.headline,)),
    ]
    return {method.name: method for method in made}


def _steering(
    name: str, lab: Lab, vectors: Vectors, pair: Pair, preset: Preset, of: Pair | None = None,
    strengths: tuple[float, ...] = (), sparse: bool = False,
) -> Method:  # fmt: skip
    """Steering by a preset, with the pair's vector or that ``of`` another; ``sparse``: the lock's tokens alone."""
    of = of or pair
    tokens = {"computed_tokens": "in the mask"} if sparse else {}

    def run(chunk: Chunk, strength: float) -> Tensor:
        model = steered(lab, vectors.vector(of, preset.noise, preset.samples), preset, strength)
        if preset.lock != "none" and strength != 0:  # at strength 0 there is no concept map, and nothing to lock
            return locked(lab, model, preset, lab.prompt(pair.source), chunk.noise, **tokens)
        return lab.sample(model, lab.prompt(pair.source), chunk.noise)

    swept = {"strengths", "headline"}
    settings = {key: value for key, value in asdict(preset).items() if key not in swept} | {"vector": of.name, **tokens}
    values, headline = (strengths, strengths[0]) if strengths else (preset.strengths, preset.headline)
    runs = 1.0 if preset.lock == "none" else 1.0 + _share_steered(preset)  # of a locked pair, its factual included
    needed = ((of, preset.noise, preset.samples),)
    return Method(name, "strength", values, headline, settings, run, lambda value: runs, needed)


def _prompt_locked(lab: Lab, pair: Pair, preset: Preset) -> Method:
    """The target's prompt from where our preset steers, locked by the predictions' difference where ours is locked."""
    lock = "none" if preset.lock == "none" else "prediction difference"

    def run(chunk: Chunk, start: float) -> Tensor:
        changes = {"counterfactual": lab.prompt(pair.target), "start_percent": start, "lock": lock,
                   "computed_tokens": "in the mask"}  # fmt: skip
        return locked(lab, lab.model, preset, lab.prompt(pair.source), chunk.noise, **changes)

    sweep = _presets.PROMPT_LOCKED
    settings = {key: value for key, value in asdict(preset).items() if key.startswith("lock_")} | {"lock": lock}
    return Method("prompt_locked", sweep.parameter, sweep.values, sweep.headline, settings, run,
                  lambda start: 2.0 - start)  # fmt: skip


def _share_steered(preset: Preset) -> float:
    """About the share of the steps that fall into the steering window."""
    return preset.end - preset.start


@dataclass(frozen=True)
class GivenNoise:
    """A NOISE, as ComfyUI's sampler nodes take one, that is there already."""

    noise: Tensor
    seed: int = 0

    def generate_noise(self, _latent: Mapping[str, Any]) -> Tensor:
        return self.noise


def locked(lab: Lab, model: Any, preset: Preset, positive: list, noise: Tensor, **changes: Any) -> Tensor:
    """The latents of Counterfactual Sampler's counterfactuals under the preset's lock, `BATCH` images at a time.

    ``changes`` are other fields of its request.
    """
    from medsteer_core.host.sampling.counterfactual import sample_pair
    from medsteer_core.host.sampling.pair_request import PairRequest

    parts = []
    for part in noise.split(BATCH):
        request = PairRequest(
            positive, lab.conditioning(""), {"samples": torch.zeros_like(part)}, 0, CFG, lab.schedule,
            threshold=preset.lock_threshold, dilation=preset.lock_dilation,
            smoothing=preset.lock_smoothing, noise=GivenNoise(part),
            **{"lock": preset.lock, **changes},
        )  # fmt: skip
        parts.append(sample_pair(model, request).counterfactual)
    return torch.cat(parts)


def steered(lab: Lab, vector: PathologyVector, preset: Preset, strength: float) -> Any:
    """The lab's model as the Steer node would give it for a preset."""
    from medsteer_core.host.patching import steer

    sites = preset.sites_of(len(lab.model.model.diffusion_model.blocks))
    parameters = {**preset.parameters, "strength": strength}
    where = (preset.start, preset.end, sites, preset.rows)
    return steer.steer(lab.model, vector, preset.operator, parameters, *where)[0]


def _baseline_methods(lab: Lab, pair: Pair) -> list[Method]:
    source, target = pair.source, pair.target

    def make(name: str, sweep: Sweep, run: Callable[[Chunk, float], Tensor], cost=lambda value: 1.0) -> Method:
        return Method(name, sweep.parameter, sweep.values, sweep.headline, {}, run, cost)

    return [
        make(
            "reprompt", _presets.REPROMPT,
            lambda chunk, share: _baselines.reprompt(lab, source, target, chunk.noise, share),
        ),
        make(
            "sdedit", _presets.SDEDIT,
            lambda chunk, denoise: _baselines.sdedit(lab, target, chunk.latents, chunk.seeds, denoise),
        ),
        make(
            "ddim_inversion", _presets.DDIM_INVERSION,
            lambda chunk, depth: _baselines.ddim_inversion(lab, source, target, chunk.latents, depth),
            cost=lambda depth: 1.5 * depth,  # half a run up, at cfg 1, and one down
        ),
        make(
            "pnp", _presets.PNP,
            lambda chunk, share: _baselines.pnp(lab, source, target, chunk.noise, share),
            cost=lambda share: 1 + share,
        ),
    ]  # fmt: skip


# The control that pushes as far as steering does, but elsewhere


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


def _random_direction(lab: Lab, vectors: Vectors, pair: Pair, preset: Preset) -> Method:
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
    return Method("random_direction", "strength", (preset.headline,), preset.headline, settings, run, vectors=needed)
