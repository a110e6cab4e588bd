"""Watching one prompt's runs: running means always, and each sample by itself as far as that fits into memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..errors import MedSteerError
from .capture import ActivationSums, token_means
from .sample_store import prefixed, under
from .samples_record import MOST_BYTES, SampleRecord, SampleRecorder

MOST_BYTES_A_PROMPT = MOST_BYTES // 2


class SampleWatch:
    """An observer for all runs of one prompt, `samples` images in all.

    Example: `with watch.run(range(4)): ...` around each run, with `watch.observe` in the hooks; `watch.record()` at the
    end. A run's samples go to the CPU when it is over, so that the device holds those of one run only. What can't be
    recorded raises MedSteerError where `needed`; otherwise the record is given up, `left_out` says why, and the running
    means in `sums` go on. Nothing is recorded that is not `wanted`.
    """

    def __init__(
        self,
        sums: ActivationSums,
        samples: int,
        needed: bool = False,
        wanted: bool = True,
        most_bytes: int = MOST_BYTES_A_PROMPT,
    ) -> None:
        self.sums = sums
        self.left_out = "" if wanted else "not asked for"
        self._samples, self._needed, self._most_bytes = samples, needed, most_bytes
        self._recorder: SampleRecorder | None = None
        self._parts: list[SampleRecord] = []

    @contextmanager
    def run(self, images: Sequence[int]) -> Iterator[None]:
        """One run whose batch holds these images, in the order of its rows."""
        if not self.left_out:
            self._recorder = SampleRecorder()
            self._recorder.begin(images)
        before = self.sums.mark()
        try:
            yield
        except BaseException:  # cancelled, out of memory: what was watched of this run is no sample
            self.sums.back_to(before)
            self._recorder = None
            raise
        if self._recorder is not None:
            self._try(self._keep)
        self._recorder = None

    def observe(self, site: str, sigma: float, activation: Tensor) -> None:
        """Count `activation` (rows, tokens, C) and, in a record that is being kept, its rows' token means."""
        samples = token_means(site, activation)
        self.sums.observe_means(site, sigma, samples)
        if self._recorder is not None:
            self._try(self._recorder.observe_means, site, sigma, samples)

    def record(self) -> SampleRecord | None:
        """All samples in the order of their runs; None where the record was given up."""
        self._try(self._join)
        return self._parts[0] if self._parts else None

    def to_state(self) -> dict[str, Tensor]:
        """What the whole runs so far gave, as tensors by name for a safetensors file."""
        record = self.record()
        recorded = {} if record is None else record.to_state()
        return prefixed("sums", self.sums.to_state()) | prefixed("record", recorded)

    def go_on(self, state: Mapping[str, Tensor]) -> bool:
        """Start from the state of another watch of the same runs. False, and nothing taken, where it lacks the record
        that this one needs."""
        recorded = under("record", state)
        if self._needed and not recorded:
            return False
        self.sums = ActivationSums.from_state(under("sums", state))
        if not self.left_out and recorded:
            self._parts = [SampleRecord.from_state(recorded)]
        elif not self.left_out:
            self.left_out = "an earlier extraction, which this one adds to, kept running means alone"
        return True

    def _keep(self) -> None:
        part = self._recorder.record()
        taken = sum(values.numel() * 4 for values in part.sites.values()) // part.count * self._samples
        if taken > self._most_bytes:
            raise MedSteerError(
                f"The activations of {self._samples} samples take {taken / 1e9:.1f} GB, and at most "
                f"{self._most_bytes / 1e9:g} GB are kept."
                + (" Set fewer samples or steps, or the estimator mean difference." if self._needed else "")
            )
        self._parts.append(part)

    def _join(self) -> None:
        while len(self._parts) > 1:  # two by two: one after the other would copy the first ones over and over
            firsts, seconds = self._parts[0::2], self._parts[1::2]
            joined = [first.then(second) for first, second in zip(firsts, seconds, strict=False)]
            self._parts = joined + firsts[len(seconds) :]

    def _try(self, act: Callable[..., None], *args: Any) -> None:
        try:
            act(*args)
        except MedSteerError as error:
            if self._needed:
                raise
            self.left_out = str(error)
            self._recorder, self._parts = None, []
