"""A real image on a model's canvas, and an edit of it back in the image's own pixels.

The model sees the image at a size that it can draw; what comes back is the difference that the edit makes there, which
is added to the image itself. So nothing of the image passes through the autoencoder, and where nothing changed its
pixels are what they were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import MedSteerError

SOFT = 4  # pixels of the canvas over which a mask's edge fades, twice
REDRAWN = 16 / 255  # where the edit changes a channel by more, what was there is gone with its fine edges


@dataclass(frozen=True)
class Canvas:
    """An image of ``height`` x ``width`` pixels on ``rows`` x ``columns`` of a model's, and ``below`` and ``right`` of
    these that only fill up whole latent pixels.
    """

    height: int
    width: int
    rows: int
    columns: int
    below: int = 0
    right: int = 0

    @property
    def is_own_size(self) -> bool:
        """Whether the model sees the image's own pixels."""
        return (self.height, self.width) == (self.rows, self.columns)

    def put(self, images: Tensor) -> Tensor:
        """Images or masks ``(n, C, height, width)`` as the model sees them; the filling repeats the edge.

        Returns ``(n, C, rows + below, columns + right)``.
        """
        return F.pad(_resized(images, self.rows, self.columns), (0, self.right, 0, self.below), mode="replicate")

    def back(self, values: Tensor) -> Tensor:
        """Values of the canvas's pixels ``(n, C, rows + below, columns + right)`` at the image's size."""
        return _resized(values[..., : self.rows, : self.columns], self.height, self.width)


def canvas_for(height: int, width: int, multiple: int, side: int | None = None, square: bool = False) -> Canvas:
    """The canvas of an image: its own pixels, or where the model has a ``side``, as many as a square of it has.

    ``multiple``: pixels of a latent pixel; ``square``: the model draws squares alone, so that other images are
    squeezed into one. MedSteerError for an image that is smaller than a latent pixel.
    """
    if min(height, width) < multiple:
        raise MedSteerError(
            f"The image has {width} x {height} pixels; at least {multiple} x {multiple}, one latent pixel, were "
            "expected. Give a larger image."
        )
    if side is None:
        rows, columns = height, width
    elif square:
        rows = columns = side
    else:
        scale = side / math.sqrt(height * width)
        rows, columns = (max(1, round(length * scale / multiple)) * multiple for length in (height, width))
    return Canvas(height, width, rows, columns, -rows % multiple, -columns % multiple)


def soft_mask(mask: Tensor, margin: int = SOFT) -> Tensor:
    """A mask ``(n, H, W)`` of 0 and 1 whose edge fades outside of it, to 0 at twice ``margin`` pixels from it."""
    size = 2 * margin + 1
    grown = F.max_pool2d(mask[:, None].float(), size, stride=1, padding=margin)
    edged = F.pad(grown, (margin,) * 4, mode="replicate")
    return F.avg_pool2d(edged, size, stride=1)[:, 0].clamp(0, 1)


def without_ghosts(difference: Tensor, images: Tensor, before: Tensor) -> Tensor:
    """A ``difference`` that takes away what the autoencoder does not see, too, where the edit changes much.

    The image's own fine edges are not in the decoded image ``before`` the edit, and so not in the difference: the
    outline of what is gone would stay. All are ``(n, 3, H, W)`` on the canvas.
    """
    redrawn = soft_mask((difference.abs().amax(1) > REDRAWN).float())[:, None]
    return difference + redrawn * (before - images)


def edited(images: Tensor, difference: Tensor, share: Tensor | None = None) -> Tensor:
    """Images ``(n, C, H, W)`` in 0..1 plus a ``difference (n, 3, H, W)``, times ``share (n, H, W)`` where given.

    What is not changed is the image's to the last bit. An alpha channel stays; one of grey gets the difference's mean.
    """
    if share is not None:
        difference = difference * share[:, None]
    colours = min(3, images.shape[1])
    change = difference if colours == 3 else difference.mean(1, keepdim=True).expand(-1, colours, -1, -1)
    changed = (images[:, :colours] + change).clamp(0, 1)
    kept = torch.where(change == 0, images[:, :colours], changed)
    return torch.cat([kept, images[:, colours:]], dim=1)


def checked_images(images: Tensor) -> Tensor:
    """An IMAGE ``(n, H, W, C)`` as ``(n, C, H, W)`` float32. MedSteerError for what is none."""
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or not len(images):
        raise MedSteerError(
            f"image has shape {tuple(images.shape)}; (images, height, width, 1, 3 or 4 channels) was expected."
        )
    if not bool(torch.isfinite(images).all()) or float(images.min()) < 0 or float(images.max()) > 1:
        raise MedSteerError(
            "image has values outside 0..1 or none at all (NaN). Load it with Load Image, or scale it to 0..1."
        )
    return images.detach().cpu().float().movedim(-1, 1)


def as_rgb(images: Tensor) -> Tensor:
    """``(n, 1, 3 or 4, H, W)`` as ``(n, 3, H, W)``: grey three times, without alpha."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]


def _resized(values: Tensor, height: int, width: int) -> Tensor:
    if tuple(values.shape[-2:]) == (height, width):
        return values
    return F.interpolate(values, size=(height, width), mode="bilinear", antialias=True)
