"""Sampling the prompts of an extraction: batches, progress, and what is kept of them for another time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import ceil
from typing import Any

import comfy.utils
import latent_preview
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...errors import MedSteerError
from ...extraction.sample_store import Checkpoint, State
from ..canvas.notes import say_on_running_node
from . import runs as sampling
from .contexts import contexts_of
from .extraction_request import SAME_STATE, Request
from .run_facts import Indescribable, model_facts, plain, schedule_facts

FIRST = 2  # images of the first run
FIT = 0.05  # of the bar, for the fit after the samples
SEEDS = (1 << 64) - 1  # stochastic samplers on the CPU add 1, and torch takes nothing from 2**64 on


@dataclass(frozen=True, eq=False)
class Batch:
    """Images of one run: their numbers, the context of their prompts, noise ``(len(images), C, H, W)``, seed."""

    images: Sequence[int]
    context: int
    noise: Tensor
    seed: int
    callback: Callable


class Gathering:
    """The runs of one extraction: ``samples`` images of both prompts together, under one progress bar."""

    def __init__(self, model: ModelPatcher, request: Request, samples: int, tell: Callable[[str], None]):
        self.model, self.request, self._tell = model, request, tell
        self._latent = sampling.empty_latent(model, request.latent)
        self._contexts = _count_contexts(request)
        self._report = _Progress(model, samples * request.schedule.steps)

    def sample(self, images: range, done: Done, run: Callable[[Batch], None]) -> None:
        """``run`` all images that are not ``done``, in batches that fit, and say after each that it is done.

        The context of an image is its place among ``images``, so that every context has as many as the others, or one
        more.
        """
        for context in range(self._contexts):
            own = images[context :: self._contexts]
            for batch in _batches(own, sampling.batch_that_fits(self.model, self._latent, len(own))):
                left = [image for image in batch if image not in done.images]
                if left:
                    noise = sampling.noise_for(self._latent, self.request.seed, left)
                    # Another batch gets another seed for samplers with noise of their own: they would draw the same.
                    seed = (self.request.seed + left[0]) % SEEDS
                    run(Batch(left, context, noise, seed, self._report.for_batch(len(left))))
                    done.add(left)

    @contextmanager
    def kept(
        self,
        name: str,
        prompts: list,
        images: range,
        go_on: Callable[[State], bool],
        state: Callable[[], State],
    ) -> Iterator[Done]:
        """The images that were sampled before, which ``go_on`` took over; at the end, whatever the end, what is there
        now is kept. ``prompts`` are those that decide the samples, ``images`` all that are wanted."""
        checkpoint, done = self._checkpoint(name, prompts, images), Done()
        if checkpoint is not None:
            stored = checkpoint.read(images)
            if stored is not None and go_on(stored.state):
                done.add(stored.images)
                self._report.skip(len(done.images) * self.request.schedule.steps)
                self._tell(f"{name}: {len(done.images)} of {len(images)} samples were there from before")
            done.after = lambda: checkpoint.offer(done.images, state)
        stopped = True
        try:
            yield done
            stopped = False
        finally:
            if checkpoint is not None:
                checkpoint.close(done.images, state)
            if stopped:
                there = f"{len(done.images)} of {len(images)} samples"
                kept = "are kept, and the next run goes on from them" if checkpoint and done.images else "are kept"
                say_on_running_node(f"Stopped ({name}): {there} {kept}.")

    @cached_property
    def _shared_facts(self) -> dict[str, Any]:
        """What is the same for both prompts: read once, since it looks at every weight. Raises Indescribable."""
        return {
            "negative": plain(self.request.negative),
            "contexts": self._contexts,
            "cfg": self.request.cfg,
            **schedule_facts(self.request.schedule),
            "model": model_facts(self.model),
        }

    def _checkpoint(self, name: str, prompts: list, images: range) -> Checkpoint | None:
        request = self.request
        if request.store is None:
            return None
        try:
            facts = {
                "kind": SAME_STATE if len(prompts) > 1 else "one prompt",
                "prompts": plain(prompts),
                "noise": [request.seed, images.start, images.step, list(self._latent.shape)],
                **self._shared_facts,
            }
        except Indescribable as why:
            self._tell(f"{name}: samples are not kept for another time, since {why}")
            return None
        return Checkpoint(request.store, facts, self._tell)


@dataclass
class Done:
    """The numbers of the images that are done; ``after`` is called when some were added."""

    images: list[int] = field(default_factory=list)
    after: Callable[[], None] = lambda: None

    def add(self, images: Sequence[int]) -> None:
        self.images += images
        self.after()


def _batches(images: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """The images in runs of ``size``, a long first one in two parts: a run that is stopped early has kept something."""
    early = {FIRST} if min(size, len(images)) > 2 * FIRST else set()
    cuts = sorted({*range(0, len(images), size), *early, len(images)})
    return (images[start:end] for start, end in pairwise(cuts))


class _Progress:
    """One progress bar with previews for the whole extraction; it is full only when the node is done."""

    def __init__(self, model: ModelPatcher, total: int):
        self._bar = comfy.utils.ProgressBar(total + ceil(total * FIT))
        self._previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def skip(self, steps: int) -> None:
        """Count what need not be done."""
        self._bar.update_absolute(self._bar.current + steps)

    def for_batch(self, size: int) -> Callable:
        def callback(_step: int, x0, _x, _steps: int) -> None:
            preview = None
            if self._previewer is not None:
                shown = x0.tensors[0] if x0.is_nested else x0  # of video and sound, the video
                preview = self._previewer.decode_latent_to_preview_image("JPEG", shown)
            self._bar.update_absolute(self._bar.current + size, preview=preview)  # cancels here when asked to

        return callback


def _count_contexts(request: Request) -> int:
    """How many contexts the prompts come in. Raises MedSteerError where they don't fit together."""
    numbers = {name: len(contexts_of(getattr(request, name))) for name in ("present", "absent")}
    count = max(numbers.values())
    if set(numbers.values()) - {1, count}:
        raise MedSteerError(
            f"'present' comes in {numbers['present']} contexts and 'absent' in {numbers['absent']}; the same number, "
            "or one, was expected. Take both from one Prompt Contexts node."
        )
    if len(contexts_of(request.negative)) > 1:
        raise MedSteerError(
            "'negative' comes in several contexts; one prompt was expected. Encode it with CLIP Text Encode."
        )
    least = count if request.noise != SAME_STATE else 2 * count
    if count > 1 and request.samples < least:
        raise MedSteerError(
            f"samples is {request.samples} for {count} contexts; at least {least} were expected, so that every context "
            "counts. Set more samples, or fewer templates."
        )
    return count
