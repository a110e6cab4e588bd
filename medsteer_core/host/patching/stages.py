"""A sampling that is done in stages by several nodes: those whose steps a steering does not reach run without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...steering.plan import Steering, SteeringPlan
from .checks import check_conds, check_reachable


def reachable(
    plan: SteeringPlan, sigmas: Tensor, conds: Mapping[str, Any], noise: Tensor
) -> tuple[SteeringPlan, list[Steering]]:
    """The steerings that a run of these noise levels can reach, and those that another stage of the sampling has.

    A run that stops short of 0 is followed by another, and one without ``noise`` of its own follows another. Raises
    MedSteerError for a steering that no stage can reach, and for rows that the sampler does not have.
    """
    here, elsewhere = [], []
    levels = [float(sigma) for sigma in sigmas[:-1] if float(sigma) > 0]
    for steering in plan.steerings:
        window = steering.window
        missed = bool(levels) and not steering.operator.is_identity and not window.any_of(levels)
        comes = float(sigmas[-1]) > 0 and window.end_sigma < levels[-1] if missed else False
        was = missed and window.start_sigma > levels[0] and not bool(torch.count_nonzero(noise))
        (elsewhere if comes or was else here).append(steering)
    check_reachable(SteeringPlan(tuple(here)), sigmas, conds)
    check_conds(SteeringPlan(tuple(elsewhere)), conds)
    return SteeringPlan(tuple(here)), elsewhere


def unsteered_stage(steering: Steering, sigmas: Tensor) -> str:
    """What a node says whose steps a steering does not reach."""
    levels = f"{float(sigmas[0]):.4g} to {float(sigmas[-1]):.4g}"
    return (
        f"Not steered in this stage: its noise levels ({levels}) lie outside the window of Steer "
        f"({steering.operator.name}, {steering.window.start_sigma:.4g} to {steering.window.end_sigma:.4g}). Another "
        "stage has to reach it."
    )
