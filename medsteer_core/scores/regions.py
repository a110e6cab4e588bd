"""Regions of pictures: the lit field, finding masks and their margins. Every mask is ``(n, H, W)`` bool."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

# The black surround of a scope's field lies at 4 of 255 levels; the darkest wall at its rim is several times brighter.
_LIT = 0.06
# Sensor noise of single pixels must not light up the surround.
_SMOOTHED = 5


def lit_field(images: Tensor) -> Tensor:
    """The illuminated field of view of images ``(n, 3, H, W)`` in 0..1, without the black surround.

    A pixel is in the field when lit pixels lie on both sides of it in its row and in its column (or it is lit), so the
    dark lumen counts. An image without any light is all field.
    """
    grey = images.mean(1, keepdim=True)
    smooth = F.avg_pool2d(grey, _SMOOTHED, 1, _SMOOTHED // 2, count_include_pad=False)[:, 0]
    lit = (smooth > _LIT).float()
    inside = (_between(lit, 1) & _between(lit, 2)) | (lit > 0)
    return inside | ~inside.any(2, keepdim=True).any(1, keepdim=True)


def dilated(mask: Tensor, reach: int) -> Tensor:
    """A mask grown by a square of ``reach`` pixels each way."""
    return F.max_pool2d(mask[:, None].float(), 2 * reach + 1, 1, reach)[:, 0] > 0


def share(mask: Tensor) -> list[float]:
    """The part of each picture that its mask covers."""
    return mask.float().mean((1, 2)).tolist()


def share_of(mask: Tensor, field: Tensor) -> list[float]:
    """The part of each ``field`` that the mask covers; no field may be empty."""
    return ((mask & field).sum((1, 2)) / field.sum((1, 2))).tolist()


def overlap(first: Tensor, second: Tensor) -> list[float | None]:
    """Intersection over union of two masks; None where both are empty."""
    both, either = (first & second).sum((1, 2)).tolist(), (first | second).sum((1, 2)).tolist()
    return [inner / outer if outer else None for inner, outer in zip(both, either, strict=True)]


def mean_where(values: Tensor, mask: Tensor) -> float | None:
    """Mean of one picture's ``values (H, W)`` where its ``mask (H, W)`` is; None where it is nowhere."""
    return values[mask].mean().item() if mask.any() else None


def _between(lit: Tensor, axis: int) -> Tensor:
    """Where something lit lies at or before a pixel and at or after it along ``axis``."""
    after = lit.flip(axis).cummax(axis).values.flip(axis)
    return (lit.cummax(axis).values * after) > 0
