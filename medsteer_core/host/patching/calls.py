"""The four stateless wrappers: one run, one prediction, one batch of conditionings, one model call.

PixArt drops `transformer_options` before its blocks, so patches in there never run; an APPLY_MODEL wrapper always runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...steering.plan import SteeringPlan
from .checks import check_masks, check_reachable, check_rows, check_touched
from .hooks import hooks, is_free, rows_first, uncompiled
from .rows import block_rows, names_of_indices, names_of_uuids, row_finder
from .run_state import BLOCKS, BLOCKS_NOW, OBSERVERS, PLAN, RUN, Observer, Run


def outer_sample(executor: Callable, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *args, **kwargs):
    """One run: check the plan against this schedule and guider, give the run its state, check what was done."""
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]  # this run's own copy
    plan, blocks = options.get(PLAN, SteeringPlan()), options.get(BLOCKS)
    for part in blocks.plans if blocks else (plan,):
        check_reachable(part, sigmas, guider.conds)
    options[RUN] = run = Run(plan, blocks)
    try:
        result = executor(noise, latent, sampler, sigmas, *args, **kwargs)
    finally:
        options.pop(RUN, None)
    check_touched(run, result)
    return result


def predict_noise(executor: Callable, x: Tensor, timestep: Tensor, model_options: dict, *args, **kwargs):
    """Learn the names of this run's conditionings from its guider (uuids are new in every run)."""
    run = (model_options or {}).get("transformer_options", {}).get(RUN)
    if run is not None and not run.uuid_names:
        run.conds = executor.class_obj.conds
        run.uuid_names = names_of_uuids(run.conds)
    return executor(x, timestep, model_options, *args, **kwargs)


def calc_cond_batch(executor: Callable, model: Any, conds: list, x: Tensor, timestep: Tensor, model_options: dict):
    """Learn which conditioning each index of the coming model calls means; guiders order them as they like."""
    run = model_options.get("transformer_options", {}).get(RUN)
    if run is not None:
        run.begin_prediction()
        run.size = tuple(x.shape[2:])
        if run.conds:
            run.index_names = names_of_indices(conds, run.conds)
    return executor(model, conds, x, timestep, model_options)


def apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    """One model call: hooks on the sites that act now, removed whatever happens."""
    options = transformer_options or {}
    run = options.get(RUN) or Run(options.get(PLAN, SteeringPlan()), options.get(BLOCKS))
    base_model = executor.class_obj
    sigmas = options.get("sigmas")
    sigma = run.level(t if sigmas is None else sigmas)
    observers: dict[str, Observer] = options.get(OBSERVERS, {}) if sigma > 0 else {}
    blocks = run.prepared[: options.get(BLOCKS_NOW, len(run.prepared))]
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
    check_masks(blocks, x.shape[0] // len(options.get("cond_or_uncond") or [0]) // len(blocks), is_part)
    steering = [plan.for_call(*where, size) for plan, where in zip(blocks, parts, strict=True)]
    # The map is of the whole image: a call for an area of it is no part of that.
    mapped = parts[0][0]("positive") if shown and not is_part else ()
    mapping = run.shown.for_call(lambda _name: None, None, size) if mapped else None

    def visit(name: str, output: Tensor, owned: bool) -> Tensor:
        check_rows(name, output, x.shape[0])
        if name in active:
            for start, stop in mapped:
                before = output[start:stop]
                run.changes.observe(before, mapping.apply(name, before))
            in_place = owned and is_free(output)
            for call in steering:
                output = call.apply(name, output, in_place)
        for observer, ranges in watching:
            for start, stop in ranges:
                observer.observe(name, sigma, output[start:stop])
        return output

    hooked = {name: (found.sites[name], found.fresh[name]) for name in (found.sites if watching else active)}
    with uncompiled(options), hooks(hooked, rows_first(visit) if found.family.tokens_first else visit):
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
