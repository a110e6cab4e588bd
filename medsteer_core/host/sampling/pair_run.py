"""The runs behind one pair: the factual, recorded; what it tells of the lock; counterfactuals that share its record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.sample
import comfy.samplers
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from torch import Tensor

from ...errors import MedSteerError
from ...steering.plan import SteeringPlan
from ...steering.token_map import TokenChange, prediction_map
from ...vectors.schedule import SigmaWindow
from ..patching.hooks import is_compiled
from ..patching.levels import window
from ..patching.patch import showing, with_plan
from ..patching.sites import token_model
from ..patching.tokens import KeptTokens, TokenModel, token_index
from .contexts import same_prompt
from .pair_request import ALL, OPEN, PairRequest
from .paired_guiders import COUNTERFACTUAL, AtStates, ConditionGuider, RecordingGuider, ReplayingGuider
from .run_record import Answer, RunRecord

HALO = 0  # tokens that are computed around those of the mask, which `dilation` has grown already
MAP_FROM = 0.25  # of the window's calls, the share before the compared ones: there differences lie all over the image


class PairRun:
    """One node run: its latents and noise as the model wants them, and the runs that are made of them.

    ``cost``: what was computed so far, in runs of the factual images alone.
    """

    map_calls = 3  # of the window's calls, those at which two prompts' predictions are compared

    def __init__(self, model: ModelPatcher, plan: SteeringPlan, request: PairRequest, counterfactuals: int):
        latent = request.latent
        self.model, self.plan, self.request = model, plan, request
        self.latents = comfy.sample.fix_empty_latent_channels(
            model, latent["samples"], latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
        )
        if self.latents.is_nested:
            raise MedSteerError(
                "These latents hold video and sound together, which Counterfactual Sampler can't pair. Make the two "
                "with two samplers and the same seed."
            )
        self.size = tuple(self.latents.shape[-2:])
        self.is_image = self.latents.ndim == 4
        self.takes_over = self._takes_over()
        source = request.noise or Noise_RandomNoise(request.seed)
        self.noise: Tensor = source.generate_noise({**latent, "samples": self.latents})
        self.seed = source.seed
        self._progress = _Progress(model, self._levels.numel() - 1, 1 + counterfactuals)
        self.record, self.cost = RunRecord(), 0.0
        self._walk: comfy.samplers.Sampler = request.schedule.sampler
        self.tokens = ""  # which were computed, in words
        self.computed: dict[str, int] | None = None  # how many of how many, where not all were
        self._kept: KeptTokens | None = None
        self._token_model: TokenModel | None = None
        why = self._why_all()
        if why is None:
            self._kept = KeptTokens(self._limit(), self._calls(), self._spare())
        elif why:
            self.tokens = f"all tokens computed: {why}"

    @property
    def _levels(self) -> Tensor:
        """The noise levels of each run ``(steps + 1,)``."""
        return self.request.schedule.sigmas

    def _cost_of(self, calls: float) -> float:
        """Calls with guidance as a share of those that one image takes."""
        return calls / max(1, len(self.record))

    def _why_all(self) -> str | None:
        """Why all tokens are computed, "" where nothing else was asked for; None where some will do."""
        request = self.request
        if request.computed_tokens == ALL or (request.mask is None and request.lock == OPEN):
            return ""
        if is_compiled(self.model):
            return "the model is compiled"
        if any(steering.mask is not None for steering in self.plan.steerings):
            return "Steer has a mask"
        self._token_model = token_model(self.model.model.diffusion_model)
        return "this model can't do with some" if self._token_model is None else None

    def _limit(self) -> float:
        """Bytes that may be kept."""
        if self.request.kept_gigabytes > 0:
            return self.request.kept_gigabytes * 1e9
        return comfy.model_management.get_free_memory(self.model.load_device) / 2

    def _spare(self) -> tuple[torch.device, float] | None:
        """Where ComfyUI puts what does not fit onto the device, and how many bytes may go there; None for nowhere."""
        there = comfy.model_management.unet_offload_device()
        if self.request.kept_gigabytes > 0 or there == self.model.load_device:
            return None
        return there, comfy.model_management.get_free_memory(there) / 2

    def _calls(self) -> int:
        levels = [float(sigma) for sigma in self._levels[:-1]]
        return max(1, sum(self._starts_at(self.plan)(level) for level in levels))

    def _starts_at(self, plan: SteeringPlan) -> Callable[[float], bool]:
        def starts_at(sigma: float) -> bool:
            steers = any(steering.acts_at(sigma) for steering in plan.steerings)
            return sigma > 0 and (steers or (self.takes_over is not None and sigma in self.takes_over))

        return starts_at

    def _takes_over(self) -> SigmaWindow | None:
        """Where the counterfactual prompt takes the positive's place; None where there is none, or no other."""
        request = self.request
        if request.counterfactual is None:
            return None
        here = window(self.model, request.start_percent, 1.0)
        levels = [float(sigma) for sigma in request.schedule.sigmas[:-1] if float(sigma) > 0]
        if levels and not here.any_of(levels):
            raise MedSteerError(
                f"No step of this schedule comes after counterfactual_start ({request.start_percent:g}), so the "
                "counterfactual prompt would never be used. Lower counterfactual_start, or use more steps."
            )
        return None if same_prompt(request.positive, request.counterfactual) else here

    def factual(self, keep_parts: bool) -> tuple[Tensor, TokenChange]:
        """The factual latents, as a sampler without steering gives them, and what the steering would change in them.

        The run's calls are in `record` afterwards; ``keep_parts`` adds each call's predictions before guidance.
        """
        changes = TokenChange()
        plain = with_plan(self.model, SteeringPlan())
        observes = bool(self.plan.steerings) and self.is_image
        apart = observes and is_compiled(self.model)  # a compiled model does not run as it would when it is watched
        watched = showing(self.model, changes) if observes else plain
        begins = self._starts_at(self.plan)
        latents = self._sample(
            RecordingGuider(plain if apart else watched, self.record, keep_parts, self._kept, begins)
        )
        self.cost += self._cost_of(len(self.record))
        if self._kept is not None and self._kept.left_out:
            self.tokens = f"all tokens computed: {self._kept.left_out}"
        if apart:
            self._sample(RecordingGuider(watched, RunRecord()))
            self.cost += self._cost_of(len(self.record))
        return latents, changes

    def prediction_difference(self) -> Tensor:
        """(B, H, W): how far the two prompts' predictions lie apart on the way of the factual, 1 at the largest."""
        if self.takes_over is None:
            return torch.zeros(len(self.latents), *self.size)
        answers = [answer for answer in self.record if answer.sigma in self.takes_over]
        answers = _some(answers[int(len(answers) * MAP_FROM) :], self.map_calls)
        guider = ConditionGuider(with_plan(self.model, SteeringPlan()))
        probe = AtStates(answers)
        self._sample(guider, probe, positive=self.request.counterfactual)
        chunks = 1 if self.request.cfg == 1 else 2
        self.cost += self._cost_of(len(answers) / chunks)
        return prediction_map([(answer.cond, other) for answer, other in zip(answers, probe.predictions, strict=True)])

    def counterfactual(self, plan: SteeringPlan, allowed: Tensor | None) -> Tensor:
        """The latents of one counterfactual, steered by ``plan``; ``allowed``: see `ReplayingGuider`."""
        some = ()
        if self._kept is not None and not self._kept.left_out and allowed is not None:
            index, tokens = token_index(allowed, self._token_model.patch, HALO)
            self.tokens = f"{index.shape[1] / tokens:.0%} of the tokens computed"
            self.computed = {"tokens": index.shape[1], "of": tokens}
            some = self._kept, index, tokens
        guider = ReplayingGuider(
            with_plan(self.model, plan), self.record, self._starts_at(plan), allowed, self.takes_over, *some
        )
        latents = self._sample(guider, other=self.request.counterfactual if self.takes_over is not None else None)
        self.cost += self._cost_of(guider.computed)
        return latents

    def _sample(self, guider, sampler=None, positive: list | None = None, other: list | None = None) -> Tensor:
        """One run of ``guider`` from this pair's noise, with ComfyUI's own random numbers the same every time."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        request = self.request
        conds = {"positive": positive or request.positive, "negative": request.negative}
        guider.inner_set_conds(conds if other is None else {**conds, COUNTERFACTUAL: other})
        guider.set_cfg(request.cfg)
        with _same_draws(self.model.load_device):
            result = guider.sample(
                self.noise, self.latents, sampler or self._walk, self._levels,
                denoise_mask=request.latent.get("noise_mask"), callback=None if sampler else self._progress.of_run(),
                disable_pbar=True, seed=self.seed,
            )  # fmt: skip
        management = comfy.model_management
        return result.to(device=management.intermediate_device(), dtype=management.intermediate_dtype())

    def enlarged(self, maps: Tensor) -> Tensor:
        """(B, H, W) in latent pixels as MASKs in image pixels."""
        ratio = self.model.get_model_object("latent_format").spacial_downscale_ratio
        return maps.repeat_interleave(ratio, 1).repeat_interleave(ratio, 2)


@contextmanager
def _same_draws(device: torch.device) -> Iterator[None]:
    """Leave torch's random state as it was: some samplers draw from it, and every run must draw the same."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def _some(answers: list[Answer], count: int) -> list[Answer]:
    """At most ``count`` of the answers, evenly from the first to the last but for the very last."""
    if len(answers) <= count:
        return answers
    return [answers[round(place * (len(answers) - 1) / count)] for place in range(count)]


class _Progress:
    """One progress bar with previews for all runs of a pair."""

    def __init__(self, model: ModelPatcher, steps: int, runs: int):
        self._steps, self._all, self._done = steps, steps * runs, -steps
        self._show = latent_preview.prepare_callback(model, self._all)

    def of_run(self) -> Callable:
        """The callback of the next run."""
        self._done = min(self._done + self._steps, self._all - self._steps)
        done = self._done
        return lambda step, x0, x, _steps: self._show(done + step, x0, x, self._all)
