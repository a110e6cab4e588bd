"""What an extraction is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...extraction.sample_store import SampleStore
from .runs import Schedule

PAIRED, UNPAIRED, SAME_STATE = "paired", "unpaired", "same state"
MEAN_DIFFERENCE = "mean difference"


@dataclass(frozen=True, eq=False)
class Request:
    """What Extract Pathology Vector was asked for. ``present``, ``absent``, ``negative`` are CONDITIONINGs."""

    present: list
    absent: list
    negative: list
    latent: dict
    samples: int
    seed: int
    cfg: float
    noise: str
    schedule: Schedule
    texts: Mapping[str, str | None] = field(default_factory=dict)  # the prompts' texts, where known
    rank: int = 8  # directions a site and step, with noise "same state"; otherwise there is one
    estimator: str = MEAN_DIFFERENCE  # one of ESTIMATOR_NAMES
    store: SampleStore | None = None  # where samples are kept, so that they need not be sampled again
