"""From the samples of two classes at one site to the axis that tells them apart, step by step.

Every function takes the samples' token means of the two classes, present (n, S, C) and absent (m, S, C) in float64, and
gives (S, C) rows of unit length that point from absent to present; a row without any difference is 0.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import MedSteerError
from .shrinkage import inverse_times

Axis = Callable[[Tensor, Tensor], Tensor]


def mean_axis(present: Tensor, absent: Tensor) -> Tensor:
    """The difference of the class means (arXiv 2603.07066, extraction)."""
    return _unit(present.mean(dim=0) - absent.mean(dim=0))


def principal_axis(present: Tensor, absent: Tensor) -> Tensor:
    """The first principal component of the paired differences, not centred: the axis they most share, up to sign.

    Sample i of both is one pair. As in representation engineering (Zou et al. 2023, arXiv 2310.01405), where the
    differences are of contrast pairs; the sign is that of the mean difference.
    """
    if present.shape != absent.shape:
        raise MedSteerError(
            f"Paired samples are needed, and there are {len(present)} of present and {len(absent)} of absent. Extract "
            "with noise 'paired'."
        )
    differences = (present - absent).transpose(0, 1)  # (S, n, C)
    if differences.shape[1] < differences.shape[2]:
        weights = torch.linalg.eigh(differences @ differences.mT).eigenvectors[..., -1:]
        axes = _unit((weights * differences).sum(dim=1))
    else:
        axes = torch.linalg.eigh(differences.mT @ differences).eigenvectors[..., -1]
    along = (differences.mean(dim=1) * axes).sum(dim=-1, keepdim=True)
    different = differences.abs().amax(dim=(1, 2))[:, None] > 0
    return torch.where(along < 0, -axes, axes).where(different, 0.0)


def discriminant_axis(present: Tensor, absent: Tensor) -> Tensor:
    """Fisher's discriminant: the inverse of the shrunk within-class covariance times the difference of the means.

    Fisher 1936, with the covariance shrunk after Ledoit and Wolf 2004 (shrinkage.py). Where channels vary a lot within
    the classes it reads little; along it the classes overlap least. Samples that don't vary give the mean axis.
    """
    difference = present.mean(dim=0) - absent.mean(dim=0)
    steps = within_class(present, absent).transpose(0, 1).contiguous()
    solved = [inverse_times(centred, step) for centred, step in zip(steps, difference, strict=True)]
    return _unit(torch.stack(solved))


def within_class(present: Tensor, absent: Tensor) -> Tensor:
    """(n + m, S, C): every sample less its class's mean. Raises MedSteerError for a class of one sample."""
    if min(len(present), len(absent)) < 2:
        raise MedSteerError(
            f"There are {len(present)} samples of present and {len(absent)} of absent; at least 2 of each are needed "
            "to know how they vary. Set more samples."
        )
    return torch.cat([present - present.mean(dim=0), absent - absent.mean(dim=0)])


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=-1, eps=torch.finfo(rows.dtype).tiny)


AXES: Mapping[str, Axis] = {
    "mean_difference": mean_axis,
    "paired_difference": mean_axis,
    "principal_component": principal_axis,
    "lda": discriminant_axis,
    "leace": discriminant_axis,  # the side that it reads; it writes along the mean axis
}
