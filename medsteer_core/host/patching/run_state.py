"""What travels in a model's `transformer_options`, and what one sampling run remembers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ...steering.plan import SteeringPlan
from ...steering.prepared import PreparedPlan
from .rows import INDEX_NAMES
from .sites import Found, find, token_model
from .tokens import TokenModel

# The names under which they stand there.
PLAN, OBSERVERS, SHOWN, RUN = "medsteer_plan", "medsteer_observers", "medsteer_shown", "medsteer_run"
TOKENS = "medsteer_tokens"  # of one prediction: a `Keeping` or a `Sparse`


class Observer(Protocol):
    """What a capture gives: called with the rows of one conditioning only, those that `observed` names."""

    def observe(self, site: str, sigma: float, activation: Tensor) -> None: ...


class ChangeObserver(Protocol):
    """What is shown a site's activation (images, tokens, C) and what a plan would make of it."""

    def observe(self, before: Tensor, after: Tensor) -> None: ...


@dataclass(frozen=True, eq=False)
class Shown:
    """A plan that does not act: ``changes`` is shown what it would change in the positive rows."""

    plan: SteeringPlan
    changes: ChangeObserver


class Run:
    """The state of one sampling run: its prepared plan, and one that is only shown, if any."""

    def __init__(self, plan: SteeringPlan, shown: Shown | None = None):
        self.prepared = PreparedPlan(plan)
        self.shown = PreparedPlan(shown.plan) if shown else None
        self.changes = shown.changes if shown else None
        self.conds: dict[str, Any] = {}
        self.uuid_names: dict[Any, str] = {}
        self.index_names: tuple[str, ...] = INDEX_NAMES
        self.size: tuple[int, ...] | None = None  # of the latent whose areas the model calls see
        self.images: int | None = None  # that this prediction is of; None outside of ComfyUI's own predictions
        self.evaluated: list = []  # this prediction's conditionings, in the order of `index_names`
        self.is_rewritten = False  # whether a node stands between this prediction and the model
        self._found: dict[int, Found] = {}
        self._tokens: dict[int, TokenModel | None] = {}
        self._level: tuple[Tensor, float] | None = None

    def begin_prediction(self) -> None:
        """Model calls of another prediction begin: what was known of the last ones' noise level is forgotten."""
        self._level = None

    def level(self, sigmas: Tensor) -> float:
        """The noise level of a model call. The calls of one prediction share a tensor, so it is waited for once."""
        level = self._level
        if level is None or level[0] is not sigmas:
            level = self._level = sigmas, float(sigmas.max())
        return level[1]

    def tokens(self, diffusion_model: nn.Module) -> TokenModel | None:
        """How some of the model's tokens can be computed without the others; None where they can't."""
        key = id(diffusion_model)
        if key not in self._tokens:
            self._tokens[key] = token_model(diffusion_model)
        return self._tokens[key]

    def found(self, diffusion_model: nn.Module) -> Found:
        """The model's family and sites, found once a run for each device's model."""
        key = id(diffusion_model)
        if key not in self._found:
            self._found[key] = find(diffusion_model)
        return self._found[key]
