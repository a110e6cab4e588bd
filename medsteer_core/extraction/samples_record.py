"""Every sample's token mean: what the estimators need that can't do with running means.

Memory: four bytes for each sample, noise level and channel of every site, so n * S * C floats a site; on the
activations' device while it records. For 28 sites of 1152 channels and 20 levels that is 2.6 MB a sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import MedSteerError
from .capture import SigmaStatistics, level_of, token_means

# What one recorder may hold. Running means (capture.py) have no such limit.
MOST_BYTES = 4 * 10**9
# Two runs of one schedule; a little more than what capture.py takes for one sigma.
SIGMA_RTOL = 1e-4


def bytes_of(widths: Sequence[int], levels: int, samples: int) -> int:
    """What a record of so many samples at so many noise levels takes, for sites of these widths."""
    return 4 * sum(widths) * levels * samples


@dataclass(frozen=True, eq=False)
class SampleRecord:
    """The token means of n samples at S noise levels, by site in execution order. A value: change nothing inside.

    sites: name -> (n, S, C) float32 on the CPU; widths may differ between sites
    sigmas: (S,) float32, descending
    samples: (n,) int64, which sample each row is; two records are paired where these are equal

    Raises MedSteerError that names the shape that came and the shape that was wanted.
    """

    sites: Mapping[str, Tensor]
    sigmas: Tensor
    samples: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", dict(self.sites))
        if not self.sites or not len(self.samples) or not len(self.sigmas):
            raise MedSteerError(
                f"A record of samples has {len(self.sites)} sites, {len(self.sigmas)} noise levels and "
                f"{len(self.samples)} samples; at least one of each was expected. Run the model first."
            )
        if len(self.samples.unique()) != len(self.samples):
            raise MedSteerError(f"A record names a sample twice: {self.samples.tolist()}. Record each sample once.")
        for name, values in self.sites.items():
            wanted = (len(self.samples), len(self.sigmas))
            if values.ndim != 3 or values.shape[:2] != wanted or values.dtype != torch.float32:
                raise MedSteerError(
                    f"Site '{name}' of a record is {values.dtype} of shape {tuple(values.shape)}; torch.float32 of "
                    f"shape ({wanted[0]} samples, {wanted[1]} noise levels, channels) was expected. Record it again."
                )

    @property
    def count(self) -> int:
        """Number of samples, n."""
        return len(self.samples)

    def statistics(self) -> dict[str, SigmaStatistics]:
        """The same as `ActivationSums.statistics` of these samples, computed in float64."""
        return {name: self._statistics(values) for name, values in self.sites.items()}

    def _statistics(self, values: Tensor) -> SigmaStatistics:
        wide = values.double()
        scatter = (wide - wide.mean(dim=0)).square().sum(dim=(0, 2))
        count = torch.full((len(self.sigmas),), self.count)
        variance = scatter / max(1, self.count - 1)
        return SigmaStatistics(self.sigmas, wide.mean(dim=0).float(), variance.float(), count)

    def then(self, other: "SampleRecord") -> "SampleRecord":
        """These samples and `other`'s after them. Raises MedSteerError unless sites, widths and sigmas match."""
        if list(self.sites) != list(other.sites):
            raise MedSteerError(
                f"A record of {len(self.sites)} sites can't go on with samples of {len(other.sites)}: "
                f"{_odd(self.sites, other.sites)}. Go on with the same model, or start anew."
            )
        for name, values in self.sites.items():
            if values.shape[2] != other.sites[name].shape[2]:
                raise MedSteerError(
                    f"Site '{name}' has {values.shape[2]} channels in the record and {other.sites[name].shape[2]} in "
                    "the samples that follow; one width was expected. Go on with the same model, or start anew."
                )
        _check_sigmas(self.sigmas, other.sigmas)
        sites = {name: torch.cat([values, other.sites[name]]) for name, values in self.sites.items()}
        return SampleRecord(sites, self.sigmas, torch.cat([self.samples, other.samples]))

    def to_state(self) -> dict[str, Tensor]:
        """The record as tensors by name, for a safetensors file; `from_state` reads it back."""
        # Numbered: a file keeps no order of its tensors, and the sites have one.
        sites = {f"sites/{index:04d}/{name}": values for index, (name, values) in enumerate(self.sites.items())}
        return {"sigmas": self.sigmas, "samples": self.samples, **sites}

    @staticmethod
    def from_state(state: Mapping[str, Tensor]) -> "SampleRecord":
        """The record that `to_state` gave. Raises MedSteerError for tensors that are none."""
        names = sorted(name for name in state if name.startswith("sites/"))
        if not {"sigmas", "samples"} <= set(state) or len(state) != len(names) + 2:
            raise MedSteerError(
                f"These {len(state)} tensors are no record of samples: sigmas, samples and sites/<number>/<name> were "
                "expected. Delete the stored samples and extract again."
            )
        sites = {name.split("/", 2)[2]: state[name] for name in names}
        return SampleRecord(sites, state["sigmas"], state["samples"])


@dataclass
class _Batch:
    """One run's token means: summed over the visits of a (site, level), with the number of visits."""

    images: list[int]
    sums: dict[tuple[str, float], Tensor] = field(default_factory=dict)  # (b, C) on the activations' device
    visits: dict[tuple[str, float], int] = field(default_factory=dict)
    levels: dict[str, set[float]] = field(default_factory=dict)  # by site


class SampleRecorder:
    """Keeps each sample's token mean, by site and sigma; it observes as `ActivationSums` does.

    Call `begin` with the batch's samples before each run, `observe` in the hooks, `record()` once a run is complete. A
    sampler may visit a noise level several times (Heun's): those of one sample are averaged, so that every sample
    counts once. Nothing waits for the device before `record()`.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._batches: list[_Batch] = []
        self._bytes = 0

    @property
    def stored_elements(self) -> int:
        """How many numbers are held on devices."""
        return self._bytes // 4

    def begin(self, samples: Sequence[int]) -> None:
        """A new run whose batch holds these samples, in the order of its rows."""
        self._batches.append(_Batch(list(samples)))

    def observe(self, site: str, sigma: float, activation: Tensor) -> None:
        """Keep the token mean of each row of `activation` (rows, tokens, C), one row for each of the run's samples.

        Several conditionings in one call come one after the other, each with all the samples; they are averaged.
        """
        if not self._batches:
            raise RuntimeError("begin() comes before observe()")
        self.observe_means(site, sigma, token_means(site, activation))

    def observe_means(self, site: str, sigma: float, samples: Tensor) -> None:
        """`observe` for an activation whose `token_means` are known: `samples` (rows, C)."""
        batch = self._batches[-1]
        if samples.shape[0] == 0:
            return
        if samples.shape[0] % len(batch.images):
            raise MedSteerError(
                f"The model gave {samples.shape[0]} rows for a batch of {len(batch.images)} images; one each was "
                "expected. Remove patches that change the batch."
            )
        means = samples.unflatten(0, (-1, len(batch.images)))
        key = site, level_of(batch.levels.setdefault(site, set()), float(sigma))
        batch.levels[site].add(key[1])
        if key not in batch.sums:
            self._bytes += 4 * means[0].numel()
            self._check_memory()
            batch.sums[key], batch.visits[key] = means.sum(dim=0), means.shape[0]
            return
        if batch.sums[key].shape != means[0].shape:
            raise MedSteerError(
                f"Site '{site}' gave {means.shape[-1]} channels after {batch.sums[key].shape[-1]}; one width was "
                "expected. Observe one model at a time."
            )
        # Out of place: a tensor made in inference mode may not be changed outside it.
        batch.sums[key] = batch.sums[key] + means.sum(dim=0).to(batch.sums[key].device)
        batch.visits[key] += means.shape[0]

    def _check_memory(self) -> None:
        if self._bytes > self._most_bytes:
            raise MedSteerError(
                f"The samples' activations take more than {self._most_bytes / 1e9:g} GB. Ask for fewer samples or "
                "steps, or use the estimator mean_difference, whose memory does not grow with the samples."
            )

    def record(self) -> SampleRecord:
        """All samples so far, in the order of their runs; one transfer for each device.

        Raises MedSteerError when nothing was observed, when a run missed a site or a noise level of the first run (or
        is still going on), and when an activation was not finite.
        """
        batches = [batch for batch in self._batches if batch.sums]
        if not batches:
            raise MedSteerError("No activation was observed: the model ran no cross-attention site. Check the model.")
        host = _to_host(batches)
        records = [_record(batch, values) for batch, values in zip(batches, host, strict=True)]
        for record in records[1:]:
            _check_sigmas(records[0].sigmas, record.sigmas)
            if list(record.sites) != list(records[0].sites):
                raise MedSteerError(
                    f"Two runs went through different sites ({_odd(records[0].sites, record.sites)}); the same were "
                    "expected. Observe one model at a time."
                )
        sites = {name: torch.cat([record.sites[name] for record in records]) for name in records[0].sites}
        return SampleRecord(sites, records[0].sigmas, torch.cat([record.samples for record in records]))


def _record(batch: _Batch, values: Mapping[tuple[str, float], Tensor]) -> SampleRecord:
    """One run's record; `values` are its sums on the CPU."""
    levels: dict[str, list[float]] = {}
    for site, level in values:
        levels.setdefault(site, []).append(level)
    sigmas = torch.tensor(sorted(next(iter(levels.values())), reverse=True), dtype=torch.float32)
    sites = {}
    for site, known in levels.items():
        ordered = sorted(known, reverse=True)
        _check_sigmas(sigmas, torch.tensor(ordered, dtype=torch.float32))
        sites[site] = torch.stack([values[site, level] / batch.visits[site, level] for level in ordered], dim=1)
        _check_finite(site, sites[site], ordered)
    return SampleRecord(sites, sigmas, torch.tensor(batch.images))


def _to_host(batches: Sequence[_Batch]) -> list[dict[tuple[str, float], Tensor]]:
    """Every batch's sums on the CPU: joined on each device, so that it is waited for once."""
    places = [(index, key) for index, batch in enumerate(batches) for key in batch.sums]
    result: list[dict[tuple[str, float], Tensor]] = [dict(batch.sums) for batch in batches]  # keeps the order
    for device in {batches[index].sums[key].device for index, key in places}:
        here = [place for place in places if batches[place[0]].sums[place[1]].device == device]
        tensors = [batches[index].sums[key] for index, key in here]
        joined = torch.cat([tensor.reshape(-1) for tensor in tensors]).cpu()
        parts = joined.split([tensor.numel() for tensor in tensors])
        for (index, key), part, tensor in zip(here, parts, tensors, strict=True):
            result[index][key] = part.view(tensor.shape)
    return result


def _check_sigmas(sigmas: Tensor, other: Tensor) -> None:
    if sigmas.shape != other.shape or not torch.allclose(sigmas, other, rtol=SIGMA_RTOL, atol=0):
        raise MedSteerError(
            f"Samples were recorded at {_levels(sigmas)} and at {_levels(other)}; every sample and site needs the same "
            "noise levels. Use a sampler with fixed steps, and record only whole runs."
        )


def _levels(sigmas: Tensor) -> str:
    return f"{len(sigmas)} noise levels from {sigmas[0]:.4g} to {sigmas[-1]:.4g}"


def _odd(sites: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> str:
    """The sites that are not in both, a few of them."""
    return ", ".join(sorted(set(sites) ^ set(others))[:3]) or "their order differs"


def _check_finite(site: str, values: Tensor, levels: Sequence[float]) -> None:
    for step, level in enumerate(levels):
        if not torch.isfinite(values[:, step]).all():
            raise MedSteerError(
                f"Site '{site}' gave NaN or infinite activations at sigma {level:.4g}; finite ones were expected. "
                "Load the model in bfloat16 or float32 instead of float16."
            )
