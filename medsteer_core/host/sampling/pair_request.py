"""What Counterfactual Sampler is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...steering.presets import CUSTOM
from ...steering.recipes import AUTOMATIC, CONCEPT, OPEN, PREDICTION
from .runs import Schedule

USER = "user"  # where a mask comes from that was connected
LOCKS = (OPEN, CONCEPT, PREDICTION, AUTOMATIC)
ALL, IN_MASK = "all", "in the mask"
COMPUTED = (IN_MASK, ALL)


@dataclass(frozen=True)
class RealFactual:
    """A factual that is a real image: a hash of it, the group that it belongs to ("": none was named), and the height
    and width at which the model sees it, where these are not its own."""

    image: str
    group: str = ""
    seen_at: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class PairRequest:
    """What Counterfactual Sampler was asked for.

    latent: a LATENT of B images; noise: a NOISE of ComfyUI's, in the place of the seed's
    multiples: one counterfactual for each, times the strengths that Steer set
    mask: (1 or B, H, W), where the image may change, before `lock`; threshold, dilation: for the locks by a map, the
    share of the map's largest value, and latent pixels; smoothing: how often the map is smoothed before
    lock: one of `LOCKS`; automatic is the concept map of a steered model, else the difference of the predictions
    recipe: by whose name the values were set, if by any (see steering/recipes.py)
    computed_tokens: `ALL`, or `IN_MASK`: those of the mask alone where the model allows it; kept_gigabytes: what the
    factual run may keep for that, 0 for half of what is free
    counterfactual: a CONDITIONING that takes the positive's place from ``start_percent`` of the denoising on
    real: what the factuals are where the latents are those of real images, one for each; none where they are drawn
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
    texts: Mapping[str, str | None] = field(default_factory=dict)  # of the prompts, where known
    counterfactual: list | None = None
    start_percent: float = 0.45
    smoothing: int = 0
    computed_tokens: str = ALL
    kept_gigabytes: float = 0.0
    recipe: str = CUSTOM
    real: Sequence[RealFactual] = ()
    steer_nodes: int = 0  # in the graph before the model, where that is known
    asked_size: tuple[int, int] | None = None  # height and width in pixels that the graph asks for, where known
