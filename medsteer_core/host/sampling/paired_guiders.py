"""Guidance that records a run, and guidance that answers another run from the record where nothing may differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...errors import MedSteerError
from ...vectors.schedule import SigmaWindow
from ..patching.patch import for_tokens
from ..patching.tokens import Keeping, KeptTokens, Sparse
from .run_record import Answer, RunRecord, same_state

POST_CFG = "sampler_post_cfg_function"
COUNTERFACTUAL = "counterfactual"  # the conditioning that takes the positive's place


class RecordingGuider(comfy.samplers.CFGGuider):
    """Classifier-free guidance that keeps every answer. The run itself is ComfyUI's own, bit by bit.

    Answers are taken where the sampler gets them, behind whatever skips or changes calls on the way (LazyCache).
    """

    def __init__(
        self,
        model: ModelPatcher,
        record: RunRecord,
        keep_parts: bool = False,
        kept: KeptTokens | None = None,
        starts_at: Callable[[float], bool] = lambda sigma: False,
    ):
        """``keep_parts``: the predictions with and without the prompt are kept as well, also where no sampler wants
        them. From the first level for which ``starts_at`` on, calls leave their tokens in ``kept``."""
        super().__init__(model)
        self.record, self.keep_parts = record, keep_parts
        self.kept, self.starts_at = kept, starts_at
        self._begun = False

    def outer_predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed=None) -> Tensor:
        """The denoised prediction for ``x (images, C, ...)``."""
        options, parts, sigma = model_options or {}, {}, float(timestep.max())
        self._begun = self._begun or self.starts_at(sigma)
        if self.kept is not None and not self.kept.left_out and self._begun:
            options = for_tokens(options, Keeping(self.kept, (sigma, self.record.place(sigma))))
        if self.keep_parts or _of_sampler(self, options):
            options = {**options, POST_CFG: [*options.get(POST_CFG, []), _remembering(parts)]}
        denoised = super().outer_predict_noise(x, timestep, options, seed)
        self.record.add(sigma, x, denoised, parts.get("cond_denoised"), parts.get("uncond_denoised"))
        return denoised


class ReplayingGuider(comfy.samplers.CFGGuider):
    """Classifier-free guidance that is answered from a record until the counterfactual begins, and outside ``allowed``.

    starts_at: whether the counterfactual begins at a noise level; once begun it goes on
    allowed: ``(images, H, W)`` bool, where the image may change (None: anywhere)
    takes_over: the noise levels at which the conditioning `COUNTERFACTUAL` is the positive one (None: nowhere)
    kept, index, tokens: what the recorded run's calls left, and the tokens ``(images, some)`` of all that are computed
    """

    def __init__(
        self,
        model: ModelPatcher,
        record: RunRecord,
        starts_at: Callable[[float], bool],
        allowed: Tensor | None = None,
        takes_over: SigmaWindow | None = None,
        kept: KeptTokens | None = None,
        index: Tensor | None = None,
        tokens: int = 0,
    ):
        super().__init__(model)
        self._kept, self._index, self._tokens = kept, index, tokens
        self.starts_at, self.takes_over = starts_at, takes_over
        self.allowed = None if allowed is None else allowed[:, None]
        self._reader, self._begun, self._other = record.reader(), False, None
        self.computed = 0.0  # calls that the record did not answer, each as the share of its tokens

    def outer_predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed=None) -> Tensor:
        """The denoised prediction for ``x (images, C, ...)``."""
        options, sigma = model_options or {}, float(timestep.max())
        if COUNTERFACTUAL in self.conds:
            self.conds = dict(self.conds)
            self._other = self.conds.pop(COUNTERFACTUAL)
        answer = None if self._begun and self.allowed is None else self._reader.next(sigma)
        if not self._begun and self.starts_at(sigma):
            _check_same(answer, x)
            self._begun = True
        if not self._begun:
            return self._told(answer, x, timestep, options)
        if self.allowed is None:
            self.computed += 1
            return self._computed(x, timestep, options, seed, sigma)
        return self._told(self._locked(answer, x, timestep, options, seed, sigma), x, timestep, options)

    def _computed(self, x: Tensor, timestep: Tensor, options: Mapping[str, Any], seed: Any, sigma: float) -> Tensor:
        if self._other is not None and self.takes_over is not None and sigma in self.takes_over:
            self.conds, self._other = {**self.conds, "positive": self._other}, None
        return super().outer_predict_noise(x, timestep, options, seed)

    def _locked(
        self, answer: Answer, x: Tensor, timestep: Tensor, options: Mapping[str, Any], seed: Any, sigma: float
    ) -> Answer:
        """What is computed where the image may change, and the record's elsewhere: what the sampler itself wants of it,
        the two predictions that guidance joined, as well."""
        parts: dict[str, Tensor | None] = {}
        if own := _of_sampler(self, options):
            given = options[POST_CFG][: -len(own)]
            options = {**options, POST_CFG: [*given, _remembering(parts)]}
        request = None
        if self._kept is not None and self._index is not None and (sigma, answer.place) in self._kept:
            request = Sparse(self._kept, (sigma, answer.place), self._index, self._tokens)
            options = for_tokens(options, request)
        denoised = self._computed(x, timestep, options, seed, sigma)
        self.computed += 1.0 if request is None else request.share
        inside = self.allowed.to(denoised.device)

        def joined(computed: Tensor | None, recorded: Tensor | None) -> Tensor | None:
            return None if computed is None or recorded is None else torch.where(inside, computed, recorded)

        return Answer(
            sigma, answer.place, x, torch.where(inside, denoised, answer.denoised),
            joined(parts.get("cond_denoised"), answer.cond), joined(parts.get("uncond_denoised"), answer.uncond),
        )  # fmt: skip

    def _told(self, answer: Answer, x: Tensor, timestep: Tensor, options: Mapping[str, Any]) -> Tensor:
        """An answer, after the sampler has heard of it as it hears of a computed one."""
        denoised = answer.denoised.clone()
        for hear in _of_sampler(self, options):
            positive, negative = self.conds.get("positive"), self.conds.get("negative")
            denoised = hear({
                "denoised": denoised, "cond": positive, "uncond": negative, "cond_scale": self.cfg,
                "model": self.inner_model, "cond_denoised": answer.cond, "uncond_denoised": answer.uncond,
                "sigma": timestep, "model_options": options, "input": x,
            })  # fmt: skip
        return denoised


def _of_sampler(guider: comfy.samplers.CFGGuider, options: Mapping[str, Any]) -> list[Callable]:
    """What a sampler has added to the functions that hear of every prediction: those of the cfg_pp kind do."""
    return options.get(POST_CFG, [])[len(guider.model_options.get(POST_CFG, [])) :]


def _remembering(parts: dict[str, Tensor | None]) -> Callable[[dict[str, Any]], Tensor]:
    def remember(heard: dict[str, Any]) -> Tensor:
        parts.update({name: heard[name] for name in ("cond_denoised", "uncond_denoised")})
        return heard["denoised"]

    return remember


def _check_same(answer: Answer, x: Tensor) -> None:
    if not same_state(answer, x):
        raise MedSteerError(
            "The factual and the counterfactual image differ before steering begins: this sampler, or another node on "
            "the model, does not do the same twice. Choose another sampler, or remove the other node."
        )


class ConditionGuider(comfy.samplers.CFGGuider):
    """One conditioning's own prediction, without guidance and what other nodes make of it."""

    def prediction(self, x: Tensor, timestep: Tensor, model_options: dict[str, Any]) -> Tensor:
        """The denoised prediction for ``x (images, C, ...)`` at ``timestep (images,)``."""
        return comfy.samplers.calc_cond_batch(
            self.inner_model, [self.conds["positive"]], x, timestep, model_options
        )[0]  # fmt: skip


class AtStates(comfy.samplers.Sampler):
    """A sampler that asks a `ConditionGuider` about given states and samples nothing: see ``predictions``."""

    def __init__(self, answers: Sequence[Answer]):
        self.answers, self.predictions = answers, []

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
        """As `comfy.samplers.KSAMPLER.sample`; gives the noise back."""
        for answer in self.answers:
            timestep = torch.full((len(answer.state),), answer.sigma, device=answer.state.device, dtype=sigmas.dtype)
            self.predictions.append(model_wrap.prediction(answer.state, timestep, extra_args["model_options"]))
            comfy.model_management.throw_exception_if_processing_interrupted()
        return noise
