"""How well a direction tells unseen samples apart, and how much of it is chance: pure functions on records.

Both give, for each site, one number a noise level (S,).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import MedSteerError
from .axes import Axis, discriminant_axis, mean_axis
from .estimators import check_match
from .samples_record import SampleRecord

FOLDS = 5
SPLITS = 8
AUTO_THRESHOLD = 0.9


def held_out_auroc(
    present: SampleRecord, absent: SampleRecord, axis: Axis = mean_axis, folds: int = FOLDS
) -> dict[str, Tensor]:
    """AUROC of the projection on an axis that was estimated without the samples it is tried on, (S,) for each site.

    Cross-fitted: each of `folds` parts is projected on the axis of the others; the mean over parts, weighted by their
    pairs of (present, absent). 1: every present sample lies farther along the axis than every absent one; 0.5: chance.
    The parts are not pooled, since their axes and offsets differ (Airola et al. 2011, "An experimental comparison of
    cross-validation techniques for estimating the area under the ROC curve"). The two samples of one noise are in the
    same part. Raises MedSteerError for fewer than two samples of either prompt.
    """
    if folds < 2:
        raise MedSteerError(f"The number of folds is {folds}; 2 or more was expected.")
    _check_enough(present, absent, axis)
    parts = _parts(present, absent, folds)
    return {
        name: _auroc_of_site(values.double(), absent.sites[name].double(), axis, parts)
        for name, values in present.sites.items()
    }


def held_out_projections(
    present: SampleRecord, absent: SampleRecord, name: str, step: int, axis: Axis = mean_axis, folds: int = FOLDS
) -> tuple[Tensor, Tensor]:
    """How far along the axis each sample lies at one site and step, present (n,) and absent (m,), in record order.

    Cross-fitted as in `held_out_auroc`: a sample is projected on the axis of the parts without it, and measured from
    the midpoint of these parts' class means, so that numbers of several parts share an origin. In the activations'
    units; raises MedSteerError as `held_out_auroc` does.
    """
    _check_enough(present, absent, axis)
    sides = [record.sites[name][:, step : step + 1].double() for record in (present, absent)]
    found = [torch.zeros(len(side), dtype=torch.float64) for side in sides]
    for chosen in _parts(present, absent, folds):
        others = [side[~part] for side, part in zip(sides, chosen, strict=True)]
        direction = axis(*others)
        middle = sum(other.mean(dim=0) for other in others) / 2
        for values, side, part in zip(found, sides, chosen, strict=True):
            values[part] = ((side[part] - middle) * direction).sum(dim=(1, 2))
    return found[0], found[1]


def split_half_stability(
    present: SampleRecord, absent: SampleRecord, axis: Axis = mean_axis, splits: int = SPLITS, seed: int = 0
) -> dict[str, Tensor]:
    """|cos| between the axes of two random halves of the samples, the mean over seeded splits, (S,) for each site.

    1: the samples agree on the direction; `sqrt(2 / (pi * C))` is what chance gives in C channels. Each half has half
    of the samples, so that the direction of all of them is steadier than this. Raises MedSteerError as
    `held_out_auroc` does.
    """
    _check_enough(present, absent, axis)
    halves = list(_halves(present, absent, splits, seed))
    return {
        name: _stability_of_site(values.double(), absent.sites[name].double(), axis, halves)
        for name, values in present.sites.items()
    }


def report(
    present: SampleRecord, absent: SampleRecord, axis: Axis = mean_axis, folds: int = FOLDS, splits: int = SPLITS
) -> dict[str, Any]:
    """Both measures for a vector's provenance: `auroc` and `stability` as {site: [S numbers]}, `folds`, `splits`."""
    auroc = held_out_auroc(present, absent, axis, folds)
    stability = split_half_stability(present, absent, axis, splits)
    return {
        "auroc": {name: [round(value, 4) for value in values.tolist()] for name, values in auroc.items()},
        "stability": {name: [round(value, 4) for value in values.tolist()] for name, values in stability.items()},
        "folds": min(folds, present.count, absent.count),
        "splits": splits,
    }


def auto_sites(auroc: Mapping[str, Tensor | Sequence[float]], threshold: float = AUTO_THRESHOLD) -> tuple[str, ...]:
    """The sites whose held-out AUROC, the mean over the noise levels, is at least `threshold`; in the given order.

    `auroc` is what `held_out_auroc` gives, or `report(...)["auroc"]`. Raises MedSteerError when no site passes.
    """
    if not 0.0 <= threshold <= 1.0:  # also false for NaN
        raise MedSteerError(f"The threshold of automatic sites is {threshold}; 0 to 1 was expected.")
    means = {name: float(torch.as_tensor(values, dtype=torch.float64).mean()) for name, values in auroc.items()}
    if not means:
        raise MedSteerError(
            "The vector does not say how well its sites separate the classes, so 'auto' can't choose. Extract it "
            "again, or write the sites, such as 'all'."
        )
    chosen = tuple(name for name, mean in means.items() if mean >= threshold)
    if not chosen:
        best = max(means, key=means.__getitem__)
        raise MedSteerError(
            f"No site separates the classes with an AUROC of {threshold:g} or more on unseen samples; the best is "
            f"'{best}' with {means[best]:.2f}. Lower the threshold, take more samples, or write the sites, "
            "such as 'all'."
        )
    return chosen


def auroc(present: Tensor, absent: Tensor) -> Tensor:
    """(S,): the share of pairs in which present (n, S) is above absent (m, S); a tie counts half."""
    differences = present[:, None] - absent[None]
    return ((differences > 0).double() + 0.5 * (differences == 0).double()).mean(dim=(0, 1))


Chosen = tuple[Tensor, Tensor]  # (n,) and (m,) bool: some of the present samples and some of the absent ones


def _auroc_of_site(present: Tensor, absent: Tensor, axis: Axis, parts: Sequence[Chosen]) -> Tensor:
    total, weight = torch.zeros(present.shape[1], dtype=torch.float64), 0
    for p, a in parts:
        direction = axis(present[~p], absent[~a])
        scores = [torch.einsum("nsc,sc->ns", samples, direction) for samples in (present[p], absent[a])]
        pairs = len(scores[0]) * len(scores[1])
        total, weight = total + pairs * auroc(*scores), weight + pairs
    return total / weight


def _stability_of_site(present: Tensor, absent: Tensor, axis: Axis, halves: Sequence[Chosen]) -> Tensor:
    cosines = [(axis(present[p], absent[a]) * axis(present[~p], absent[~a])).sum(dim=-1).abs() for p, a in halves]
    return torch.stack(cosines).mean(dim=0)


def _parts(present: SampleRecord, absent: SampleRecord, folds: int) -> list[Chosen]:
    """The samples of each fold."""
    folds = min(folds, present.count, absent.count)
    p, a = _ranks(present) % folds, _ranks(absent) % folds
    return [(p == fold, a == fold) for fold in range(folds)]


def _halves(present: SampleRecord, absent: SampleRecord, splits: int, seed: int) -> Iterator[Chosen]:
    """The samples of the first half of each split."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(splits):
        first = torch.randperm(present.count, generator=generator) < present.count // 2
        second = first  # the same, so that pairs stay together
        if absent.count != present.count:
            second = torch.randperm(absent.count, generator=generator) < absent.count // 2
        yield first[_ranks(present)], second[_ranks(absent)]


def _ranks(record: SampleRecord) -> Tensor:
    """(n,) int: the place of each sample among the record's, by its number: the same for the two of a pair."""
    return record.samples.argsort().argsort()


def _check_enough(present: SampleRecord, absent: SampleRecord, axis: Axis) -> None:
    least = 4 if axis is discriminant_axis else 2  # a half must do for the axis
    if min(present.count, absent.count) < least:
        raise MedSteerError(
            f"There are {present.count} samples of present and {absent.count} of absent; at least {least} of each are "
            "needed to try a direction on samples that it was not estimated from. Set more samples."
        )
    check_match(present.statistics(), absent.statistics())
