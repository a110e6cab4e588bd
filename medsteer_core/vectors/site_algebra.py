"""Arithmetic with what one site learnt: the tensors behind algebra.py."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import MedSteerError
from .pathology_vector import SiteDirections

# Two directions nearer than this to being one (the least singular value of both) span no plane.
ONE_DIRECTION = 1e-3


def joined(name: str, parts: Sequence[SiteDirections], sigmas: Tensor) -> SiteDirections:
    """One site of `vector_algebra.joint_subspace`; `name` and `sigmas` are for its errors."""
    given = torch.cat([part.directions for part in parts], dim=1).double()  # (S, R, C)
    if given.shape[1] > given.shape[2]:
        raise MedSteerError(
            f"Site '{name}' has {given.shape[2]} channels, and the vectors have {given.shape[1]} directions together; "
            "at most as many as channels were expected. Combine vectors of a lower rank."
        )
    directions, least = orthonormal(given)
    step = int(least.argmin())
    if least[step] < ONE_DIRECTION:
        raise MedSteerError(
            f"The vectors point the same way at site '{name}', sigma {sigmas[step]:.4g}, so they span no larger "
            "subspace there. Use one of them, or combine vectors of different findings."
        )
    own = (given * directions).sum(dim=-1)  # above 0: every direction turns by less than a right angle
    gaps = torch.cat([part.gaps for part in parts], dim=1) * own
    # The class means of each part along its own new direction; right where the part is a mean difference of rank 1.
    ranks = [part.gaps.shape[1] for part in parts]
    centres = torch.cat([part.centres[:, None].expand(-1, n, -1) for part, n in zip(parts, ranks, strict=True)], dim=1)
    middle = (centres * directions).sum(dim=-1)
    return SiteDirections(
        directions=directions.float(),
        gaps=gaps.float(),
        centres=torch.zeros_like(parts[0].centres),
        projections=torch.stack([middle + gaps / 2, middle - gaps / 2], dim=1).float(),
        spreads=torch.zeros_like(parts[0].spreads),
    )


def orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The orthonormal rows nearest to `rows` (S, R, C), and the least singular value (S,) of those."""
    left, lengths, right = torch.linalg.svd(rows, full_matrices=False)
    return left @ right, lengths[:, -1]


def scaled(site: SiteDirections, weight: float) -> SiteDirections:
    """One site of `vector_algebra.scale`."""
    turned = weight < 0
    sign = -1.0 if turned else 1.0
    return SiteDirections(
        directions=sign * site.directions,
        gaps=abs(weight) * site.gaps,
        centres=site.centres,
        projections=-site.projections.flip(1) if turned else site.projections,
        spreads=site.spreads.flip(1) if turned else site.spreads,
        readers=None if site.readers is None else weight * site.readers,
        offsets=None if site.offsets is None else weight * site.offsets,
    )


def displacement(site: SiteDirections, in_gaps: bool) -> Tensor:
    """(S, C) float64: the direction, times its gap if asked; for rank 1."""
    direction = site.directions[:, 0].double()
    return direction * site.gaps.double() if in_gaps else direction


def class_means(site: SiteDirections) -> Tensor:
    """(S, 2, C) float64: the means of [present, absent] of a mean difference."""
    half = displacement(site, True) / 2
    return torch.stack([site.centres + half, site.centres - half], dim=1)


def without(sites: Mapping[str, SiteDirections], unknown: set[str] | Sequence[str]) -> dict[str, SiteDirections]:
    """The sites with zeros in the fields that are unknown."""

    def cleared(site: SiteDirections) -> SiteDirections:
        values = site.tensors()
        return SiteDirections(**{n: torch.zeros_like(v) if n in unknown else v for n, v in values.items()})

    return {name: cleared(site) for name, site in sites.items()}


def nearest(usable: Tensor) -> Tensor:
    """(S,) int: for each step the usable step closest to it, itself where it is usable; of two the noisier one."""
    candidates = usable.nonzero().squeeze(-1)
    distance = (torch.arange(len(usable))[:, None] - candidates).abs()
    return candidates[distance.argmin(dim=1)]
