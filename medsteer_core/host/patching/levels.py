"""A model's noise levels: windows and strength curves in percent of its schedule, as sigmas."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_sampling
from comfy.model_patcher import ModelPatcher

from ...errors import MedSteerError
from ...steering.plan import Steering, SteeringPlan
from ...vectors.schedule import CONSTANT, CURVES, SigmaWindow, StrengthCurve, check_percent

CURVE_POINTS = 64


def window(model: ModelPatcher, start_percent: float, end_percent: float) -> SigmaWindow:
    """The noise levels between two fractions of the model's schedule (0 = pure noise, 1 = the finished image)."""
    check_percent(start_percent, end_percent)
    sampling = model.get_model_object("model_sampling")
    return SigmaWindow(sampling.percent_to_sigma(start_percent), sampling.percent_to_sigma(end_percent))


def curve(model: ModelPatcher, name: str, start_percent: float, end_percent: float) -> StrengthCurve | None:
    """The strength curve ``name`` over a window of the model's schedule; None for the constant one.

    Raises MedSteerError for a name that there is not.
    """
    if name not in CURVES:
        raise MedSteerError(f"There is no strength curve '{name}'; choose one of {', '.join(CURVES)}.")
    if name == CONSTANT:
        return None
    check_percent(start_percent, end_percent)
    sampling = model.get_model_object("model_sampling")
    most, least = float(sampling.sigma_max), float(sampling.sigma_min)
    points: dict[float, float] = {}
    for index in range(CURVE_POINTS + 1):
        share = index / CURVE_POINTS
        sigma = float(sampling.percent_to_sigma(start_percent + share * (end_percent - start_percent)))
        points.setdefault(min(max(sigma, least), most), CURVES[name](share))
    sigmas = sorted(points, reverse=True)
    return StrengthCurve(tuple(sigmas), tuple(points[sigma] for sigma in sigmas), is_flow(model))


def on_schedule(plan: SteeringPlan, model: ModelPatcher) -> SteeringPlan:
    """The plan with its windows and curves on the schedule that the model has now, whatever nodes have changed it."""

    def placed(steering: Steering) -> Steering:
        if steering.span is None:
            return steering
        start, end, name = steering.span
        return replace(steering, window=window(model, start, end), curve=curve(model, name, start, end))

    return SteeringPlan(tuple(placed(steering) for steering in plan.steerings))


def is_flow(model: ModelPatcher) -> bool:
    """Whether the model's noise levels are flow times, which interpolate linearly."""
    return isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)
