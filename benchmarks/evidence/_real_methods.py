"""Ways to make the counterfactual of a real image, all offered the same lock: ours, and what the literature has.

Every method takes latents of real images and a mask, or none, and gives latents; `rows` counts what the network was
asked (images times conditionings, as shares of a batch).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence import _baselines
from benchmarks.shared.lab import BATCH, CFG, STEPS, Lab
from benchmarks.shared.presets import Pair
from medsteer_core.steering.recipes import ADD, IMAGE_RECIPES, REMOVE_DIFFUSE, REMOVE_FOCAL

LOCK, OPEN, RECIPE = "lock", "open", "recipe"


@dataclass(frozen=True, eq=False)
class Real:
    """Real images as latents ``(n, C, h, w)``, and where the shared lock lets them change ``(n, h, w)``."""

    pair: Pair
    latents: Tensor
    allowed: Tensor
    first: int = 0  # number of the first image
    drawn: bool = False  # whether a user's mask says where, which comes before a method's own lock


@dataclass(frozen=True)
class Way:
    """One setting of a method: ``value`` of its swept parameter, locked or not, and other changes of its own."""

    value: float
    lock: str = LOCK
    changes: Mapping[str, Any] = field(default_factory=dict)


def run_classes() -> dict[str, type]:
    """Our run of a real image, and the two published difference forms as variants of it; after `start_comfyui`."""
    from medsteer_core.host.sampling.image_path import Beside
    from medsteer_core.host.sampling.image_run import ImageRun

    class Noised(ImageRun):
        """FlowEdit (Kulikov et al. 2024): the image's state is the image under noise that is new at each level."""

        def _states(self) -> list[Tensor]:
            draw = torch.Generator().manual_seed(self.request.seed)
            sampling = self.model.get_model_object("model_sampling")
            base = self.model.model.process_latent_in(self.latents)
            fresh = [torch.randn(base.shape, generator=draw) for _ in self._levels[:-1]]
            return [
                sampling.noise_scaling(sigma, noise, base.clone(), False).to(self.model.load_device)
                for sigma, noise in zip(self._levels[:-1], fresh, strict=True)
            ]

    class Ancestral(Beside):
        """The mean of the ancestral step of models that are no flow: with new noise at each level less of the edit is
        shared by the next."""

        def kept(self, sigma: float, after: float) -> float:
            return (after / sigma) ** 2

    class EditFriendly(Noised):
        """Edit-friendly inversion (Huberman-Spiegelglas et al., CVPR 2024), in its difference form."""

        beside = Ancestral

    return {"ours": ImageRun, "flowedit": Noised, "edit_friendly": EditFriendly}


def in_batches(real: Real, run: Callable[[Real], Tensor]) -> Tensor:
    parts = []
    for first in range(0, len(real.latents), BATCH):
        here = slice(first, first + BATCH)
        parts.append(run(replace(real, latents=real.latents[here], allowed=real.allowed[here], first=first)))
    return torch.cat(parts)


def composite(real: Real, latents: Tensor, lock: str) -> Tensor:
    """A lock for methods that have none of their own: what is outside the mask is the image's."""
    return latents if lock == OPEN else torch.where(real.allowed[:, None], latents, real.latents)


def own_lock(run: Any) -> Tensor:
    """The node's lock of a run whose factual is recorded."""
    from medsteer_core.steering.token_map import OWN_THRESHOLD, threshold_mask

    return threshold_mask(run.prediction_difference(), OWN_THRESHOLD, 1)


class Methods:
    """The methods by name: ``run(name, real, way)`` gives latents, and `rows` what the last one cost an image."""

    def __init__(self, lab: Lab, vectors: Callable[[Pair], Any]):
        self.lab, self.rows = lab, 0.0
        self._vectors, self._runs = vectors, run_classes()

    def run(self, name: str, real: Real, way: Way) -> Tensor:
        self.rows = 0.0
        return in_batches(real, partial(getattr(self, f"_{name}"), way=way))

    def lock_of(self, real: Real) -> Tensor:
        """Where the two prompts' predictions differ on the images' own way: the node's lock (see its defaults)."""

        def allowed(part: Real) -> Tensor:
            run = self._image_run("ours", part, Way(0.45), prompt=True)
            run.factual(keep_parts=True)
            return own_lock(run)

        return in_batches(real, allowed)

    def _image_run(self, kind: str, real: Real, way: Way, prompt: bool, model: Any = None) -> Any:
        from medsteer_core.host.patching.levels import on_schedule
        from medsteer_core.host.patching.patch import plan_of
        from medsteer_core.host.sampling.pair_request import PairRequest

        lab, model = self.lab, model or self.lab.model
        request = PairRequest(
            lab.prompt(real.pair.source), lab.conditioning(""), {"samples": real.latents}, 1 + real.first,
            way.changes.get("cfg", CFG), lab.schedule,
            counterfactual=lab.prompt(real.pair.target) if prompt else None,
            start_percent=way.changes.get("start", way.value),
        )  # fmt: skip
        return self._runs[kind](model, on_schedule(plan_of(model), model), request, 1)

    def _differing(self, kind: str, real: Real, way: Way, prompt: bool = True, model: Any = None) -> Tensor:
        from medsteer_core.host.patching.levels import on_schedule
        from medsteer_core.host.patching.patch import plan_of

        run = self._image_run(kind, real, way, prompt, model)
        run.factual(keep_parts=prompt)
        plan = on_schedule(plan_of(model or self.lab.model), model or self.lab.model)
        own = kind == "ours" and prompt and not real.drawn
        allowed = None if way.lock == OPEN else own_lock(run) if own else real.allowed
        latents = run.counterfactual(plan, allowed)
        self.rows = run.cost * STEPS * 2
        return latents

    def _ours_prompt(self, real: Real, way: Way) -> Tensor:
        return self._differing("ours", real, way)

    _recipe = _ours_prompt

    def _ours_vector(self, real: Real, way: Way) -> Tensor:
        return self._differing("ours", real, way, prompt=False, model=self._steered(real.pair, way))

    def _ours_both(self, real: Real, way: Way) -> Tensor:
        return self._differing("ours", real, way, model=self._steered(real.pair, way))

    def _flowedit(self, real: Real, way: Way) -> Tensor:
        return self._differing("flowedit", real, way)

    def _edit_friendly(self, real: Real, way: Way) -> Tensor:
        return self._differing("edit_friendly", real, way)

    def _steered(self, pair: Pair, way: Way) -> Any:
        from medsteer_core.host.patching import steer

        parameters = {"strength": way.value, "focus": 1.0, "keep_norm": False}
        where = (way.changes.get("start", 0.35), 1.0, "all", "all")
        return steer.steer(self.lab.model, self._vectors(pair), "affine", parameters, *where)[0]

    def _sdedit(self, real: Real, way: Way) -> Tensor:
        seeds = range(real.first, real.first + len(real.latents))
        latents = _baselines.sdedit(self.lab, real.pair.target, real.latents, seeds, way.value)
        self.rows = 2 * STEPS
        return composite(real, latents, way.lock)

    def _ddim_inversion(self, real: Real, way: Way) -> Tensor:
        latents = _baselines.ddim_inversion(self.lab, real.pair.source, real.pair.target, real.latents, way.value)
        self.rows = 3 * round(way.value * STEPS)
        return composite(real, latents, way.lock)


CFGS = {"removing": (2.0, 3.0), "adding": (3.0, 4.0)}
STARTS = (0.25, 0.35)
BASELINES = ("sdedit", "ddim_inversion", "flowedit", "edit_friendly")
OURS = (RECIPE, "ours_prompt", "ours_vector", "ours_both")
VALUES: Mapping[str, tuple[float, ...]] = {
    "sdedit": (0.3, 0.4, 0.5),
    "ddim_inversion": (0.4, 0.6),
    "flowedit": (0.15, 0.25, 0.35, 0.5),
    "edit_friendly": (0.3, 0.4, 0.5, 0.6),
    "ours_prompt": (0.15, 0.25, 0.35, 0.45),
    "ours_vector": (1.0, 1.5),
    "ours_both": (0.5, 1.0, 1.5),
}


def ways(name: str, pair: Pair, free: bool = False) -> list[Way]:
    """Every setting that is tried: the parameter's values under the lock, and ``free`` of it too; a diffuse finding has
    no lock."""
    if name == RECIPE:
        return [recipe_of(pair)]
    changes: list[dict[str, Any]] = [{}]
    if name == "ours_prompt":
        changes = [{"cfg": cfg} for cfg in CFGS[pair.kind]]
    elif name in OURS:
        changes = [{"cfg": CFGS[pair.kind][0], "start": start} for start in STARTS]
    locks = (OPEN,) if pair.diffuse else (LOCK, OPEN) if free else (LOCK,)
    return [Way(value, lock, change) for value in VALUES[name] for lock in locks for change in changes]


def recipe_of(pair: Pair) -> Way:
    """Counterfactual of Image as its recipe for such a pair sets it."""
    kind = ADD if pair.kind == "adding" else REMOVE_DIFFUSE if pair.diffuse else REMOVE_FOCAL
    inputs = IMAGE_RECIPES[kind]
    lock = OPEN if pair.diffuse else LOCK
    return Way(inputs["counterfactual_start"], lock, {"cfg": inputs["cfg"]})


def label_of(name: str, way: Way) -> str:
    """A setting of a method in words that begin with the method's name."""
    more = [f"{key} {value:g}" for key, value in way.changes.items()]
    return " ".join([name, f"{way.value:g}", *more, way.lock])


_LOW = {"cfg": 2.0}
# By the rule of `bench real --sweep`, of 24 development scenes each; ours is the recipe's where the node has one.
CHOSEN: Mapping[str, Mapping[str, Way]] = {
    "polyps -> normal cecum": {
        "ours_prompt": Way(0.35, changes={"cfg": 3.0}),
        "ours_both": Way(0.5, changes={**_LOW, "start": 0.35}),
        "sdedit": Way(0.5),
        "ddim_inversion": Way(0.6),
        "flowedit": Way(0.5),
        "edit_friendly": Way(0.5),
    },
    "esophagitis -> normal z-line": {
        "ours_prompt": Way(0.35, changes={"cfg": 3.0}),
        "ours_both": Way(0.5, changes={**_LOW, "start": 0.35}),
        "sdedit": Way(0.4),
        "ddim_inversion": Way(0.6),
        "flowedit": Way(0.35),
        "edit_friendly": Way(0.5),
    },
    "dyed lifted polyps -> polyps": {
        "ours_prompt": Way(0.35, changes=_LOW),
        "ours_vector": Way(1.5, changes={**_LOW, "start": 0.35}),
        "ours_both": Way(0.5, changes={**_LOW, "start": 0.35}),
        "sdedit": Way(0.4),
        "ddim_inversion": Way(0.4),
        "flowedit": Way(0.5),
        "edit_friendly": Way(0.5),
    },
    "ulcerative colitis -> normal cecum": {
        "ours_prompt": Way(0.25, OPEN, _LOW),
        "ours_both": Way(0.5, OPEN, {**_LOW, "start": 0.25}),
        "sdedit": Way(0.4, OPEN),
        "ddim_inversion": Way(0.6, OPEN),
        "flowedit": Way(0.25, OPEN),
        "edit_friendly": Way(0.4, OPEN),
    },
    "normal cecum -> polyps": {
        "ours_prompt": Way(0.25, changes={"cfg": 4.0}),
        "ours_both": Way(1.5, changes={"cfg": 3.0, "start": 0.25}),
        "sdedit": Way(0.5),
        "ddim_inversion": Way(0.6),
        "flowedit": Way(0.15),
        "edit_friendly": Way(0.3),
    },
}
