"""Arithmetic with pathology vectors of one model: add, subtract, scale, average, orthogonalise, join.

What is added is a vector's displacement at a site and step, its gap times its direction: for the mean difference that
leads from the absent class's mean to the present one's, so that (dyed - normal) - (polyps - normal) is dyed - polyps.
Where a vector does not know its gaps (an imported one) unit directions are added, and the result has no gaps either.

A result's class statistics are those of classes where there are such; the others are 0 and named in
`provenance["unknown"]`. `provenance["combined"]` says what was combined and how much the parts overlap.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import MedSteerError
from .combined_facts import CLASS_FIELDS, combined_facts, label
from .match import check_match, on_schedule
from .pathology_vector import PathologyVector, SiteDirections
from .site_algebra import class_means, displacement, joined, nearest, orthonormal, scaled, without

# Below this share of what went in, what is left after subtracting is rounding of float32 directions.
CANCELLED = 1e-4
ADD, SUBTRACT, AVERAGE = "add", "subtract", "average"
ORTHOGONALISE, JOIN = "orthogonalise a against b", "joint subspace"
WEIGHTED = (ADD, SUBTRACT, AVERAGE)
HOW = (*WEIGHTED, ORTHOGONALISE, JOIN)


def combine(
    a: PathologyVector, b: PathologyVector, how: str, weight_a: float = 1.0, weight_b: float = 1.0
) -> PathologyVector:
    """`a` and `b` combined as one of `HOW` says; the weights count for add, subtract and average."""
    if how not in HOW:
        raise MedSteerError(f"how is {how!r}; one of {', '.join(HOW)} was expected.")
    if how == ORTHOGONALISE:
        return orthogonalise(a, b)
    if how == JOIN:
        return joint_subspace([a, b])
    return {ADD: add, SUBTRACT: subtract, AVERAGE: average}[how](a, b, weight_a, weight_b)


def add(a: PathologyVector, b: PathologyVector, weight_a: float = 1.0, weight_b: float = 1.0) -> PathologyVector:
    """`weight_a * a + weight_b * b`. Raises MedSteerError for rank above 1, readers, and a sum that is nothing."""
    return _sum(a, b, ADD, (weight_a, weight_b), (weight_a, weight_b))


def subtract(a: PathologyVector, b: PathologyVector, weight_a: float = 1.0, weight_b: float = 1.0) -> PathologyVector:
    """`weight_a * a - weight_b * b`, as `add`."""
    return _sum(a, b, SUBTRACT, (weight_a, weight_b), (weight_a, -weight_b))


def average(a: PathologyVector, b: PathologyVector, weight_a: float = 1.0, weight_b: float = 1.0) -> PathologyVector:
    """The weighted mean of two vectors of one finding, such as of two ways to say it; weights above 0.

    Where both are mean differences, the class means are averaged as well.
    """
    _check_weights(weight_a, weight_b)
    if min(weight_a, weight_b) <= 0:
        raise MedSteerError(f"The weights of an average are {weight_a:g} and {weight_b:g}; above 0 was expected.")
    total = weight_a + weight_b
    return _sum(a, b, AVERAGE, (weight_a, weight_b), (weight_a / total, weight_b / total))


def scale(vector: PathologyVector, weight: float) -> PathologyVector:
    """The vector with `weight` times its gaps; below 0 it points from present to absent, which change places.

    Readers are scaled too, so that `affine` does `weight` times as much. Raises MedSteerError for 0, and for turning a
    vector with readers, which read what the present prompt has put in.
    """
    _check_weights(weight)
    if weight == 0 or (weight < 0 and vector.has_readers):
        expected = "above 0, since this vector has readers," if vector.has_readers else "other than 0"
        raise MedSteerError(f"The weight of a vector is {weight:g}; a number {expected} was expected.")
    unknown = vector.unknown if abs(weight) == 1 else {*vector.unknown, *CLASS_FIELDS}
    facts = combined_facts([vector], "scale", f"{weight:g} * {label(vector)}", unknown, weights=[weight])
    if weight > 0 and "prompts" in vector.provenance:
        facts["prompts"] = vector.provenance["prompts"]
    facts["combined"]["class_means"] = _has_class_means(vector) and abs(weight) == 1
    sites = {name: scaled(site, weight) for name, site in vector.sites.items()}
    return PathologyVector(without(sites, unknown), vector.sigmas, facts, vector.flow)


def orthogonalise(a: PathologyVector, b: PathologyVector) -> PathologyVector:
    """What of `a` lies across `b`: `a - sum_i (a.b_i) b_i` at each site and step; `b` may have any rank.

    Along it `b`'s finding does not move. The classes remain `a`'s, so their means along it are known where `a` is a
    mean difference. Raises MedSteerError for an `a` of rank above 1 or with readers, and for one wholly in `b`.
    """
    _check_plain(a, "a", ORTHOGONALISE)
    check_match(a, b)
    others, known = on_schedule(b, a.sigmas), "gaps" not in a.unknown
    kept = _has_class_means(a)
    unknown = a.unknown if kept else {*a.unknown, *CLASS_FIELDS}

    def site(name: str) -> tuple[Tensor, Tensor]:
        whole = displacement(a.sites[name], known)
        basis = orthonormal(others[name].directions.double())[0]  # float32 ones are not quite, and imported ones less
        return whole - ((whole[:, None] * basis).sum(dim=-1, keepdim=True) * basis).sum(dim=1), whole.norm(dim=-1)

    left = {name: site(name) for name in a.site_names}
    means = {name: class_means(a.sites[name]) for name in a.site_names} if kept else {}
    facts = combined_facts([a, b], ORTHOGONALISE, f"{label(a)} across {label(b)}", unknown)
    if "prompts" in a.provenance:
        facts["prompts"] = a.provenance["prompts"]
    return _from_displacements(a, left, means, {n: s.spreads for n, s in a.sites.items()}, facts)


def joint_subspace(vectors: Sequence[PathologyVector]) -> PathologyVector:
    """One vector whose directions span those of all; its rank is the sum of theirs.

    The basis is the orthonormal one nearest to the given directions (symmetric orthogonalisation, Loewdin 1950): unlike
    Gram and Schmidt's it favours none, so steering with it does not depend on the vectors' order. Readers are left out.
    Raises MedSteerError for directions that are nearly one, and for more of them than channels.
    """
    if len(vectors) < 2:
        raise MedSteerError(f"A joint subspace of {len(vectors)} vectors was asked for; 2 or more were expected.")
    first = vectors[0]
    for other in vectors[1:]:
        check_match(first, other)
    parts = [on_schedule(vector, first.sigmas) for vector in vectors]
    kept = all(_has_class_means(vector) for vector in vectors)
    unknown = {*CLASS_FIELDS} - ({"projections"} if kept else set())
    unknown |= {"gaps"} if any("gaps" in vector.unknown for vector in vectors) else set()
    sites = {name: joined(name, [part[name] for part in parts], first.sigmas) for name in first.site_names}
    facts = combined_facts(vectors, JOIN, " with ".join(label(vector) for vector in vectors), unknown)
    return PathologyVector(without(sites, unknown), first.sigmas, facts, first.flow)


def _sum(
    a: PathologyVector, b: PathologyVector, how: str, given: tuple[float, float], weights: tuple[float, float]
) -> PathologyVector:
    _check_weights(*given)
    _check_plain(a, "a", how)
    _check_plain(b, "b", how)
    check_match(a, b)
    others = on_schedule(b, a.sigmas)
    known = not any("gaps" in vector.unknown for vector in (a, b))
    kept = how == AVERAGE and _has_class_means(a) and _has_class_means(b)
    parts, means, spreads = {}, {}, {}
    for name, site in a.sites.items():
        both = site, others[name]
        terms = [weight * displacement(one, known) for weight, one in zip(weights, both, strict=True)]
        parts[name] = terms[0] + terms[1], terms[0].norm(dim=-1) + terms[1].norm(dim=-1)
        if kept:
            means[name] = sum(weight * class_means(one) for weight, one in zip(weights, both, strict=True))
            spreads[name] = sum(weight * one.spreads.square() for weight, one in zip(weights, both, strict=True)).sqrt()
    sign = "+" if how != SUBTRACT else "-"
    expression = f"{given[0]:g} * {label(a)} {sign} {given[1]:g} * {label(b)}"
    unknown = (set() if kept else {*CLASS_FIELDS}) | (set() if known else {"gaps"})
    facts = combined_facts(
        [a, b], how, f"mean of {expression}" if how == AVERAGE else expression, unknown, weights=list(given)
    )
    facts["combined"]["class_means"] = kept
    return _from_displacements(a, parts, means, spreads, facts)


def _from_displacements(
    a: PathologyVector,
    parts: Mapping[str, tuple[Tensor, Tensor]],
    means: Mapping[str, Tensor],
    spreads: Mapping[str, Tensor],
    facts: dict[str, Any],
) -> PathologyVector:
    """The vector of these displacements (S, C); beside each the length (S,) of what went into it.

    `means` (S, 2, C) and `spreads` (S, 2) are the classes', where they are known.
    """
    usable = {name: left.norm(dim=-1) > CANCELLED * before for name, (left, before) in parts.items()}
    kept = [name for name in parts if usable[name].any()]
    if not kept:
        raise MedSteerError(
            "The vectors a and b cancel: nothing is left at any site. Combine vectors of different findings, or change "
            "the weights."
        )
    facts["degenerate"] = sum(int((~usable[name]).sum()) for name in kept)
    if dropped := [name for name in parts if name not in kept]:
        facts["dropped_sites"] = dropped
    unknown = facts.get("unknown", ())
    sites = {}
    for name in kept:
        left, good = parts[name][0], usable[name]
        length = left.norm(dim=-1, keepdim=True)
        directions = (left / length.where(good[:, None], 1.0))[nearest(good)]
        classes = means.get(name, torch.zeros(len(left), 2, left.shape[1], dtype=torch.float64))
        sites[name] = SiteDirections(
            directions=directions[:, None].float(),
            gaps=length.where(good[:, None], 0.0).float(),
            centres=classes.mean(dim=1).float(),
            projections=(classes * directions[:, None]).sum(dim=-1, keepdim=True).float(),
            spreads=spreads[name].float() if name in spreads else torch.zeros(len(left), 2),
        )
    return PathologyVector(without(sites, unknown), a.sigmas, facts, a.flow)


def class_means_of(vector: PathologyVector) -> dict[str, Tensor] | None:
    """Means (S, 2, C) float64 of [present, absent] by site; None for a vector that does not tell them."""
    return {name: class_means(site) for name, site in vector.sites.items()} if _has_class_means(vector) else None


def _has_class_means(vector: PathologyVector) -> bool:
    """Whether gap times direction is the whole difference of the class means, so that those can be computed."""
    facts = vector.provenance
    averaged = facts.get("combined", {}).get("class_means", False)
    plain = facts.get("estimator") in ("mean_difference", "paired_difference")
    return vector.rank == 1 and (plain or averaged) and not vector.unknown


def _check_plain(vector: PathologyVector, name: str, how: str) -> None:
    """Raise MedSteerError for a vector with which sums have no meaning."""
    if vector.rank > 1 or vector.has_readers:
        what = f"rank {vector.rank}" if vector.rank > 1 else "readers for the operator affine"
        raise MedSteerError(
            f"'{how}' takes one direction a step, and vector {name} has {what}. Extract it with noise 'paired' or "
            f"'unpaired' and another estimator than LEACE, or choose '{JOIN}'."
        )


def _check_weights(*weights: float) -> None:
    for weight in weights:
        if not math.isfinite(weight):
            raise MedSteerError(f"The weight of a vector is {weight}; a finite number was expected.")
