"""Token pairs: what two prompts give at the same state, token by token. Bounded memory, whatever the sample count."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..errors import MedSteerError
from .capture import ActivationSums, SigmaStatistics, level_of
from .sample_store import prefixed, under

SIDES = ("present", "absent")
# Token pairs kept of each site and noise level, and what all of them together may take in memory.
MOST_PAIRS = 2048
MOST_BYTES = 2 * 10**9
SLACK = 0.25  # by what share of that they may be more before the surplus is dropped


def pairs_that_fit(widths: Sequence[int], levels: int) -> int:
    """How many pairs of each site (of these widths) and level stay within `MOST_BYTES`: at most `MOST_PAIRS`."""
    one_of_each = 2 * 4 * sum(widths) * levels  # two float32 activations
    return max(1, min(MOST_PAIRS, MOST_BYTES // max(1, one_of_each)))


@dataclass(frozen=True, eq=False)
class TokenPairs:
    """Pairs of one site and noise level, float32 on the CPU: present and absent (n, C), samples (n,) int64.

    Row i of both is the same token of the same state, which belongs to the image samples[i].
    """

    present: Tensor
    absent: Tensor
    samples: Tensor


@dataclass(frozen=True, eq=False)
class _Kept:
    """Pairs (2, n, C) of [present, absent] with their images (n,) and ranks (n,), the lowest rank first."""

    pairs: Tensor
    samples: Tensor
    ranks: Tensor


def _lowest(parts: Sequence[_Kept], most: int) -> _Kept:
    """The pairs of the lowest ranks of all parts, at most so many, as one."""
    ranks = torch.cat([part.ranks for part in parts])
    order = ranks.argsort(stable=True)[:most]
    pairs, samples = torch.cat([part.pairs for part in parts], dim=1), torch.cat([part.samples for part in parts])
    return _Kept(pairs.index_select(1, order), samples[order], ranks[order])


_KEPT = tuple(entry.name for entry in fields(_Kept))


@dataclass(frozen=True, eq=False)
class _Waiting:
    """The tokens of one visit that were chosen, and their activations of the side that came first."""

    side: str
    shape: tuple[int, ...]
    chosen: Tensor
    samples: Tensor
    ranks: Tensor
    activations: Tensor


@dataclass(frozen=True, eq=False)
class _Side:
    """An observer that counts what it is shown as one side's."""

    owner: "PairedActivations"
    name: str

    def observe(self, site: str, sigma: float, activation: Tensor) -> None:
        self.owner._see(self.name, site, sigma, activation)


class PairedActivations:
    """Class means and token pairs of both prompts at the same states, by site and sigma.

    Make each run inside `run`, with the numbers of the images in it, and show `side("present")` and `side("absent")`
    what each prompt gives. The n-th activation of one side at a site and sigma belongs to the n-th of the other,
    whichever comes first, so it does not matter how a run splits its model calls. Of all tokens those with the lowest
    ranks are kept, pseudo-random numbers that depend on the image, the visit and the token alone: every image has the
    same chance, and the size of the batches changes nothing.
    """

    def __init__(self, most: int = MOST_PAIRS) -> None:
        self.most = most
        self._sums = {side: ActivationSums() for side in SIDES}
        # Parts that follow one another; of the first the ranks are in order, and it may be all that there is.
        self._kept: dict[str, dict[float, tuple[_Kept, ...]]] = {}
        self._waiting: dict[tuple[str, float, int], _Waiting] = {}
        self._visits: dict[tuple[str, str, float], int] = {}
        self._images: list[int] = []

    def begin(self, images: Sequence[int]) -> None:
        """A new run whose batch holds these images. Raises MedSteerError when the last run left pairs incomplete."""
        self._check_complete()
        self._visits.clear()
        self._images = list(images)

    @contextmanager
    def run(self, images: Sequence[int]) -> Iterator[None]:
        """One run whose batch holds these images; one that is stopped half-way leaves nothing behind."""
        before = {side: sums.mark() for side, sums in self._sums.items()}
        kept = {site: dict(levels) for site, levels in self._kept.items()}
        self.begin(images)
        try:
            yield
        except BaseException:
            for side, mark in before.items():
                self._sums[side].back_to(mark)
            self._kept = kept
            self._waiting.clear()
            raise
        self._check_complete()

    def to_state(self) -> dict[str, Tensor]:
        """What the whole runs so far gave, as tensors by name for a safetensors file."""
        state = {}
        for side, sums in self._sums.items():
            state |= prefixed(f"sums/{side}", sums.to_state())
        for index, (site, levels) in enumerate(self._kept.items()):
            key = f"kept/{index:04d}/{site}"
            state[f"{key}/sigmas"] = torch.tensor(list(levels), dtype=torch.float64)
            for place, parts in enumerate(levels.values()):
                kept = vars(_lowest(parts, self.most))
                state |= {f"{key}/{place}/{name}": value.contiguous() for name, value in kept.items()}
        return state

    def go_on(self, state: Mapping[str, Tensor]) -> bool:
        """Start from what `to_state` gave, cut to this one's number of pairs. Always possible: True."""
        self._sums = {side: ActivationSums.from_state(under(f"sums/{side}", state)) for side in SIDES}
        kept = under("kept", state)
        for name in sorted(name for name in kept if name.endswith("/sigmas")):
            key = name.removesuffix("/sigmas")
            parts = [[kept[f"{key}/{i}/{part}"] for part in _KEPT] for i in range(len(kept[name]))]
            levels = zip(kept[name].tolist(), parts, strict=True)
            self._kept[key.split("/", 1)[1]] = {sigma: (_lowest([_Kept(*part)], self.most),) for sigma, part in levels}
        return True

    def side(self, name: str) -> _Side:
        """The observer of one side, `present` or `absent`."""
        return _Side(self, name)

    def statistics(self, side: str) -> dict[str, SigmaStatistics]:
        """The side's token means, as `ActivationSums.statistics`."""
        return self._sums[side].statistics()

    def pairs(self) -> dict[str, list[TokenPairs]]:
        """What was kept, by site in the order of first observation, the highest sigma first."""
        self._check_complete()
        result = {}
        for site, levels in self._kept.items():
            kept = [_lowest(levels[sigma], self.most) for sigma in sorted(levels, reverse=True)]
            result[site] = [TokenPairs(one.pairs[0], one.pairs[1], one.samples) for one in kept]
        return result

    @torch.no_grad()
    def _see(self, side: str, site: str, sigma: float, activation: Tensor) -> None:
        self._sums[side].observe(site, sigma, activation)
        at_site = self._kept.setdefault(site, {})
        levels = [*at_site, *(level for name, level, _ in self._waiting if name == site)]
        level = level_of(levels, float(sigma))
        visit = self._visits.get((side, site, level), 0)
        self._visits[side, site, level] = visit + 1
        waiting = self._waiting.pop((site, level, visit), None)
        if waiting is None:
            self._waiting[site, level, visit] = self._choose(side, at_site.get(level, ()), visit, activation)
            return
        if waiting.shape != tuple(activation.shape):
            raise MedSteerError(
                f"Site '{site}': the two prompts gave activations of shape {waiting.shape} and "
                f"{tuple(activation.shape)} at the same state; one shape was expected. Use prompts without areas."
            )
        theirs = _take(activation, waiting.chosen)
        ordered = (waiting.activations, theirs) if waiting.side == SIDES[0] else (theirs, waiting.activations)
        new = _Kept(torch.stack(ordered), waiting.samples, waiting.ranks)
        parts = (*at_site.get(level, ()), new)
        # Joined now and then only: that copies all of them.
        joined = sum(len(part.ranks) for part in parts) > self.most * (1 + SLACK)
        at_site[level] = (_lowest(parts, self.most),) if joined else parts

    def _choose(self, side: str, kept: Sequence[_Kept], visit: int, activation: Tensor) -> _Waiting:
        """The tokens of this activation (rows, tokens, C) that may still be kept: those of the lowest ranks."""
        rows, tokens, _ = activation.shape
        if rows != len(self._images):
            raise MedSteerError(
                f"The model gave {rows} rows for a batch of {len(self._images)} images; one each was expected. "
                "Remove patches that change the batch."
            )
        ranks = torch.cat([_ranks(image, visit, tokens) for image in self._images])
        chosen = ranks.argsort(stable=True)[: self.most]
        if kept and len(kept[0].ranks) >= self.most:
            chosen = chosen[ranks[chosen] < kept[0].ranks[-1]]
        images = torch.tensor(self._images).repeat_interleave(tokens)[chosen]
        return _Waiting(side, tuple(activation.shape), chosen, images, ranks[chosen], _take(activation, chosen))

    def _check_complete(self) -> None:
        if self._waiting:
            site, level, _ = next(iter(self._waiting))
            raise MedSteerError(
                f"Site '{site}' saw only one of the two prompts at sigma {level:.4g}; both were expected at every "
                "state. A cache that skips model calls causes this: remove it for the extraction."
            )


def _ranks(image: int, visit: int, tokens: int) -> Tensor:
    """(tokens,) float64: pseudo-random numbers that belong to this image and visit; ties are as good as impossible."""
    generator = torch.Generator().manual_seed(image * 1_000_003 + visit)
    return torch.rand(tokens, generator=generator, dtype=torch.float64)


def _take(activation: Tensor, chosen: Tensor) -> Tensor:
    """The chosen tokens (n, C) of an activation (rows, tokens, C), float32 on the CPU."""
    flat = activation.reshape(-1, activation.shape[-1])
    return flat.index_select(0, chosen.to(flat.device)).to(device="cpu", dtype=torch.float32)
