"""Streaming statistics of activations: what is kept does not grow with the number of samples."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import MedSteerError

SIGMA_RTOL = 1e-5


@dataclass(frozen=True, eq=False)
class SigmaStatistics:
    """One site's per-sample token means, for S noise levels; float32 on the CPU.

    sigmas: (S,) descending; mean: (S, C) over the samples; variance: (S,) summed over the channels (the trace of the
    covariance), unbiased, 0 where there was one sample; count: (S,) int64, samples seen
    """

    sigmas: Tensor
    mean: Tensor
    variance: Tensor
    count: Tensor


@dataclass
class _Running:
    """Mean (C,) and summed squared distance from it (scalar) of `count` samples, on the activation's device."""

    mean: Tensor
    scatter: Tensor
    count: int


class ActivationSums:
    """Running mean and scatter of each sample's token mean, by site and sigma.

    Example: `sums.observe("blocks.0.cross_attn.proj", 14.6, activation)` in a hook, `sums.statistics()` at the end.
    Nothing waits for the device before `statistics()`.
    """

    def __init__(self) -> None:
        self._running: dict[str, dict[float, _Running]] = {}

    @property
    def stored_elements(self) -> int:
        """How many numbers are held on devices."""
        return sum(r.mean.numel() + r.scatter.numel() for site in self._running.values() for r in site.values())

    def observe(self, site: str, sigma: float, activation: Tensor) -> None:
        """Count each row of `activation` (rows, tokens, C) as one sample of `site` at `sigma`."""
        self.observe_means(site, sigma, token_means(site, activation))

    def observe_means(self, site: str, sigma: float, samples: Tensor) -> None:
        """Count samples whose token means `samples` (rows, C) are, as `token_means` gives them."""
        count = samples.shape[0]
        if count == 0:
            return
        mean = samples[0] if count == 1 else samples.mean(dim=0)
        scatter = None if count == 1 else (samples - mean).square().sum()
        at_site = self._running.setdefault(site, {})
        key = level_of(at_site, float(sigma))
        if key in at_site:
            at_site[key] = _merge(site, at_site[key], mean, scatter, count)
        else:
            at_site[key] = _Running(mean, mean.new_zeros(()) if scatter is None else scatter, count)

    def mark(self) -> dict[str, dict[float, _Running]]:
        """Where the sums stand, for `back_to`. It shares their tensors, which are replaced and never changed."""
        return {site: dict(levels) for site, levels in self._running.items()}

    def back_to(self, mark: Mapping[str, Mapping[float, _Running]]) -> None:
        """Forget what was observed since `mark()`: a run that was stopped half-way is no sample."""
        self._running = {site: dict(levels) for site, levels in mark.items()}

    def to_state(self) -> dict[str, Tensor]:
        """The sums as tensors by name, for a safetensors file; `from_state` reads them back, bit by bit."""
        host = _to_host([running for levels in self._running.values() for running in levels.values()])
        state = {}
        for index, (site, levels) in enumerate(self._running.items()):
            parts = [host[id(running)] for running in levels.values()]
            # Numbered: a file keeps no order of its tensors, and the sites have one.
            state |= {
                f"{index:04d}/{site}/sigmas": torch.tensor(list(levels), dtype=torch.float64),
                f"{index:04d}/{site}/mean": torch.stack([mean for mean, _ in parts]),
                f"{index:04d}/{site}/scatter": torch.stack([scatter for _, scatter in parts]),
                f"{index:04d}/{site}/count": torch.tensor([running.count for running in levels.values()]),
            }
        return state

    @staticmethod
    def from_state(state: Mapping[str, Tensor]) -> "ActivationSums":
        """The sums that `to_state` gave, on the CPU; they go to the device of what is observed next."""
        sums = ActivationSums()
        for name in sorted(name for name in state if name.endswith("/sigmas")):
            key = name.removesuffix("/sigmas")
            rows = zip(state[f"{key}/mean"], state[f"{key}/scatter"], state[f"{key}/count"].tolist(), strict=True)
            levels = zip(state[name].tolist(), rows, strict=True)
            sums._running[key.split("/", 1)[1]] = {sigma: _Running(*row) for sigma, row in levels}
        return sums

    def statistics(self) -> dict[str, SigmaStatistics]:
        """What was observed, by site in the order of first observation; one transfer for each device.

        Raises MedSteerError when nothing was observed, or when an activation was not finite.
        """
        if not self._running:
            raise MedSteerError("No activation was observed: the model ran no cross-attention site. Check the model.")
        host = _to_host([running for site in self._running.values() for running in site.values()])
        result = {}
        for site, at_site in self._running.items():
            _check_finite(site, at_site, host)
            sigmas = sorted(at_site, reverse=True)
            count = torch.tensor([at_site[sigma].count for sigma in sigmas])
            scatter = torch.stack([host[id(at_site[sigma])][1] for sigma in sigmas])
            result[site] = SigmaStatistics(
                torch.tensor(sigmas, dtype=torch.float32),
                torch.stack([host[id(at_site[sigma])][0] for sigma in sigmas]),
                scatter / (count - 1).clamp_min(1),
                count,
            )
        return result


def token_means(site: str, activation: Tensor) -> Tensor:
    """The mean over the tokens of each row of `activation` (rows, tokens, C), float32 (rows, C), without gradient.

    Raises MedSteerError for an activation of another form.
    """
    if activation.ndim != 3:
        raise MedSteerError(
            f"Site '{site}' gave an activation of shape {tuple(activation.shape)}; (rows, tokens, channels) was "
            "expected. Its model family is not supported."
        )
    return activation.detach().mean(dim=1, dtype=torch.float32)


def level_of(known: Collection[float], sigma: float) -> float:
    """The sigma under which this one is kept: samplers compute the same noise level with different rounding."""
    if sigma in known:
        return sigma
    return next((other for other in known if abs(other - sigma) <= SIGMA_RTOL * max(other, sigma)), sigma)


def _merge(site: str, old: _Running, new_mean: Tensor, new_scatter: Tensor | None, new_count: int) -> _Running:
    """Two groups' mean and scatter (None: 0) as one group's (Chan, Golub and LeVeque 1979).

    Unlike sums of squares it does not cancel when the mean is long and the spread small. Out of place: a tensor made
    in inference mode may not be changed outside it.
    """
    if old.mean.shape != new_mean.shape:
        raise MedSteerError(
            f"Site '{site}' gave {new_mean.shape[0]} channels after {old.mean.shape[0]}; one width was expected. "
            "Observe one model at a time."
        )
    count = old.count + new_count
    mean, scatter = old.mean, old.scatter
    if mean.device != new_mean.device:  # only once, after the sums came from a file
        mean, scatter = mean.to(new_mean.device), scatter.to(new_mean.device)
    difference = new_mean - mean
    scatter = torch.add(scatter, difference.dot(difference), alpha=old.count * new_count / count)
    if new_scatter is not None:
        scatter = scatter + new_scatter
    return _Running(torch.add(mean, difference, alpha=new_count / count), scatter, count)


def _to_host(everything: list[_Running]) -> dict[int, tuple[Tensor, Tensor]]:
    """(mean, scatter) on the CPU by the id of their _Running: joined on each device, so that it is waited for once."""
    result = {}
    for device in {running.mean.device for running in everything}:
        here = [running for running in everything if running.mean.device == device]
        joined = torch.cat([part for running in here for part in (running.mean, running.scatter.reshape(1))]).cpu()
        parts = joined.split([size for running in here for size in (running.mean.numel(), 1)])
        for running, mean, scatter in zip(here, parts[0::2], parts[1::2], strict=True):
            result[id(running)] = (mean, scatter[0])
    return result


def _check_finite(site: str, at_site: Mapping[float, _Running], host: Mapping[int, tuple[Tensor, Tensor]]) -> None:
    for sigma, running in at_site.items():
        mean, scatter = host[id(running)]
        if not (torch.isfinite(mean).all() and torch.isfinite(scatter)):
            raise MedSteerError(
                f"Site '{site}' gave NaN or infinite activations at sigma {sigma:.4g}; finite ones were expected. "
                "Load the model in bfloat16 or float32 instead of float16."
            )
