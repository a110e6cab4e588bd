"""Two pathology vectors side by side: whether they belong together, on one schedule, and how much they overlap."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import MedSteerError
from .pathology_vector import PathologyVector, SiteDirections
from .schedule import interpolate_index

# An overlap beyond this is worth telling: steering along one of the two moves the other's finding too.
OVERLAP = 0.5


@dataclass(frozen=True)
class Overlap:
    """|cos| between the directions of two vectors, over all sites and noise levels.

    For several directions a step it is the largest between the two spans. `site` and `sigma` say where `largest` is.
    """

    mean: float
    largest: float
    site: str
    sigma: float

    @property
    def worth_telling(self) -> bool:
        return self.largest > OVERLAP


def check_match(a: PathologyVector, b: PathologyVector) -> None:
    """Raise MedSteerError unless both are of one model: sites, widths, kind of schedule and fingerprints match."""
    if set(a.site_names) != set(b.site_names):
        odd = sorted(set(a.site_names) ^ set(b.site_names))
        raise MedSteerError(
            f"The vectors a and b have different sites ({len(a.site_names)} and {len(b.site_names)}; not in both: "
            f"{', '.join(odd[:3])}); the same were expected. Extract both from one model."
        )
    for name in a.site_names:
        if a.channels(name) != b.channels(name):
            raise MedSteerError(
                f"Site '{name}' has {a.channels(name)} channels in vector a and {b.channels(name)} in vector b; the "
                "same was expected. Extract both from one model."
            )
    if a.flow != b.flow:
        kinds = ["a flow model" if vector.flow else "a diffusion model" for vector in (a, b)]
        raise MedSteerError(f"Vector a comes from {kinds[0]} and b from {kinds[1]}. Extract both from one model.")
    known = fingerprint(a), fingerprint(b)
    if None not in known and known[0] != known[1]:
        differ = sorted(key for key in {*known[0], *known[1]} if known[0].get(key) != known[1].get(key))
        raise MedSteerError(
            f"The vectors a and b come from different models: their fingerprints differ in {', '.join(differ)} "
            "(patches are LoRAs). Extract both from one model with the same LoRAs."
        )


def fingerprint(vector: PathologyVector) -> dict | None:
    """The model's fingerprint, None where the vector does not say."""
    known = vector.provenance.get("model")
    return known if isinstance(known, dict) else None


def on_schedule(vector: PathologyVector, sigmas: Tensor) -> dict[str, SiteDirections]:
    """The vector's sites at the noise levels `sigmas` (S,), interpolated as steering does (`PathologyVector.at`).

    Without readers: they belong to the recorded levels.
    """
    if torch.equal(vector.sigmas, sigmas):
        return {name: _site(site) for name, site in vector.sites.items()}
    return {name: _interpolated(vector, name, sigmas) for name in vector.site_names}


def overlap(a: PathologyVector, b: PathologyVector) -> Overlap:
    """How much two vectors of one model overlap, at the noise levels of the first."""
    others = on_schedule(b, a.sigmas)
    cosines = torch.stack(
        [
            torch.linalg.matrix_norm(site.directions.double() @ others[name].directions.double().mT, ord=2)
            for name, site in a.sites.items()
        ]
    )  # (sites, S)
    site, step = divmod(int(cosines.argmax()), a.steps)
    return Overlap(float(cosines.mean()), float(cosines.max()), a.site_names[site], float(a.sigmas[step]))


def _site(site: SiteDirections) -> SiteDirections:
    return SiteDirections(site.directions, site.gaps, site.centres, site.projections, site.spreads)


def _interpolated(vector: PathologyVector, name: str, sigmas: Tensor) -> SiteDirections:
    site, levels = vector.sites[name], sigmas.tolist()
    steps = [vector.at(name, level) for level in levels]
    places = [interpolate_index(vector.sigmas, level, vector.flow) for level in levels]

    def between(values: Tensor) -> Tensor:
        return torch.stack([torch.lerp(values[lo], values[hi], weight) for lo, hi, weight in places])

    return SiteDirections(
        directions=torch.stack([step.directions for step in steps]),
        gaps=torch.stack([step.gaps for step in steps]),
        centres=between(site.centres),
        projections=torch.stack([step.projections for step in steps]),
        spreads=between(site.spreads),
    )
