"""Images out of the range that the model was trained on: what endoscopes and exports add to a picture.

Each takes images ``(n, 3, H, W)`` in 0..1 and gives them changed, in steps of 1/255; the same change goes to the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor


def as_they_are(images: Tensor) -> Tensor:
    return images


def shifted_colours(images: Tensor) -> Tensor:
    """Another light: less red, more blue and green."""
    return _levels(images * torch.tensor([0.75, 1.1, 1.35])[None, :, None, None])


def specular_glare(images: Tensor) -> Tensor:
    """White spots with soft edges where a wet wall mirrors the light."""
    height, width = images.shape[-2:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    spots = torch.zeros(height, width)
    for centre_x, centre_y, size in ((-0.35, -0.3, 0.1), (0.4, -0.45, 0.07), (0.1, 0.5, 0.12), (-0.55, 0.35, 0.06)):
        spots = torch.maximum(spots, torch.exp(-((((x - centre_x) ** 2 + (y - centre_y) ** 2) / size**2) ** 2)))
    return _levels(images * (1 - spots) + spots)


def device_mask(images: Tensor) -> Tensor:
    """The round black frame of a scope."""
    height, width = images.shape[-2:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return _levels(images * ((x**2 + y**2) < 0.9).float())


def text_overlay(images: Tensor) -> Tensor:
    """A date, a time and a green field, as processors burn them in."""
    return _levels(torch.where(_text(*images.shape[-2:])[1], _text(*images.shape[-2:])[0], images))


def text_pixels(height: int, width: int) -> Tensor:
    """Where the overlay is, ``(height, width)`` bool."""
    return _text(height, width)[1]


def _text(height: int, width: int) -> tuple[Tensor, Tensor]:
    picture = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((2, height - 30, 28, height - 4), fill=(20, 110, 60))
    draw.text((3, 2), "12.04.2026", fill=(255, 255, 255))
    draw.text((3, 12), "10:42 C7", fill=(255, 255, 255))
    drawn = torch.from_numpy(np.array(picture)).movedim(-1, 0).float() / 255
    return drawn, drawn.amax(0) > 0


def _levels(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round() / 255


ODD: Mapping[str, Callable[[Tensor], Tensor]] = {
    "as they are": as_they_are,
    "shifted colours": shifted_colours,
    "specular glare": specular_glare,
    "device mask": device_mask,
    "text overlay": text_overlay,
}
