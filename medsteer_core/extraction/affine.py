"""From the activations of two prompts at the same states to the affine map that takes one to the other.

What swapping the prompt changes in a cross-attention's output, D = a_present - a_absent at one state, differs from
token to token: its mean can be a small part of it. But it lies in few directions, and the activation itself tells it.
So D is predicted as `sum_i (readers_i.a_present + offsets_i) directions_i`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import MedSteerError
from ..vectors.pathology_vector import PathologyVector, SiteDirections
from .estimators import ZERO_RTOL, Statistics, check_match, nothing_differs, observations
from .token_pairs import TokenPairs

# The ridge: this share of the mean channel variance is added to every channel's.
RIDGE = 1e-2


def affine_map(
    pairs: Mapping[str, Sequence[TokenPairs]],
    present: Statistics,
    absent: Statistics,
    rank: int,
    provenance: Mapping[str, Any],
    flow: bool = False,
) -> PathologyVector:
    """A vector of `rank` directions with readers and offsets at each site and step.

    `pairs` holds S entries a site, the highest sigma first; `present` and `absent` are the class means of the same
    states. `provenance["explained"]` is the mean over sites and steps of `explained_by_site`: the share of the squared
    difference, at images that a first fit has not seen, that this fit predicts (1: all, 0: no more than leaving the
    activation as it is); null with one image. Raises MedSteerError when sites or sigmas don't match, when the two
    prompts differ nowhere, and for a rank that channels or pairs don't allow.
    """
    check_match(present, absent)
    for name, steps in pairs.items():
        most = min(min(pair.present.shape) for pair in steps)
        if not 1 <= rank <= most:
            raise MedSteerError(
                f"rank is {rank}; site '{name}' allows 1 to {most} (its channels, and the token pairs recorded). "
                "Set a lower rank, or more samples."
            )
    differing = {name: [_differs(pair) for pair in steps] for name, steps in pairs.items()}
    if not any(any(steps) for steps in differing.values()):
        raise nothing_differs()
    explained = {name: [held_out(pair, rank) for pair in steps] for name, steps in pairs.items()}
    known = [share for steps in explained.values() for share in steps if share is not None]
    facts = {
        **provenance,
        "estimator": "affine_map",
        "rank": rank,
        "ridge": RIDGE,
        "observations": {"present": observations(present), "absent": observations(absent)},
        "token_pairs": min(len(pair.present) for steps in pairs.values() for pair in steps),
        "degenerate": sum(not step for steps in differing.values() for step in steps),
        "explained": round(sum(known) / len(known), 4) if known else None,
        "explained_by_site": {
            name: [None if share is None else round(share, 4) for share in steps] for name, steps in explained.items()
        },
    }
    sites = {name: _site(steps, present[name], absent[name], rank) for name, steps in pairs.items()}
    return PathologyVector(sites, next(iter(present.values())).sigmas, facts, flow)


def fit(present: Tensor, absent: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Directions (R, C), readers (R, C) and offsets (R,) in float64 from pairs (n, C).

    The directions are the leading right singular vectors of the difference (not centred: its mean counts as well);
    each coordinate along them is regressed on the activation of the present prompt.
    """
    a = present.double()
    difference = a - absent.double()
    directions = leading_directions(difference, rank)
    coordinates = difference @ directions.mT
    centre, mean = a.mean(dim=0), coordinates.mean(dim=0)
    centred = a - centre
    # Never 0: a channel that does not vary predicts nothing, rather than anything.
    penalty = (RIDGE * centred.square().sum() / centred.shape[1]).clamp_min(torch.finfo(torch.float64).tiny)
    weights = _ridge(centred, coordinates - mean, penalty)
    return directions, weights.mT, mean - centre @ weights


def leading_directions(rows: Tensor, rank: int) -> Tensor:
    """(rank, C): orthonormal directions that hold most of the squared length of `rows` (n, C)."""
    if rows.shape[0] < rows.shape[1]:
        return torch.linalg.svd(rows, full_matrices=False).Vh[:rank]
    return torch.linalg.eigh(rows.mT @ rows).eigenvectors.mT.flip(0)[:rank]  # several times faster for many rows


def held_out(pair: TokenPairs, rank: int) -> float | None:
    """The share of |D|^2 at every fifth image that a fit on the other images predicts; None with one image.

    Every fifth: even images follow one prompt and odd ones the other, and both kinds are to be tried.
    """
    images = pair.samples.unique()
    kept_back = images[4::5] if len(images) > 4 else images[-1:]
    unseen = torch.isin(pair.samples, kept_back)
    if len(images) < 2 or int((~unseen).sum()) < rank:
        return None
    directions, readers, offsets = fit(pair.present[~unseen], pair.absent[~unseen], rank)
    a = pair.present[unseen].double()
    difference = a - pair.absent[unseen].double()
    left = difference - (a @ readers.mT + offsets) @ directions
    total = float(difference.square().sum())
    return 1 - float(left.square().sum()) / total if total > 0 else None


def _differs(pair: TokenPairs) -> bool:
    return float((pair.present - pair.absent).norm()) > ZERO_RTOL * float(pair.present.norm())


def _ridge(x: Tensor, y: Tensor, penalty: Tensor) -> Tensor:
    """(C, R): weights that least |x w - y|^2 + penalty |w|^2, for x (n, C) and y (n, R); solved on the smaller side."""
    rows, channels = x.shape
    if rows < channels:
        return x.mT @ torch.linalg.solve(x @ x.mT + penalty * torch.eye(rows, dtype=x.dtype), y)
    return torch.linalg.solve(x.mT @ x + penalty * torch.eye(channels, dtype=x.dtype), x.mT @ y)


def _site(steps: Sequence[TokenPairs], present: Any, absent: Any, rank: int) -> SiteDirections:
    directions, readers, offsets = (torch.stack(parts) for parts in zip(*(_fit(p, rank) for p in steps), strict=True))
    means = torch.stack([present.mean, absent.mean], dim=1).double()
    gaps = torch.einsum("src,sc->sr", directions, means[:, 0] - means[:, 1])
    sign = gaps.sign().where(gaps != 0, 1.0)  # every direction points from absent to present
    directions, readers, offsets = directions * sign[..., None], readers * sign[..., None], offsets * sign
    return SiteDirections(
        directions=directions.float(),
        gaps=gaps.abs().float(),
        centres=means.mean(dim=1).float(),
        projections=torch.einsum("skc,src->skr", means, directions).float(),
        spreads=torch.stack([present.variance, absent.variance], dim=1).sqrt(),
        readers=readers.float(),
        offsets=offsets.float(),
    )


def _fit(pair: TokenPairs, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    return fit(pair.present, pair.absent, rank)
