"""How far the classes lie apart, measured by how much images of one class vary: a number only where it has a ground."""

from __future__ import annotations

import torch
from torch import Tensor

from .pathology_vector import PathologyVector

_LEAST_SHARE = 1e-4  # of the gap and the means: a smaller spread is rounding, not variation


def gaps_in_spreads(vector: PathologyVector) -> tuple[dict[str, Tensor], str]:
    """Each site's class gap ``(S,)`` over all directions, in spreads within a class, and why there is none of others.

    A spread is the root of a class's total variance, here the mean of both classes'. Sites at which the samples of a
    class do not vary are left out; so are all where one sample, or no statistics, stand behind the vector.
    """
    if {"spreads", "gaps"} & vector.unknown:
        return {}, "the vector's statistics are not known"
    if vector.provenance.get("samples") == 1:
        return {}, "one sample does not say how much images of one class vary"
    found = {}
    for name, site in vector.sites.items():
        gaps, spreads = site.gaps.norm(dim=1), site.spreads.mean(dim=1)
        scale = torch.maximum(gaps, site.projections.abs().amax(dim=(1, 2)))
        if bool((spreads > _LEAST_SHARE * scale).all()):
            found[name] = gaps / spreads
    return found, "" if len(found) == len(vector.sites) else "the samples of a class do not vary there"
