"""Steering and capture inside ComfyUI: four stateless wrappers, hooks that live for one model call.

PixArt drops `transformer_options` before its blocks, so patches in there never run; an APPLY_MODEL wrapper always runs.
For the length of one call it puts forward hooks on the sites and removes them in `finally` (an interrupt is a
BaseException). The plan travels in the model's `transformer_options`; what a run needs to remember lives in a `_Run`
that the OUTER_SAMPLE wrapper puts into that run's own copy of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from torch import Tensor, nn

from ...errors import MedSteerError
from ...steering.plan import Steering, SteeringPlan
from ...steering.prepared import PreparedPlan
from ...steering.rows import ALL_ROWS
from ...vectors.pathology_vector import PathologyVector
from .rows import INDEX_NAMES, block_rows, names_of_indices, names_of_uuids, row_finder
from .sites import Found, find, find_sites, output_width, owns_its_output

KEY = "medsteer"
_PLAN, _OBSERVERS, _RUN = "medsteer_plan", "medsteer_observers", "medsteer_run"
_BLOCKS, _BLOCKS_NOW = "medsteer_blocks", "medsteer_blocks_now"


class Observer(Protocol):
    """What a capture gives: called with the rows of one conditioning only, those that `observed` names."""

    def observe(self, site: str, sigma: float, activation: Tensor) -> None: ...


class ChangeObserver(Protocol):
    """What is shown a site's activation (images, tokens, C) and what a plan would make of it."""

    def observe(self, before: Tensor, after: Tensor) -> None: ...


@dataclass(frozen=True, eq=False)
class _Blocks:
    """The images of every call are blocks of equal length, each with a plan of its own.

    ``changes`` is shown what ``shown`` would change in the first block's positive rows.
    """

    plans: tuple[SteeringPlan, ...]
    shown: SteeringPlan
    changes: ChangeObserver | None


class _Run:
    """The state of one sampling run: a prepared plan for each block of images, mostly for the one block of all."""

    def __init__(self, plan: SteeringPlan, blocks: _Blocks | None = None):
        self.prepared = [PreparedPlan(part) for part in (blocks.plans if blocks else (plan,))]
        self.shown = PreparedPlan(blocks.shown) if blocks and blocks.changes is not None else None
        self.changes = blocks.changes if blocks else None
        self.conds: dict[str, Any] = {}
        self.uuid_names: dict[Any, str] = {}
        self.index_names: tuple[str, ...] = INDEX_NAMES
        self.size: tuple[int, ...] | None = None  # of the latent whose areas the model calls see
        self._found: dict[int, Found] = {}
        self._level: tuple[Tensor, float] | None = None

    def begin_prediction(self) -> None:
        """Model calls of another prediction begin: what was known of the last ones' noise level is forgotten."""
        self._level = None

    def level(self, sigmas: Tensor) -> float:
        """The noise level of a model call. The calls of one prediction share a tensor, so it is waited for once."""
        level = self._level
        if level is None or level[0] is not sigmas:
            level = self._level = sigmas, float(sigmas.max())
        return level[1]

    def found(self, diffusion_model: nn.Module) -> Found:
        """The model's family and sites, found once a run for each device's model."""
        key = id(diffusion_model)
        if key not in self._found:
            self._found[key] = find(diffusion_model)
        return self._found[key]


def steered(model: ModelPatcher, steering: Steering) -> ModelPatcher:
    """A clone of ``model`` with ``steering`` after those it already has. The model itself is left as it was."""
    check_fits(model, steering)
    options = model.model_options.get("transformer_options", {})
    return _with(model, _PLAN, options.get(_PLAN, SteeringPlan()).then(steering))


def observed(model: ModelPatcher, observer: Observer, rows: str = "positive") -> ModelPatcher:
    """A clone of ``model`` that shows every site's output (after its steering, if any) to ``observer``.

    It sees the rows of the conditioning ``rows``; observers of other rows stay.
    """
    find_sites(model.model.diffusion_model)
    others = model.model_options.get("transformer_options", {}).get(_OBSERVERS, {})
    return _with(model, _OBSERVERS, {**others, rows: observer})


def with_blocks(
    model: ModelPatcher, plans: Sequence[SteeringPlan], changes: ChangeObserver | None = None
) -> ModelPatcher:
    """A clone of ``model`` for batches of ``len(plans)`` blocks of images, each steered by its own plan.

    ``changes`` is shown what the model's own plan would change in the first block's positive rows. Nothing else of the
    model's own plan acts in the clone. A call of fewer blocks says so through `in_blocks`.
    """
    return _with(model, _BLOCKS, _Blocks(tuple(plans), plan_of(model), changes))


def in_blocks(model_options: dict[str, Any], count: int) -> dict[str, Any]:
    """Model options for one prediction over the first ``count`` blocks."""
    return {**model_options, "transformer_options": {**model_options["transformer_options"], _BLOCKS_NOW: count}}


def plan_of(model: ModelPatcher) -> SteeringPlan:
    """The steering plan that a model carries; an empty one for a model that is not steered."""
    return model.model_options.get("transformer_options", {}).get(_PLAN, SteeringPlan())


def _with(model: ModelPatcher, key: str, value: object) -> ModelPatcher:
    clone = model.clone()
    clone.model_options.setdefault("transformer_options", {})[key] = value
    wrappers = (
        (WrappersMP.OUTER_SAMPLE, _outer_sample),
        (WrappersMP.PREDICT_NOISE, _predict_noise),
        (WrappersMP.CALC_COND_BATCH, _calc_cond_batch),
        (WrappersMP.APPLY_MODEL, _apply_model),
    )
    for kind, wrapper in wrappers:
        if not clone.get_wrappers(kind, KEY):
            clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


def check_fits(model: ModelPatcher, steering: Steering) -> None:
    """Refuse a steering whose vectors' sites or widths are not the model's, naming the first that differs."""
    sites = find_sites(model.model.diffusion_model)
    for vector in (steering.vector, *([] if steering.target is None else [steering.target])):
        _check_vector(sites, vector, steering.sites)


def _check_vector(sites: dict[str, nn.Module], vector: PathologyVector, chosen: Sequence[str]) -> None:
    known = {*vector.site_names, *vector.provenance.get("dropped_sites", ())}
    strange = [name for name in known if name not in sites] or [name for name in sites if name not in known]
    if strange:
        raise MedSteerError(
            f"This vector was made for another model: it has {len(known)} sites and the model has {len(sites)}, "
            f"{_span(sites)}; '{sorted(strange)[0]}' is in only one of them. Extract a vector from this model."
        )
    for name in chosen:
        width = output_width(sites[name])
        if width is not None and width != vector.channels(name):
            raise MedSteerError(
                f"This vector was made for another model: site '{name}' has {vector.channels(name)} channels in the "
                f"vector and {width} in the model. Extract a vector from this model."
            )


def _span(sites: dict[str, nn.Module]) -> str:
    names = list(sites)
    return f"'{names[0]}' to '{names[-1]}'"


def _outer_sample(executor: Callable, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *args, **kwargs):
    """One run: check the plan against this schedule and guider, give the run its state, check what was done."""
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]  # this run's own copy
    plan, blocks = options.get(_PLAN, SteeringPlan()), options.get(_BLOCKS)
    for part in blocks.plans if blocks else (plan,):
        _check_reachable(part, sigmas, guider.conds)
    options[_RUN] = run = _Run(plan, blocks)
    try:
        result = executor(noise, latent, sampler, sigmas, *args, **kwargs)
    finally:
        options.pop(_RUN, None)
    _check_touched(run, result)
    return result


def _predict_noise(executor: Callable, x: Tensor, timestep: Tensor, model_options: dict, *args, **kwargs):
    """Learn the names of this run's conditionings from its guider (uuids are new in every run)."""
    run = (model_options or {}).get("transformer_options", {}).get(_RUN)
    if run is not None and not run.uuid_names:
        run.conds = executor.class_obj.conds
        run.uuid_names = names_of_uuids(run.conds)
    return executor(x, timestep, model_options, *args, **kwargs)


def _calc_cond_batch(executor: Callable, model: Any, conds: list, x: Tensor, timestep: Tensor, model_options: dict):
    """Learn which conditioning each index of the coming model calls means; guiders order them as they like."""
    run = model_options.get("transformer_options", {}).get(_RUN)
    if run is not None:
        run.begin_prediction()
        run.size = tuple(x.shape[2:])
        if run.conds:
            run.index_names = names_of_indices(conds, run.conds)
    return executor(model, conds, x, timestep, model_options)


def _apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    """One model call: hooks on the sites that act now, removed whatever happens."""
    options = transformer_options or {}
    run = options.get(_RUN) or _Run(options.get(_PLAN, SteeringPlan()), options.get(_BLOCKS))
    base_model = executor.class_obj
    sigmas = options.get("sigmas")
    sigma = run.level(t if sigmas is None else sigmas)
    observers: dict[str, Observer] = options.get(_OBSERVERS, {}) if sigma > 0 else {}
    blocks = run.prepared[: options.get(_BLOCKS_NOW, len(run.prepared))]
    shown = [run.shown] if run.shown is not None else []
    form = base_model.get_dtype_inference(), x.device
    active = {site: None for plan in (*blocks, *shown) for site in plan.prepare(sigma, *form)} if sigma > 0 else {}
    if not active and not observers:
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    rows = row_finder(x.shape[0], options, run.uuid_names, run.index_names)
    watching = [(observer, ranges) for cond, observer in observers.items() if (ranges := rows(cond))]
    if not active and not watching:
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    found = run.found(base_model.diffusion_model)
    parts = [block_rows(rows, x.shape[0], options, index, len(blocks)) for index in range(len(blocks))]

    size = tuple(x.shape[2:])
    is_part = run.size is not None and size != run.size
    _check_masks(blocks, x.shape[0] // len(options.get("cond_or_uncond") or [0]) // len(blocks), is_part)
    steering = [plan.for_call(*where, size) for plan, where in zip(blocks, parts, strict=True)]
    # The map is of the whole image: a call for an area of it is no part of that.
    mapped = parts[0][0]("positive") if shown and not is_part else ()
    mapping = run.shown.for_call(lambda _name: None, None, size) if mapped else None

    def visit(name: str, output: Tensor, owned: bool) -> Tensor:
        _check_rows(name, output, x.shape[0])
        if name in active:
            for start, stop in mapped:
                before = output[start:stop]
                run.changes.observe(before, mapping.apply(name, before))
            in_place = owned and _is_free(output)
            for call in steering:
                output = call.apply(name, output, in_place)
        for observer, ranges in watching:
            for start, stop in ranges:
                observer.observe(name, sigma, output[start:stop])
        return output

    hooked = {name: (found.sites[name], found.fresh[name]) for name in (found.sites if watching else active)}
    with _uncompiled(options), _hooks(hooked, _rows_first(visit) if found.family.tokens_first else visit):
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


_Visit = Callable[[str, Tensor, bool], Tensor]  # (site, its output, whether nobody else holds that) -> new output


def _rows_first(visit: _Visit) -> _Visit:
    """`visit` for sites that give (tokens, rows, channels): it sees them as (rows, tokens, channels)."""

    return lambda name, output, owned: visit(name, output.transpose(0, 1), owned).transpose(0, 1)


def _is_free(output: Tensor) -> bool:
    """Whether an output that nobody else holds can be written into: no gradient wants what it was."""
    return type(output) is Tensor and not output.requires_grad and output.is_contiguous()


def _check_rows(name: str, output: Tensor, rows: int) -> None:
    """Refuse an output in which the rows of a conditioning could not be found."""
    if output.ndim != 3 or output.shape[0] != rows:
        raise MedSteerError(
            f"Site '{name}' gave an activation of shape {tuple(output.shape)} in a model call of {rows} rows; "
            f"({rows}, tokens, channels) was expected. Remove patches that change the batch inside the model."
        )


def _check_masks(plans: Sequence[PreparedPlan], images: int, is_part: bool) -> None:
    """Refuse masks on Steer that don't fit a call of ``images``, or that sees an area of the image (``is_part``)."""
    for mask in (steering.mask for plan in plans for steering in plan.plan.steerings if steering.mask is not None):
        if images % len(mask):
            raise MedSteerError(
                f"Steer has {len(mask)} masks, and this run makes {images} images. Give it 1 or {images}."
            )
        if is_part:
            raise MedSteerError(
                "A mask on Steer covers the whole image, and a conditioning here is for an area of it. Give the "
                "conditioning a mask instead (with set_cond_area 'default'), or remove the mask from Steer."
            )


def _uncompiled(options: dict[str, Any]) -> AbstractContextManager:
    """Run a torch.compile'd model eagerly for this call: compiled code does not see hooks that come and go."""
    compiled = COMPILE_KEY in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def _hooks(sites: dict[str, tuple[nn.Module, tuple[nn.Module, ...]]], visit: _Visit) -> Iterator[None]:
    """Hooks on sites, each given with its `fresh_layers`."""
    handles = []

    def hook(name: str, owned: bool) -> Callable:
        return lambda _module, _args, output: visit(name, output, owned)

    try:
        for name, (module, fresh) in sites.items():
            handles.append(module.register_forward_hook(hook(name, owns_its_output(fresh))))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_reachable(plan: SteeringPlan, sigmas: Tensor, conds: dict[str, Any]) -> None:
    """Refuse, before a step is taken, a steering that no step or no conditioning can reach."""
    levels = [float(sigma) for sigma in sigmas[:-1] if float(sigma) > 0]
    for steering in plan.steerings:
        if steering.operator.is_identity:
            continue
        if levels and not steering.window.any_of(levels):
            raise MedSteerError(
                f"No step of this schedule falls into the steering window (sigma {steering.window.start_sigma:.4g} to "
                f"{steering.window.end_sigma:.4g}; the {len(levels)} steps run from {levels[0]:.4g} to "
                f"{levels[-1]:.4g}). Widen start_percent and end_percent of Steer, or use more steps."
            )
        if steering.rows != ALL_ROWS and steering.rows not in conds:
            raise MedSteerError(
                f"Steer asks for rows '{steering.rows}', but this sampler's conditionings are "
                f"{', '.join(sorted(conds))}. Write one of these names, or 'all'."
            )


def _check_touched(run: _Run, result: Tensor) -> None:
    """Refuse silent success: a steering that changed nothing, or a result that is not finite."""
    for steering in (steering for plan in run.prepared for steering in plan.untouched()):
        raise MedSteerError(
            f"Steering ({steering.operator.name}, rows '{steering.rows}') changed nothing in this run. Rows that are "
            "never evaluated (the negative ones at cfg 1), a compiled model or a cache that skips every step cause "
            "this. Use rows 'all', or remove the other patch."
        )
    steers = any(plan.plan.sites for plan in run.prepared)
    if steers and isinstance(result, Tensor) and not torch.isfinite(result).all():
        raise MedSteerError("The steered run gave NaN or infinite latents. Lower the strength, or narrow the window.")
