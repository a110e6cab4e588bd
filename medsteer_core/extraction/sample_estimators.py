"""From recorded samples of two prompts to the direction between them: the estimators, chosen by name.

Each takes the records of `present` and `absent` and gives a PathologyVector with the class statistics of those samples.
A step without any difference borrows the nearest step's direction with gap 0, and a site without any is left out, as
in estimators.py. All of it in float64 on the CPU.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import MedSteerError
from ..vectors.pathology_vector import PathologyVector, SiteDirections
from ..vectors.site_algebra import nearest
from . import estimators
from .axes import AXES, mean_axis, within_class
from .capture import SigmaStatistics
from .estimators import assemble, check_match
from .samples_record import SampleRecord
from .shrinkage import shrinkage

MEAN, ABSENT = "mean", "absent"  # where LEACE leaves the classes


def mean_difference(
    present: SampleRecord, absent: SampleRecord, provenance: Mapping[str, Any], flow: bool = False
) -> PathologyVector:
    """`d = (mu_present - mu_absent) / ||mu_present - mu_absent||` (arXiv 2603.07066): as without a record."""
    return estimators.mean_difference(present.statistics(), absent.statistics(), provenance, flow)


def paired_difference(
    present: SampleRecord, absent: SampleRecord, provenance: Mapping[str, Any], flow: bool = False
) -> PathologyVector:
    """The mean of the differences of pairs, as in contrastive activation addition (Rimsky et al., arXiv 2312.06681).

    The mean of the differences is the difference of the means, so the direction is `mean_difference`'s. What pairs add
    is how sure of it one can be: `provenance["pair_spread"]` holds, by site and step, the root of the differences'
    total variance over their mean's length. Pairs whose common noise cancels make it small. Raises MedSteerError for
    samples that are not pairs.
    """
    check_paired(present, absent)
    statistics = _statistics(present, absent)
    facts = dict(provenance)
    if present.count > 1:
        facts["pair_spread"] = {
            name: _pair_spread(values, absent.sites[name]) for name, values in present.sites.items()
        }
    return _along_axes(present, absent, statistics, "paired_difference", facts, flow)


def principal_component(
    present: SampleRecord, absent: SampleRecord, provenance: Mapping[str, Any], flow: bool = False
) -> PathologyVector:
    """The first principal component of the paired differences (axes.principal_axis), signed from absent to present.

    It follows what most pairs share however strongly each shows it, and large differences more than small ones.
    """
    check_paired(present, absent)
    return _along_axes(present, absent, _statistics(present, absent), "principal_component", provenance, flow)


def lda(
    present: SampleRecord, absent: SampleRecord, provenance: Mapping[str, Any], flow: bool = False
) -> PathologyVector:
    """Fisher's linear discriminant with a shrunk covariance (axes.discriminant_axis).

    `provenance["shrinkage"]` is the mean over sites and steps of the share of the covariance that was replaced.
    """
    statistics = _statistics(present, absent)
    facts = {**provenance, "shrinkage": _mean_shrinkage(present, absent)}
    return _along_axes(present, absent, statistics, "lda", facts, flow)


def leace(
    present: SampleRecord, absent: SampleRecord, provenance: Mapping[str, Any], flow: bool = False, anchor: str = MEAN
) -> PathologyVector:
    """Least-squares concept erasure (Belrose et al. 2023, arXiv 2306.03819, theorem 4.3) as a vector with readers.

    For two classes the eraser takes `(r.(a - m)) d` away: it writes along the difference of the means, d, and reads by
    the whitened one, r (the discriminant, so long that `r.d = 1`). The operator `affine` at strength 1 does that, so
    that the class means coincide and no linear classifier tells the classes apart, while the activations change least.
    The covariance is the one within the classes, shrunk; the between-class part would not change r, and shrinkage costs
    nothing but a little more change.

    `anchor` is where the erased classes lie: `mean`, the mean m of both (the paper), or `absent`, the absent class's:
    then strength 1 takes a finding away instead of halving it and leaves the absent class in its place on average.

    It is fitted on the samples' token means and acts on tokens. Since it is affine an image's token mean moves as
    fitted, whatever its tokens do.
    """
    if anchor not in (MEAN, ABSENT):
        raise MedSteerError(f"anchor is {anchor!r}; 'mean' or 'absent' was expected.")
    statistics = _statistics(present, absent)
    shares = torch.tensor([present.count, absent.count], dtype=torch.float64) / (present.count + absent.count)

    def site(name: str, usable: Tensor) -> SiteDirections:
        samples = present.sites[name].double(), absent.sites[name].double()
        means = _class_means(statistics[0][name], statistics[1][name])
        write, read = mean_axis(*samples), AXES["leace"](*samples)
        along = (read * write).sum(dim=-1, keepdim=True)
        # A step without any difference reads nothing, so nothing is done there.
        readers = (read / along.where(along > 0, 1.0)).where(usable[:, None], 0.0).float()
        centre = means[:, 1] if anchor == ABSENT else shares @ means
        offsets = -(readers * centre).sum(dim=-1, keepdim=True)
        own = statistics[0][name], statistics[1][name]
        return _site(*own, write, usable, readers[:, None], offsets.float())

    facts = {
        **provenance,
        "estimator": "leace",
        "anchor": anchor,
        "shrinkage": _mean_shrinkage(present, absent),
    }
    return assemble(*statistics, site, facts, flow)


Estimator = Callable[..., PathologyVector]
ESTIMATORS: Mapping[str, Estimator] = {
    "mean_difference": mean_difference,
    "paired_difference": paired_difference,
    "principal_component": principal_component,
    "lda": lda,
    "leace": leace,
}
NEEDS_PAIRS = ("paired_difference", "principal_component")


def estimate(
    name: str,
    present: SampleRecord,
    absent: SampleRecord,
    provenance: Mapping[str, Any],
    flow: bool = False,
    **options: Any,
) -> PathologyVector:
    """The vector that the estimator called `name` gives. Raises MedSteerError for an unknown name."""
    if name not in ESTIMATORS:
        raise MedSteerError(f"There is no estimator {name!r}; choose one of {', '.join(ESTIMATORS)}.")
    return ESTIMATORS[name](present, absent, provenance, flow, **options)


def check_paired(present: SampleRecord, absent: SampleRecord) -> None:
    """Raise MedSteerError unless sample i of both started from the same noise."""
    if not torch.equal(present.samples, absent.samples):
        raise MedSteerError(
            f"This estimator compares pairs of samples, and the {present.count} of present and {absent.count} of "
            "absent are not the same samples. Extract with noise 'paired', or choose another estimator."
        )


Both = tuple[Mapping[str, SigmaStatistics], Mapping[str, SigmaStatistics]]  # of [present, absent]


def _statistics(present: SampleRecord, absent: SampleRecord) -> Both:
    """Both records' statistics. Raises MedSteerError unless sites, widths and sigmas match."""
    statistics = present.statistics(), absent.statistics()
    check_match(*statistics)
    return statistics


def _along_axes(
    present: SampleRecord, absent: SampleRecord, statistics: Both, name: str, facts: Mapping[str, Any], flow: bool
) -> PathologyVector:
    """The vector whose directions are those of `AXES[name]`."""

    def site(place: str, usable: Tensor) -> SiteDirections:
        axes = AXES[name](present.sites[place].double(), absent.sites[place].double())
        return _site(statistics[0][place], statistics[1][place], axes, usable)

    return assemble(*statistics, site, {**facts, "estimator": name}, flow)


def _site(
    present: SigmaStatistics,
    absent: SigmaStatistics,
    axes: Tensor,
    usable: Tensor,
    readers: Tensor | None = None,
    offsets: Tensor | None = None,
) -> SiteDirections:
    """The site with unit `axes` (S, C) as directions and the class statistics along them."""
    directions = axes[nearest(usable)]
    means = _class_means(present, absent)
    projections = (means * directions[:, None]).sum(dim=-1, keepdim=True)
    gaps = (projections[:, 0] - projections[:, 1]).clamp_min(0.0).where(usable[:, None], 0.0)
    return SiteDirections(
        directions=directions[:, None].float(),
        gaps=gaps.float(),
        centres=means.mean(dim=1).float(),
        projections=projections.float(),
        spreads=torch.stack([present.variance, absent.variance], dim=1).sqrt(),
        readers=readers,
        offsets=offsets,
    )


def _class_means(present: SigmaStatistics, absent: SigmaStatistics) -> Tensor:
    """(S, 2, C) float64: the means of [present, absent]."""
    return torch.stack([present.mean, absent.mean], dim=1).double()


def _mean_shrinkage(present: SampleRecord, absent: SampleRecord) -> float:
    found = [
        shrinkage(step)
        for name, values in present.sites.items()
        for step in within_class(values.double(), absent.sites[name].double()).unbind(1)
    ]
    return round(sum(found) / len(found), 4)


def _pair_spread(present: Tensor, absent: Tensor) -> list[float | None]:
    """(S) numbers: root of the total variance of the differences, in lengths of their mean; None where that is 0."""
    differences = present.double() - absent.double()
    mean = differences.mean(dim=0)
    spread = ((differences - mean).square().sum(dim=(0, 2)) / (len(differences) - 1)).sqrt()
    pairs = zip(spread.tolist(), mean.norm(dim=-1).tolist(), strict=True)
    return [round(width / length, 4) if length > 0 else None for width, length in pairs]
