"""A control for a pathology vector: the same vector with directions that were drawn, not learnt.

What steering does along a direction that means nothing is what it does by pushing at all. The draw is a Gaussian's with
the covariance within a class (so that it points where images of one class differ anyway), or the same in every
direction, where nothing is known of the classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import MedSteerError
from .algebra import class_means_of
from .combined_facts import CLASS_FIELDS, combined_facts, label
from .match import check_match, on_schedule
from .pathology_vector import PathologyVector, SiteDirections
from .site_algebra import displacement, orthonormal

HOW = "random direction"
# Drawn directions that nearly coincide (the least singular value of their unit rows) span no subspace.
_LEAST = 1e-3


def drawn(deviations: Tensor, weights: Tensor) -> Tensor:
    """Unit rows (S, C): the sum of ``deviations (S, n, C)`` from a class's mean with ``weights (n,)``.

    With independent standard normal weights the sum is Gaussian with the deviations' covariance (times their number),
    so its direction is a draw from it. The weights are the same at every step, and should be at every site, as a
    pathology vector's own are of one contrast: independent ones would cancel over the steps.
    """
    return F.normalize(torch.einsum("n,snc->sc", weights, deviations), dim=-1)


def normal_weights(count: int, seed: int) -> Tensor:
    """``(count,)`` standard normal numbers of this seed."""
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def random_direction(vector: PathologyVector, seed: int, within: PathologyVector | None = None) -> PathologyVector:
    """``vector`` with as many orthonormal directions at each site and step as it has, drawn by ``seed``.

    ``within``: the difference of two vectors of the same prompts from other seeds, unpaired (`subtract` of
    vector_algebra): what the class means of two sets of samples differ by is a draw from the covariance within the
    classes. Without it directions are drawn isotropically, one draw for all sites of one width and all steps.

    Gaps, readers and offsets stay, so that the operators add and affine push each token exactly as far as they do with
    ``vector``; class means along the drawn directions are known where the classes' means are.

    Raises MedSteerError for a ``within`` of another model, or with fewer directions than ``vector``.
    """
    if within is None:
        rows = {name: _isotropic(site, vector.rank, seed) for name, site in vector.sites.items()}
    else:
        rows = _from_deviations(vector, within, seed)
    means = class_means_of(vector)
    unknown = set(vector.unknown) | ({*CLASS_FIELDS} if means is None else set())
    parts = [vector] if within is None else [vector, within]
    how = "isotropic" if within is None else "covariance within a class"
    expression = f"random direction {seed} for {label(vector)}"
    facts = combined_facts(parts, HOW, expression, unknown, seed=seed, drawn=how)
    sites = {
        name: _replaced(site, rows[name], None if means is None else means[name]) for name, site in vector.sites.items()
    }
    return PathologyVector(sites, vector.sigmas, facts, vector.flow)


def describe_drawn(vector: PathologyVector, control: PathologyVector) -> str:
    """What was drawn, and how far operators push with it, in plain text."""
    how = control.provenance["combined"]["drawn"]
    lines = [f"{label(control)[1:-1]}  [{control.short_hash()}]", f"drawn: {how}, rank {control.rank}"]
    lines.append(f"|cos| to the vector: {_cosine(vector, control):.2f} on average")
    far = "add and affine push as far as with the vector"
    share = _reach(vector, control)
    if share is None:
        lines.append(f"{far}; suppress and ablate take away what lies along the drawn direction, be it more or less")
    else:
        lines.append(f"{far}; suppress pushes {share:.0%} as far, at the present class's mean")
    return "\n".join(lines)


def _isotropic(site: SiteDirections, rank: int, seed: int) -> Tensor:
    channels, steps = site.directions.shape[-1], len(site.directions)
    rows = torch.randn(rank, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return orthonormal(F.normalize(rows, dim=-1)[None])[0].expand(steps, -1, -1)


def _from_deviations(vector: PathologyVector, within: PathologyVector, seed: int) -> dict[str, Tensor]:
    check_match(vector, within)
    if within.rank < vector.rank:
        raise MedSteerError(
            f"The vector has {vector.rank} directions a step, and within_class {within.rank}; as many or more were "
            "expected. Join several differences with Combine Pathology Vectors, or leave within_class unconnected for "
            "isotropic draws."
        )
    others, known = on_schedule(within, vector.sigmas), "gaps" not in within.unknown
    draws = normal_weights(vector.rank * within.rank, seed).double().view(vector.rank, within.rank)
    found = {}
    for name in vector.site_names:
        deviations = _deviations(others[name], known)
        rows, least = orthonormal(torch.stack([drawn(deviations, weights) for weights in draws], dim=1))
        if least.min() < _LEAST:
            raise MedSteerError(
                f"within_class shows no difference at site '{name}', so nothing can be drawn there. Subtract two "
                "vectors of the same prompts that were extracted with noise 'unpaired' and different seeds."
            )
        found[name] = rows
    return found


def _deviations(site: SiteDirections, in_gaps: bool) -> Tensor:
    if site.directions.shape[1] == 1:
        return displacement(site, in_gaps)[:, None]
    return site.directions.double() * (site.gaps.double()[..., None] if in_gaps else 1.0)


def _replaced(site: SiteDirections, rows: Tensor, means: Tensor | None) -> SiteDirections:
    """The site with other directions; ``means (S, 2, C)`` are the classes', where they are known."""
    directions = rows.float().contiguous()
    if means is None:
        return SiteDirections(
            directions=directions,
            gaps=site.gaps,
            centres=torch.zeros_like(site.centres),
            projections=torch.zeros_like(site.projections),
            spreads=torch.zeros_like(site.spreads),
            readers=site.readers,
            offsets=site.offsets,
        )
    projections = torch.einsum("skc,src->skr", means, rows).float()
    return SiteDirections(
        directions, site.gaps, site.centres, projections, site.spreads, site.readers, site.offsets
    )  # fmt: skip


def _cosine(vector: PathologyVector, control: PathologyVector) -> float:
    """Mean over sites and steps of the largest |cos| between the two's subspaces."""
    found = [
        torch.linalg.matrix_norm(site.directions @ control.sites[name].directions.mT, ord=2).mean()
        for name, site in vector.sites.items()
    ]
    return float(torch.stack(found).mean())


def _reach(vector: PathologyVector, control: PathologyVector) -> float | None:
    """How far suppress pushes the present class's mean with the control, as a share; None where that is not known."""
    if "projections" in control.unknown:
        return None
    own, other = (
        torch.cat([site.projections[:, 0].clamp_min(0).norm(dim=-1) for site in one.sites.values()]).sum()
        for one in (vector, control)
    )
    return float(other / own) if own > 0 else None
