"""What a pair's summary says that its user may not have meant: warnings, none of which stops a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...endophantom.text import about_ignored
from ...steering.plan import SteeringPlan
from ...steering.presets import CUSTOM
from ...steering.recipes import IMAGE_RECIPES, SAMPLER_RECIPES, apart
from .contexts import ignored_words
from .pair_request import PairRequest

MOST_NUMBERS = 8


def doubts_of(plan: SteeringPlan, request: PairRequest) -> list[str]:
    """Warnings before anything is sampled: inputs that are not of the recipe that they are said to be of, another
    recipe at Steer, strengths without a Steer, words that the model does not know, Steer nodes
    whose steering did not get here."""
    mine = request.recipe
    inputs = {
        "lock": request.lock, "lock_threshold": request.threshold, "lock_dilation": request.dilation,
        "lock_smoothing": request.smoothing, "counterfactual_start": request.start_percent, "cfg": request.cfg,
    }  # fmt: skip
    others = {steering.recipe for steering in plan.steerings} - {CUSTOM, mine}
    unknown = about_ignored(ignored_words(request.positive, request.negative, request.counterfactual or []))
    told = [apart(mine, inputs, IMAGE_RECIPES if request.real else SAMPLER_RECIPES), unknown and f"Warning: {unknown}"]
    if mine != CUSTOM and others:
        told.append(f"Warning: recipe says '{mine}' here and '{min(others)}' at Steer. Choose the same in both.")
    if not plan.steerings and any(multiple != 1 for multiple in request.multiples):
        told.append("Warning: strengths are times that of Steer, and no Steer leads to this model: they do nothing.")
    if request.steer_nodes > len(plan.steerings):
        told.append(
            f"Warning: {request.steer_nodes} Steer nodes lead to this model and {len(plan.steerings)} act: a node that "
            "merges two models keeps the first one's steering alone. Merge first, then steer."
        )
    return list(filter(None, told))


def unchanged(factual: Tensor, counterfactual: Tensor, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning where a counterfactual is its factual to the last bit and nobody asked for that."""
    images = len(factual)
    meant = [place for place, record in enumerate(records) if not record["changes_nothing"]]
    same = [place for place in meant if torch.equal(counterfactual[place], factual[place % images])]
    if not same:
        return []
    numbers = ", ".join(str(place + 1) for place in same[:MOST_NUMBERS]) + (", ..." if same[MOST_NUMBERS:] else "")
    return [
        f"Warning: {len(same)} of {len(records)} counterfactuals are the factual image to the last bit (number "
        f"{numbers}), although they were to be changed. The mask may be empty, or another node undoes the steering."
    ]
