"""Anatomy that goes with the class, as in clinical data, where organ, view, light and colour betray the diagnosis.

Seven factors lean up or down in each class, by a pattern in which any two classes differ in four factors. Every anatomy
stays possible in every class, and the renderer knows nothing of it: truth stays factorised.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Factor and place in its value; the rows of `_signs` say which way each class leans.
FACTORS: tuple[tuple[str, int], ...] = (
    ("lumen_centre", 0),
    ("lumen_centre", 1),
    ("lumen_radius", 0),
    ("hue", 0),
    ("saturation", 0),
    ("gain", 0),
    ("light", 0),
)
CLASSES = 8


def _signs() -> Tensor:
    """``(8, 7)`` of -1 and 1: an 8x8 Hadamard matrix without its constant column."""
    matrix = torch.ones(1, 1)
    for _ in range(3):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix[:, 1:]


def exponents(strength: float) -> Tensor:
    """``(8, 7)`` powers to which a uniform number is raised; 1 everywhere at strength 0."""
    return torch.exp(-strength * _signs())


def lean(draws: dict[str, Tensor], labels: Tensor, strength: float) -> dict[str, Tensor]:
    """Uniform draws by factor, each ``(n, values)``, with those of `FACTORS` leaning as the ``labels (n,)`` say."""
    powers = exponents(strength)[labels]
    leaning = {name: value.clone() for name, value in draws.items()}
    for column, (name, place) in enumerate(FACTORS):
        leaning[name][:, place] = draws[name][:, place] ** powers[:, column]
    return leaning


def class_log_likelihoods(draws: dict[str, Tensor], strength: float) -> Tensor:
    """``(n, 8)``: how likely each class's anatomies are to give these (leaning) draws; exact, so no probe does better.

    If u is uniform, u^a has the density (1/a) v^(1/a - 1).
    """
    values = torch.stack([draws[name][:, place] for name, place in FACTORS], 1).double().clamp_min(1e-12)
    inverse = 1 / exponents(strength).double()
    return (inverse.log()[None] + (inverse[None] - 1) * values.log()[:, None]).sum(2)


def auroc_by_class(draws: dict[str, Tensor], labels: Tensor, strength: float) -> Tensor:
    """``(8,)``: how well the anatomy alone tells each class from the rest (area under the ROC curve)."""
    from torchmetrics.functional.classification import multiclass_auroc

    scores = class_log_likelihoods(draws, strength).softmax(1)
    return multiclass_auroc(scores, labels, num_classes=CLASSES, average=None)
