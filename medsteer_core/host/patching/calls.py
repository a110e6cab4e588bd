"""The four stateless wrappers: one run, one prediction, one batch of conditionings, one model call.

PixArt drops `transformer_options` before its blocks, so patches in there never run; an APPLY_MODEL wrapper always runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...steering.plan import SteeringPlan
from ..canvas.notes import say_on_running_node
from .checks import check_known_rows, check_masks, check_rows, check_touched, split_capture
from .finite import ends_finite, is_finite, not_finite
from .hooks import hooks, is_free, rows_first, uncompiled
from .levels import on_schedule
from .rows import chunk_names, names_by_text, names_of_indices, names_of_uuids, ranges_of, row_finder
from .run_state import OBSERVERS, PLAN, RUN, SHOWN, TOKENS, Observer, Run
from .stages import reachable, unsteered_stage
from .tokens import Keeping, keeping, kept_rows, sparse


def outer_sample(executor: Callable, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *args, **kwargs):
    """One run: check the plan against this schedule and guider, give the run its state, check what was done."""
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]  # this run's own copy
    plan, shown = options.get(PLAN, SteeringPlan()), options.get(SHOWN)
    plan, elsewhere = reachable(on_schedule(plan, guider.model_patcher), sigmas, guider.conds, noise)
    for steering in elsewhere:
        say_on_running_node(unsteered_stage(steering, sigmas))
    if shown is not None:
        shown = replace(shown, plan=on_schedule(shown.plan, guider.model_patcher))

    def once(run: Run, *given: Any) -> Tensor:
        options[RUN] = run
        try:
            return executor(noise, latent, sampler, sigmas, *given, **kwargs)
        finally:
            options.pop(RUN, None)

    run = Run(plan, shown)
    result = once(run, *args)
    if plan.sites and not is_finite(result):
        # Whose fault is it? The same run without steering tells, and ends at the first step that is not finite.
        raise not_finite(
            guider.model_patcher, ends_finite(lambda told: once(Run(SteeringPlan()), *_with_callback(args, told)))
        )
    check_touched(run)
    return result


def _with_callback(args: tuple, callback: Callable) -> tuple:
    """A run's further arguments (denoise_mask, callback, ...) with another callback."""
    return (*args[:1], callback, *args[2:]) if args else (None, callback)


def predict_noise(executor: Callable, x: Tensor, timestep: Tensor, model_options: dict, *args, **kwargs):
    """Learn the names of this run's conditionings from its guider: uuids are new in every run, and may change in it."""
    run = (model_options or {}).get("transformer_options", {}).get(RUN)
    if run is not None and run.conds is not executor.class_obj.conds:
        run.conds = executor.class_obj.conds
        run.uuid_names = names_of_uuids(run.conds)
    return executor(x, timestep, model_options, *args, **kwargs)


def calc_cond_batch(executor: Callable, model: Any, conds: list, x: Tensor, timestep: Tensor, model_options: dict):
    """Learn which conditioning each index of the coming model calls means; guiders order them as they like."""
    run = model_options.get("transformer_options", {}).get(RUN)
    if run is not None:
        run.begin_prediction()
        run.size, run.images = tuple(x.shape[2:]), x.shape[0]
        run.is_rewritten = "model_function_wrapper" in model_options
        if run.conds:
            run.index_names = names_of_indices(conds, run.conds)
        run.evaluated = conds
    return executor(model, conds, x, timestep, model_options)


def apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    """One model call: hooks on the sites that act now, and on the blocks where tokens are kept or left out, removed
    whatever happens."""
    options = transformer_options or {}
    run = options.get(RUN) or Run(options.get(PLAN, SteeringPlan()), options.get(SHOWN))
    with _tokens(run, executor.class_obj, x, options) as share:
        arguments = x, t, c_concat, c_crossattn, control, transformer_options
        return _steered_call(executor, run, share, options, arguments, kwargs)


def _texts(conds: list, names: Sequence[str]) -> dict[str, list[Tensor]]:
    """The contexts of a prediction's conditionings, by name."""
    texts: dict[str, list[Tensor]] = {}
    for name, entries in zip(names, conds, strict=False):
        held = (entry.get("model_conds", {}).get("c_crossattn") for entry in entries or ())
        found = [text.cond for text in held if isinstance(getattr(text, "cond", None), Tensor)]
        if name and found:
            texts.setdefault(name, []).extend(found)
    return texts


def _is_whole(run: Run, rows: int, options: dict[str, Any]) -> bool:
    """Whether a call has the rows that ComfyUI gives it: every image once for each of its conditionings."""
    return run.images is None or rows == run.images * len(options.get("cond_or_uncond") or [0])


@contextmanager
def _tokens(run: Run, base_model: Any, x: Tensor, options: dict[str, Any]) -> Iterator[float]:
    """Keep a call's tokens, or compute some of them, if this prediction asks for it; gives the share computed."""
    request = options.get(TOKENS)
    # A call for an area of the image has other tokens than the whole has.
    model = None
    if request is not None and tuple(x.shape[2:]) == run.size and _is_whole(run, len(x), options):
        model = run.tokens(base_model.diffusion_model)
    if model is None:
        yield 1.0
        return
    chunks = chunk_names(options, run.uuid_names, run.index_names)
    if isinstance(request, Keeping):
        with keeping(model, chunks, request):
            yield 1.0
        return
    kept = kept_rows(model, chunks, request)
    if kept is None:
        yield 1.0
        return
    index = request.index.to(x.device).repeat(len(chunks), 1)
    with sparse(model, [part.to(x.device) for part in kept], index):
        yield request.share


def _steered_call(executor, run: Run, share: float, options: dict[str, Any], arguments: tuple, kwargs: dict[str, Any]):
    x, t, *_rest = arguments
    base_model = executor.class_obj
    sigmas = options.get("sigmas")
    sigma = run.level(t if sigmas is None else sigmas)
    observers: dict[str, Observer] = options.get(OBSERVERS, {}) if sigma > 0 else {}
    plans = [plan for plan in (run.prepared, run.shown) if plan is not None] if sigma > 0 else []
    form = base_model.get_dtype_inference(), x.device
    active = {site: None for plan in plans for site in plan.prepare(sigma, *form)}
    if not active and not observers:
        return executor(*arguments, **kwargs)
    whole = _is_whole(run, len(x), options)
    rows = row_finder(x.shape[0], options, run.uuid_names, run.index_names)
    if run.is_rewritten or not whole:
        named = names_by_text(arguments[3], _texts(run.evaluated, run.index_names))
        if named is not None:
            rows = ranges_of(named)
        elif not whole:
            check_known_rows(plans, bool(observers), x.shape[0], run.images)
    watching = [(observer, ranges) for cond, observer in observers.items() if (ranges := rows(cond))]
    if not active and not watching:
        return executor(*arguments, **kwargs)
    found = run.found(base_model.diffusion_model)
    size = tuple(x.shape[2:])
    is_part = not whole or (run.size is not None and size != run.size)
    if watching and not whole:
        raise split_capture(x.shape[0], run.images)
    for plan in plans:
        check_masks(plan, x.shape[0] // len(options.get("cond_or_uncond") or [0]), is_part)
    steering = run.prepared.for_call(rows, None, size, share)
    # The map is of the whole image: a call for an area of it is no part of that.
    mapped = rows("positive") if run.shown is not None and not is_part else ()
    mapping = run.shown.for_call(lambda _name: None, None, size) if mapped else None

    def visit(name: str, output: Tensor, owned: bool) -> Tensor:
        check_rows(name, output, x.shape[0])
        if name in active:
            for start, stop in mapped:
                before = output[start:stop]
                run.changes.observe(before, mapping.apply(name, before))
            output = steering.apply(name, output, owned and is_free(output))
        for observer, ranges in watching:
            for start, stop in ranges:
                observer.observe(name, sigma, output[start:stop])
        return output

    hooked = {name: (found.sites[name], found.fresh[name]) for name in (found.sites if watching else active)}
    with uncompiled(options), hooks(hooked, rows_first(visit) if found.family.tokens_first else visit):
        return executor(*arguments, **kwargs)
