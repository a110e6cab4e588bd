"""The methods of the quality benchmark, each from the same factual images, and each offered the same windows and locks.

A method's arms differ in what it may choose besides its parameter: where in the schedule it begins, and a lock. Which
arm and value is reported is chosen on development seeds, by one rule for all (`_choice`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence import _baselines
from benchmarks.evidence._controls import random_direction
from benchmarks.evidence._method import Chunk, Method, Vectors
from benchmarks.shared import presets as _presets
from benchmarks.shared.lab import BATCH, CFG, Lab
from benchmarks.shared.presets import Pair, Preset, Presets, Sweep
from medsteer_core.scores.scorer import embedded_judges, score_pairs
from medsteer_core.steering.recipes import CONCEPT, OPEN, PREDICTION
from medsteer_core.vectors.pathology_vector import PathologyVector

RECIPE, VECTOR = "recipe", "vector"
OURS = (RECIPE, VECTOR, "both", "calibrated")
LOCKED_PROMPT = "prompt_switch_lock"
BASELINES = (
    "prompt_switch",
    LOCKED_PROMPT,
    "prompt_switch_calibrated",
    "medsteer",
    "polypsteer",
    "sdedit",
    "ddim_inversion",
    "pnp",
)
METHODS = (*OURS, *BASELINES)
PASSES, MOST = 5.0, 2.0  # of Calibrate Strength
CONTROLS = ("random_direction", "strength_0", "other_vector")


def methods(lab: Lab, vectors: Vectors, pair: Pair, presets: Presets) -> dict[str, tuple[Method, ...]]:
    """Every method and control for a pair, by name, in the order in which they are shown; each with its arms."""
    medsteer, polypsteer = presets.medsteer, presets.polypsteer
    other = _presets.OTHER[pair]
    made = [
        recipe(lab, vectors, pair, presets.ours_for(pair)),
        *_steering_arms(VECTOR, lab, vectors, pair, presets.ours_for(pair), _presets.STARTS),
        *_steering_arms("both", lab, vectors, pair, presets.both_for(pair), _presets.STARTS),
        calibrated(lab, vectors, pair, presets.ours_for(pair)),
        *_prompt_arms(lab, vectors, pair, presets.ours_for(pair)),
        calibrated_prompt(lab, vectors, pair, presets.ours_for(pair)),
        *_steering_arms("medsteer", lab, vectors, pair, medsteer, _presets.WINDOWS),
        *_steering_arms("polypsteer", lab, vectors, pair, polypsteer, _presets.WINDOWS),
        *_baseline_arms(lab, vectors, pair, presets.ours_for(pair)),
        random_direction(lab, vectors, pair, medsteer),
        steering("strength_0", lab, vectors, pair, medsteer.varied({"strengths": (0.0,)})),
        steering("other_vector", lab, vectors, pair, medsteer.varied({"strengths": (medsteer.headline,)}), other),
    ]
    return {name: tuple(method for method in made if method.name == name) for name in (*METHODS, *CONTROLS)}


def locks_of(pair: Pair) -> tuple[str, ...]:
    """What a method is offered for a pair: a finding of the whole wall leaves nothing to lock."""
    return (OPEN,) if pair.diffuse else (OPEN, CONCEPT)


def _under(start: float, lock: str = OPEN) -> str:
    words = [f"from {start:g}" if start else "", "" if lock == OPEN else f"lock: {lock}"]
    return ", ".join(filter(None, words))


def _steering_arms(
    name: str, lab: Lab, vectors: Vectors, pair: Pair, preset: Preset, starts: Sequence[float]
) -> Iterator[Method]:
    """A preset with every start and lock that a method is offered."""
    for start in starts:
        for lock in locks_of(pair):
            yield steering(name, lab, vectors, pair, replace(preset, start=start, lock=lock))


def recipe(lab: Lab, vectors: Vectors, pair: Pair, preset: Preset) -> Method:
    """What the nodes' recipe for such a pair makes, at its own strength alone."""
    return steering(RECIPE, lab, vectors, pair, replace(preset, strengths=(preset.headline,)))


def steering(name: str, lab: Lab, vectors: Vectors, pair: Pair, preset: Preset, of: Pair | None = None) -> Method:
    """Steering by a preset, with the pair's vector or that ``of`` another."""
    of, prompt = of or pair, preset.prompt

    def run_many(chunk: Chunk, strengths: Sequence[float]) -> Tensor:
        model = steered(lab, vectors.vector(of, preset.noise, preset.samples), preset, 1.0)
        changes = {"counterfactual": lab.prompt(pair.target), "start_percent": preset.start} if prompt else {}
        made = locked(lab, model, preset, lab.prompt(pair.source), chunk.noise, multiples=strengths, **changes)
        return made.view(len(strengths), *chunk.noise.shape)

    def run(chunk: Chunk, strength: float) -> Tensor:
        if preset.lock != OPEN or prompt:
            return run_many(chunk, (strength,))[0]
        model = steered(lab, vectors.vector(of, preset.noise, preset.samples), preset, strength)
        return lab.sample(model, lab.prompt(pair.source), chunk.noise)

    swept = {"strengths", "headline"}
    settings = {key: value for key, value in asdict(preset).items() if key not in swept} | {"vector": of.name}
    paired = preset.lock != OPEN or prompt
    runs = 2.0 - preset.start if paired else 1.0  # of a pair that is made as one, its factual is among them
    return Method(
        name, "strength", preset.strengths, settings, run, lambda strength: runs, ((of, preset.noise, preset.samples),),
        _under(preset.start, preset.lock), run_many if paired or preset.start else None,
    )  # fmt: skip


def calibrated(lab: Lab, vectors: Vectors, pair: Pair, preset: Preset) -> Method:
    """Our recipe with each image's least strength that flips it, as the node Calibrate Strength finds it."""

    def run(chunk: Chunk, passes: float) -> Tensor:
        from medsteer_core.host.sampling.calibration import calibrate
        from medsteer_core.host.sampling.flips import ByJudge

        vector = vectors.vector(pair, preset.noise, preset.samples)
        model = steered(lab, vector, preset, preset.headline)
        request = _request(lab, preset, lab.prompt(pair.source), chunk.noise)
        flips = ByJudge(lab.vae, embedded_judges(), pair.source, pair.target)
        return calibrate(model, request, flips, int(passes), MOST).pair.counterfactual

    settings = {key: value for key, value in asdict(preset).items() if key != "strengths"} | {"most": MOST}
    return Method("calibrated", "passes", (PASSES,), settings, run, lambda passes: 1 + passes * (1 - preset.start),
                  ((pair, preset.noise, preset.samples),))  # fmt: skip


def calibrated_prompt(lab: Lab, vectors: Vectors, pair: Pair, preset: Preset) -> Method:
    """The same for the prompt under our lock: of each image the latest start at which the target's prompt flips it."""
    arm = _prompt_in_map(lab, vectors, pair, preset)
    if pair.diffuse:
        arm = replace(arm, settings={}, vectors=(), run=lambda chunk, start: _baselines.reprompt(
            lab, pair.source, pair.target, chunk.noise, start))  # fmt: skip

    def run(chunk: Chunk, _passes: float) -> Tensor:
        factual, made = lab.images(chunk.latents), chunk.latents.clone()
        left = list(range(len(chunk.seeds)))
        for start in _presets.LATEST_FIRST:
            some = Chunk([chunk.seeds[i] for i in left], chunk.noise[left], chunk.latents[left])
            found = arm.run(some, start)
            scores = score_pairs(factual[left], lab.images(found), pair.source, pair.target)
            made[left] = found  # where none flips, the earliest start's
            left = [place for place, score in zip(left, scores, strict=True) if not score.flipped]
            if not left:
                break
        return made

    settings = {**arm.settings, "starts": _presets.LATEST_FIRST}
    passes = float(len(_presets.LATEST_FIRST))
    return Method("prompt_switch_calibrated", "passes", (passes,), settings, run, lambda value: 3.0, arm.vectors)


def _prompt_arms(lab: Lab, vectors: Vectors, pair: Pair, preset: Preset) -> Iterator[Method]:
    """The target's prompt from some step on: free, and under a lock by the predictions' difference or the vector."""
    free, under = _presets.PROMPT_SWITCH, _presets.PROMPT_SWITCH_LOCK

    def switched(chunk: Chunk, start: float) -> Tensor:
        return _baselines.reprompt(lab, pair.source, pair.target, chunk.noise, start)

    yield Method("prompt_switch", free.parameter, free.values, {}, switched)
    if pair.diffuse:
        return

    def by_predictions(chunk: Chunk, start: float) -> Tensor:
        changes = {"counterfactual": lab.prompt(pair.target), "start_percent": start, "lock": PREDICTION}
        return locked(lab, lab.model, preset, lab.prompt(pair.source), chunk.noise, **changes)

    settings = {key: value for key, value in asdict(preset).items() if key.startswith("lock_")} | {"lock": PREDICTION}
    yield Method(LOCKED_PROMPT, under.parameter, under.values, settings, by_predictions, lambda start: 2.0 - start,
                 arm=_under(0, PREDICTION))  # fmt: skip
    yield replace(_prompt_in_map(lab, vectors, pair, preset), values=under.values)


def _prompt_in_map(lab: Lab, vectors: Vectors, pair: Pair, preset: Preset) -> Method:
    """The target's prompt where the vector would act: its concept map is the lock, and it does nothing else."""

    def run(chunk: Chunk, start: float) -> Tensor:
        model = steered(lab, vectors.vector(pair, preset.noise, preset.samples), preset, preset.headline)
        changes = {"counterfactual": lab.prompt(pair.target), "start_percent": start, "lock": CONCEPT}
        return locked(lab, model, preset, lab.prompt(pair.source), chunk.noise, multiples=(0.0,), **changes)

    settings = {key: value for key, value in asdict(preset).items() if key != "strengths"} | {"marks": pair.name}
    return Method(
        LOCKED_PROMPT, _presets.PROMPT_SWITCH_LOCK.parameter, (), settings, run, lambda start: 2.0 - start,
        ((pair, preset.noise, preset.samples),), _under(0, CONCEPT),
    )  # fmt: skip


@dataclass(frozen=True)
class GivenNoise:
    """A NOISE, as ComfyUI's sampler nodes take one, that is there already."""

    noise: Tensor
    seed: int = 0

    def generate_noise(self, _latent: Mapping[str, Any]) -> Tensor:
        return self.noise


def locked(lab: Lab, model: Any, preset: Preset, positive: list, noise: Tensor, **changes: Any) -> Tensor:
    """The latents of Counterfactual Sampler's counterfactuals under the preset's lock, `BATCH` images at a time; with
    several ``multiples`` all images of the first come first.

    ``changes`` are other fields of its request.
    """
    return _pairs(lab, model, preset, positive, noise, lambda pair: pair.counterfactual, **changes)


def _pairs(
    lab: Lab, model: Any, preset: Preset, positive: list, noise: Tensor, what: Callable[[Any], Tensor], **changes: Any
) -> Tensor:
    from medsteer_core.host.sampling.counterfactual import sample_pair

    parts = []
    for part in noise.split(BATCH):
        made = what(sample_pair(model, _request(lab, preset, positive, part, **changes)))
        parts.append(made.view(-1, len(part), *made.shape[1:]))
    return torch.cat(parts, dim=1).flatten(0, 1)


def _request(lab: Lab, preset: Preset, positive: list, noise: Tensor, **changes: Any) -> Any:
    """What Counterfactual Sampler is asked for images of this noise under a preset's lock."""
    from medsteer_core.host.sampling.pair_request import IN_MASK, PairRequest

    return PairRequest(
        positive, lab.conditioning(""), {"samples": torch.zeros_like(noise)}, 0, CFG, lab.schedule,
        threshold=preset.lock_threshold, dilation=preset.lock_dilation,
        smoothing=preset.lock_smoothing, noise=GivenNoise(noise), computed_tokens=IN_MASK,
        **{"lock": preset.lock, **changes},
    )  # fmt: skip


def steered(lab: Lab, vector: PathologyVector, preset: Preset, strength: float) -> Any:
    """The lab's model as the Steer node would give it for a preset."""
    from medsteer_core.host.patching import steer

    sites = preset.sites_of(len(lab.model.model.diffusion_model.blocks))
    parameters = {**preset.parameters, "strength": strength}
    where = (preset.start, preset.end, sites, preset.rows)
    return steer.steer(lab.model, vector, preset.operator, parameters, *where)[0]


def _baseline_arms(lab: Lab, vectors: Vectors, pair: Pair, preset: Preset) -> Iterator[Method]:
    """Image editing by prompts, free, and with what lies outside our lock's mask put back."""
    source, target = pair.source, pair.target

    def mask(chunk: Chunk) -> Tensor:
        model = steered(lab, vectors.vector(pair, preset.noise, preset.samples), preset, preset.headline)
        scale = lab.latent["downscale_ratio_spacial"]
        return _pairs(lab, model, preset, lab.prompt(source), chunk.noise, lambda made: made.mask[:, ::scale, ::scale],
                      lock=CONCEPT) > 0  # fmt: skip

    masks: dict[tuple[int, ...], Tensor] = {}

    def arms(name: str, sweep: Sweep, run: Callable[[Chunk, float], Tensor], cost=lambda value: 1.0):
        free = Method(name, sweep.parameter, sweep.values, {}, run, cost)
        yield free
        if pair.diffuse:
            return

        def put_back(chunk: Chunk, value: float) -> Tensor:
            made = vectors.latents(pair, free, value, chunk.seeds)[0]
            seeds = tuple(chunk.seeds)
            if seeds not in masks:
                masks[seeds] = mask(chunk)
            return torch.where(masks[seeds][:, None], made, chunk.latents)

        settings = {key: value for key, value in asdict(preset).items() if key != "strengths"}
        yield Method(name, sweep.parameter, sweep.values, settings, put_back, lambda value: 0.1 + 1 / len(sweep.values),
                     ((pair, preset.noise, preset.samples),), _under(0, CONCEPT))  # fmt: skip

    yield from arms(
        "sdedit", _presets.SDEDIT,
        lambda chunk, denoise: _baselines.sdedit(lab, target, chunk.latents, chunk.seeds, denoise),
    )  # fmt: skip
    yield from arms(
        "ddim_inversion", _presets.DDIM_INVERSION,
        lambda chunk, depth: _baselines.ddim_inversion(lab, source, target, chunk.latents, depth),
        cost=lambda depth: 1.5 * depth,  # half a run up, at cfg 1, and one down
    )  # fmt: skip
    yield from arms(
        "pnp", _presets.PNP,
        lambda chunk, share: _baselines.pnp(lab, source, target, chunk.noise, share),
        cost=lambda share: 1 + share,
    )  # fmt: skip
