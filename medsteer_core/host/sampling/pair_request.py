"""What Counterfactual Sampler is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .runs import Schedule

OPEN, CONCEPT, USER = "none", "concept map", "user"
LOCKS = (OPEN, CONCEPT)


@dataclass(frozen=True, eq=False)
class PairRequest:
    """What Counterfactual Sampler was asked for.

    latent: a LATENT of B images; noise: a NOISE of ComfyUI's, in the place of the seed's
    multiples: one counterfactual for each, times the strengths that Steer set
    mask: (1 or B, H, W), where the image may change, before `lock`; threshold, dilation: for lock `CONCEPT`, the
    share of the map's largest value, and latent pixels
    """

    positive: list
    negative: list
    latent: dict
    seed: int
    cfg: float
    schedule: Schedule
    multiples: Sequence[float] = (1.0,)
    mask: Tensor | None = None
    lock: str = OPEN
    threshold: float = 0.2
    dilation: int = 1
    noise: Any = None
    texts: Mapping[str, str | None] = field(default_factory=dict)  # of positive and negative, where known
