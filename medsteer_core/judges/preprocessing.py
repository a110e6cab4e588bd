"""What is done to an image before a network sees it: timm's transform for evaluation, without timm.

An image is first what its PNG would hold, 8 bits a channel, and is then resized by Pillow: the numbers are those of the
transform that the network was trained and validated with, to the last bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy
import torch
from PIL import Image
from torch import Tensor

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class Preprocessing:
    """``input_size`` (height, width) in pixels; ``mean`` and ``std`` of the three channels in 0..1.

    The image is resized to ``input_size / crop_pct`` and its middle is cut out. By ``crop_mode`` that resize keeps the
    aspect and fills the size ("center", which loses what stands over), does not keep it ("squash"), or keeps it and
    stays within ("border", which adds a border in the mean colour). timm's names and rules.
    """

    input_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def __call__(self, images: Tensor) -> Tensor:
        """Images ``(n, 3, H, W)`` in 0..1 as the network's input ``(n, 3, *input_size)``, float32 on the CPU."""
        levels = (images.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
        pictures = [Image.fromarray(one.permute(1, 2, 0).contiguous().numpy()) for one in levels]
        return torch.stack([self.of_picture(picture) for picture in pictures])

    def of_picture(self, picture: Image.Image) -> Tensor:
        """An RGB picture as the network's input ``(3, *input_size)``."""
        return self.normalised(self.cropped(picture))

    def cropped(self, picture: Image.Image) -> Image.Image:
        """The picture at ``input_size``."""
        height, width = self._resized(picture.height, picture.width)
        if (height, width) != (picture.height, picture.width):
            picture = picture.resize((width, height), INTERPOLATIONS[self.interpolation])
        fill = tuple(round(255 * level) for level in self.mean) if self.crop_mode == "border" else (0, 0, 0)
        return _middle(picture, self.input_size, fill)

    def normalised(self, picture: Image.Image) -> Tensor:
        """A picture's pixels ``(3, H, W)``, with the mean taken off, in units of the standard deviation."""
        pixels = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1).contiguous().float() / 255
        return (pixels - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """The size before the crop."""
        wanted = tuple(math.floor(side / self.crop_pct) for side in self.input_size)
        if self.crop_mode == "squash":
            return wanted
        if self.crop_mode == "center" and wanted[0] == wanted[1]:
            short, long = min(height, width), max(height, width)
            longer = int(wanted[0] * long / short)
            return (longer, wanted[0]) if width <= height else (wanted[0], longer)
        ratios = height / wanted[0], width / wanted[1]
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        # a very long picture must not vanish
        return max(1, round(height / ratio)), max(1, round(width / ratio))


def _middle(picture: Image.Image, size: tuple[int, int], fill: tuple[int, ...]) -> Image.Image:
    """The middle of a picture at ``size`` (height, width), on ``fill`` where the picture is smaller."""
    height, width = max(picture.height, size[0]), max(picture.width, size[1])
    if (height, width) != (picture.height, picture.width):
        canvas = Image.new("RGB", (width, height), fill)
        canvas.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
        picture = canvas
    top, left = int(round((height - size[0]) / 2.0)), int(round((width - size[1]) / 2.0))
    return picture.crop((left, top, left + size[1], top + size[0]))
