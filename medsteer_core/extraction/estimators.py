"""From the activations of two prompts to the direction between them, by running means alone."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import MedSteerError
from ..vectors.pathology_vector import PathologyVector, SiteDirections
from ..vectors.site_algebra import nearest
from .capture import SigmaStatistics

# Below this share of the activation's own length a difference of means is rounding.
ZERO_RTOL = 1e-6
# Two runs of one schedule; a little more than what capture.py takes for one sigma.
SIGMA_RTOL = 1e-4

Statistics = Mapping[str, SigmaStatistics]


def mean_difference(
    present: Statistics, absent: Statistics, provenance: Mapping[str, Any], flow: bool = False
) -> PathologyVector:
    """`d = (mu_present - mu_absent) / ||mu_present - mu_absent||` at each site and step (arXiv 2603.07066, extraction).

    `present` and `absent` are `ActivationSums.statistics()` of the same model and schedule. A step without a
    difference borrows the nearest step's direction with gap 0; `provenance["degenerate"]` says how many did. A site
    without any is left out and named in `provenance["dropped_sites"]`. Raises MedSteerError when sites, widths or
    sigmas don't match, and when the two prompts differ nowhere.
    """
    return assemble(
        present,
        absent,
        lambda name, usable: _site_directions(present[name], absent[name], usable),
        {**provenance, "estimator": "mean_difference"},
        flow,
    )


def assemble(
    present: Statistics,
    absent: Statistics,
    site: Callable[[str, Tensor], SiteDirections],
    facts: Mapping[str, Any],
    flow: bool,
) -> PathologyVector:
    """The vector of the sites that differ: `site(name, usable)` gives one; `usable` (S,) says at which steps it does.

    Adds `observations`, `degenerate` and `dropped_sites` to `facts`. Raises MedSteerError as `mean_difference` does.
    """
    check_match(present, absent)
    usable = {name: _usable_steps(present[name], absent[name]) for name in present}
    kept = [name for name in present if usable[name].any()]
    if not kept:
        raise nothing_differs()
    facts = {
        **facts,
        "observations": {"present": observations(present), "absent": observations(absent)},
        "degenerate": sum(int((~usable[name]).sum()) for name in kept),
    }
    if dropped := [name for name in present if name not in kept]:
        facts["dropped_sites"] = dropped
    return PathologyVector({name: site(name, usable[name]) for name in kept}, present[kept[0]].sigmas, facts, flow)


def nothing_differs() -> MedSteerError:
    """The error for two prompts between which there is nothing to find."""
    return MedSteerError(
        "The prompts 'present' and 'absent' give the same activations everywhere, so there is no direction between "
        "them. Give two different prompts, one with the finding and one without it; if they do differ, check that "
        "the text encoder knows the words."
    )


def _difference(present: SigmaStatistics, absent: SigmaStatistics) -> Tensor:
    return present.mean.double() - absent.mean.double()


def _usable_steps(present: SigmaStatistics, absent: SigmaStatistics) -> Tensor:
    """(S,) bool: where the class means differ by more than rounding."""
    length = (present.mean.double().norm(dim=-1) + absent.mean.double().norm(dim=-1)) / 2
    return _difference(present, absent).norm(dim=-1) > ZERO_RTOL * length


def _site_directions(present: SigmaStatistics, absent: SigmaStatistics, usable: Tensor) -> SiteDirections:
    difference = _difference(present, absent)
    own = difference.norm(dim=-1, keepdim=True)
    directions = (difference / own.where(usable[:, None], 1.0))[nearest(usable)]
    means = torch.stack([present.mean, absent.mean], dim=1).double()
    return SiteDirections(
        directions=directions[:, None].float(),
        gaps=own.where(usable[:, None], 0.0).float(),
        centres=means.mean(dim=1).float(),
        projections=(means * directions[:, None]).sum(dim=-1, keepdim=True).float(),
        spreads=torch.stack([present.variance, absent.variance], dim=1).sqrt(),
    )


def observations(statistics: Statistics) -> int:
    """The samples that every site and step has seen."""
    return min(int(site.count.min()) for site in statistics.values())


def check_match(present: Statistics, absent: Statistics) -> None:
    """Raise MedSteerError unless both have the same sites, widths and sigmas."""
    if not present or not absent:
        raise MedSteerError("There are no activations to compare; run both prompts through the model first.")
    if set(present) != set(absent):
        odd = sorted(set(present) ^ set(absent))
        raise MedSteerError(
            f"The two prompts ran through different sites ({len(present)} and {len(absent)}; not in both: "
            f"{', '.join(odd[:3])}). Use the same model for both."
        )
    first = next(iter(present))
    for name in present:
        shapes = tuple(present[name].mean.shape), tuple(absent[name].mean.shape)
        if shapes[0] != shapes[1]:
            raise MedSteerError(
                f"Site '{name}': the present prompt gave (steps, channels) {shapes[0]}, the absent one {shapes[1]}; "
                "the same was expected. Use the same model, sampler and steps for both."
            )
        for other in (absent[name].sigmas, present[first].sigmas):
            _check_sigmas(name, present[name].sigmas, other)


def _check_sigmas(name: str, sigmas: Tensor, other: Tensor) -> None:
    if sigmas.shape != other.shape or not torch.allclose(sigmas, other, rtol=SIGMA_RTOL, atol=0):
        raise MedSteerError(
            f"Site '{name}': the sigmas are {_show(sigmas)} here and {_show(other)} there; all sites and both prompts "
            "need the same noise schedule. Use a sampler with fixed steps, and the same one for both."
        )


def _show(sigmas: Tensor) -> str:
    return f"{len(sigmas)} from {sigmas[0]:.4g} to {sigmas[-1]:.4g}"
