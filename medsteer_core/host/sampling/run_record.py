"""What a run of a sampler asked the model and was answered, so that another run can be given the same answers.

Calls are told apart by their noise level, and those at one level (a second-order sampler's) by their order there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import MedSteerError


@dataclass(frozen=True, eq=False)
class Answer:
    """One call's answer.

    sigma: the noise level; place: how many calls at this level came before it
    state: what the model was asked about, ``(images, C, ...)``; denoised: what it was answered, the same shape
    cond, uncond: the predictions with and without the prompt before guidance joined them, where they were wanted
    """

    sigma: float
    place: int
    state: Tensor
    denoised: Tensor
    cond: Tensor | None = None
    uncond: Tensor | None = None


class RunRecord:
    """The answers of one run, some latents a call. It is filled by one run and read by any number of others."""

    def __init__(self) -> None:
        self._levels: dict[float, list[Answer]] = {}

    def __len__(self) -> int:
        return sum(len(answers) for answers in self._levels.values())

    def __iter__(self) -> Iterator[Answer]:
        return (answer for answers in self._levels.values() for answer in answers)

    def place(self, sigma: float) -> int:
        """How many calls at this noise level are recorded."""
        return len(self._levels.get(sigma, ()))

    def add(
        self, sigma: float, state: Tensor, denoised: Tensor, cond: Tensor | None = None, uncond: Tensor | None = None
    ) -> Answer:
        """Keep one call's answer, as copies: samplers may write into what they have."""
        copies = [None if value is None else value.detach().clone() for value in (state, denoised, cond, uncond)]
        answer = Answer(sigma, self.place(sigma), *copies)
        self._levels.setdefault(sigma, []).append(answer)
        return answer

    def reader(self) -> RecordReader:
        """A reader that begins at the first call."""
        return RecordReader(self._levels)


class RecordReader:
    """One run's way through a record: what the calls of this run would have been answered."""

    def __init__(self, levels: dict[float, list[Answer]]) -> None:
        self._levels, self._asked = levels, dict.fromkeys(levels, 0)

    def next(self, sigma: float) -> Answer:
        """The answer to the next call at this noise level. Raises MedSteerError where the recorded run had none."""
        place = self._asked.get(sigma, 0)
        answers = self._levels.get(sigma, ())
        if place >= len(answers):
            raise MedSteerError(
                f"This sampler asked the model at noise level {sigma:.6g} in the counterfactual and not in the factual "
                "image: it chooses its steps by what it sees (as dpm_adaptive does), so the two can't share their "
                "beginning or what lies outside the mask. Choose another sampler; or steer from 0 on and without a "
                "lock, where nothing is shared."
            )
        self._asked[sigma] = place + 1
        return answers[place]


def same_state(answer: Answer, state: Tensor) -> bool:
    """Whether a run came to a call in the very state that the recorded one was in."""
    return answer.state.shape == state.shape and bool(torch.equal(answer.state, state))
