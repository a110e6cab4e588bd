"""The runs behind the counterfactual of a real image: as a pair's, with a factual that is there already."""

from __future__ import annotations

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...errors import MedSteerError
from ...steering.plan import SteeringPlan
from ...steering.token_map import TokenChange
from ..patching.patch import with_plan
from .image_path import Beside, Inversion
from .pair_request import PairRequest
from .pair_run import PairRun
from .paired_guiders import ConditionGuider


class ImageRun(PairRun):
    """One node run from the latents of real images ``(B, C, h, w)``: their states at the noise levels from where the
    counterfactual begins down, what the model says of them (the record), and edits that are carried beside them.
    """

    beside, map_calls = Beside, 6

    def __init__(self, model: ModelPatcher, plan: SteeringPlan, request: PairRequest, counterfactuals: int):
        super().__init__(model, plan, request, counterfactuals)
        if not self.is_image:
            raise MedSteerError("Real images are edited by image models; this one makes videos. Load an image model.")

    @property
    def _levels(self) -> Tensor:
        """From the first level at which the counterfactual may begin on: before it nothing is asked."""
        sigmas, starts_at = self.request.schedule.sigmas, self._starts_at(self.plan)
        begin = next((place for place, sigma in enumerate(sigmas[:-1]) if starts_at(float(sigma))), len(sigmas) - 2)
        return sigmas[begin:]

    def _cost_of(self, calls: float) -> float:
        return calls / self.request.schedule.steps

    def factual(self, keep_parts: bool) -> tuple[Tensor, TokenChange]:
        """The images' own latents; the record holds what the model says of their states."""
        states = self._states()
        self._walk = self.beside(states)
        self._unchanged, changes = super().factual(keep_parts)
        self._walk = self.beside(states, [answer.denoised for answer in self.record])
        return self.latents, changes

    def _states(self) -> list[Tensor]:
        """The images' states at each level."""
        way = Inversion()
        self._sample(ConditionGuider(with_plan(self.model, SteeringPlan())), way)
        self.cost += self._cost_of(len(way.states) / (1 if self.request.cfg == 1 else 2))
        return way.states

    def counterfactual(self, plan: SteeringPlan, allowed: Tensor | None) -> Tensor:
        """The latents of one counterfactual; where nothing moved, the images' own to the last bit."""
        latents = super().counterfactual(plan, allowed)
        return torch.where(latents == self._unchanged, self.latents.to(latents), latents)
