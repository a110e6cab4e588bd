"""Whether latents show what they should, by a judge who looks at the decoded images."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...judges.judge import Judge
from ...scores.scorer import score_pairs
from .calibration import Flips


def flips_by(vae: Any, judge: Judge, source: str, target: str) -> Flips:
    """Asks ``judge`` whether a pair went from class ``source`` to ``target`` (see `scores.scorer`)."""
    decoded: dict[int, tuple[Tensor, Tensor]] = {}  # the last factual, which is asked about several times

    def images(latents: Tensor) -> Tensor:
        return vae.decode(latents)[..., :3].movedim(-1, 1).float().clamp(0, 1)

    def flips(factual: Tensor, counterfactual: Tensor) -> bool | None:
        if id(factual) not in decoded:
            decoded.clear()
            decoded[id(factual)] = factual, images(factual)
        score = score_pairs(decoded[id(factual)][1], images(counterfactual), source, target, judge)[0]
        return bool(score.flipped) if score.accepted else None

    return flips
