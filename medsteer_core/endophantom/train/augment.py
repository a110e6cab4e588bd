"""What the judges are shown: distorted renders that keep their class, and images that are no endoscopy."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


def _uniform(n: int, low: float, high: float, draw: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(n, *shape, generator=draw) * (high - low) + low


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with ``sigma`` in pixels."""
    if sigma < 0.2:
        return images
    radius = max(1, int(3 * sigma))
    x = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).repeat(3, 1)
    padded = F.pad(images, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[:, None, None, :], groups=3), kernel[:, None, :, None], groups=3)


def jpeg(images: Tensor, draw: torch.Generator) -> Tensor:
    """JPEG with a quality of 20 to 90 for each image."""
    out = []
    for image, quality in zip(images, _uniform(len(images), 20, 90, draw), strict=True):
        pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=int(quality))
        out.append(torch.from_numpy(np.asarray(Image.open(buffer)).copy()).permute(2, 0, 1).float() / 255)
    return torch.stack(out)


def distort(images: Tensor, draw: torch.Generator) -> Tensor:
    """Blur, noise, colour, gain, gamma and JPEG, each in part of the batch ``(n, 3, H, W)`` in 0..1."""
    n = len(images)
    images = images.clone()
    for group in torch.randperm(n, generator=draw).chunk(8)[:5]:
        images[group] = blur(images[group], float(_uniform(1, 0.2, 1.3, draw)))
    images = images * _uniform(n, 0.9, 1.1, draw, 3, 1, 1) * _uniform(n, 0.8, 1.2, draw, 1, 1, 1)
    grey = images.mean(1, keepdim=True)
    images = (grey + (images - grey) * _uniform(n, 0.8, 1.2, draw, 1, 1, 1)).clamp(0, 1)
    images = images ** _uniform(n, 0.8, 1.25, draw, 1, 1, 1)
    noisy = _uniform(n, 0.0, 0.05, draw, 1, 1, 1) * (torch.rand(n, 1, 1, 1, generator=draw) < 0.7)
    images = (images + noisy * torch.randn(images.shape, generator=draw)).clamp(0, 1)
    some = torch.randperm(n, generator=draw)[: n // 4]
    images[some] = jpeg(images[some], draw)
    return images


def _smooth_noise(n: int, size: int, cells: int, draw: torch.Generator) -> Tensor:
    grid = torch.rand(n, 3, cells, cells, generator=draw)
    return F.interpolate(grid, size=(size, size), mode="bicubic", align_corners=True).clamp(0, 1)


def _recoloured(images: Tensor, draw: torch.Generator) -> Tensor:
    """Channels permuted, or the image's negative, or no colour at all."""
    out = []
    orders = [[2, 1, 0], [1, 0, 2], [1, 2, 0], [2, 0, 1]]
    for image, kind in zip(images, torch.randint(0, 6, (len(images),), generator=draw).tolist(), strict=True):
        if kind < 4:
            out.append(image[orders[kind]])
        else:
            out.append(1 - image if kind == 4 else image.mean(0, keepdim=True).expand(3, -1, -1))
    return torch.stack(out)


def _patchwork(images: Tensor, draw: torch.Generator) -> Tensor:
    """Each image's tiles, shuffled and mixed with another image's."""
    n, _, size, _ = images.shape
    cells = int((4, 4, 8)[int(torch.randint(0, 3, (1,), generator=draw))])
    edge = size // cells
    tiles = images.unfold(2, edge, edge).unfold(3, edge, edge).reshape(n, 3, cells * cells, edge, edge)
    order = torch.rand(n, cells * cells, generator=draw).argsort(1)
    mixed = torch.stack([torch.where(torch.rand(1, cells * cells, 1, 1, generator=draw) < 0.3,
                                     tiles[i - 1][:, order[i]], tiles[i][:, order[i]]) for i in range(n)])  # fmt: skip
    grid = mixed.view(n, 3, cells, cells, edge, edge).permute(0, 1, 2, 4, 3, 5)
    return grid.reshape(n, 3, size, size)


def nonsense(images: Tensor, draw: torch.Generator) -> Tensor:
    """As many images that are no endoscopy: blank, noise, recoloured, patchwork, or blurred past recognition.

    ``images (n, 3, H, W)`` are renders that some of the kinds start from.
    """
    n, size = len(images), images.shape[-1]
    colour = images.mean((2, 3), keepdim=True) * _uniform(n, 0.6, 1.4, draw, 1, 1, 1)
    anything = torch.rand(n, 3, 1, 1, generator=draw)
    plain = torch.where(torch.rand(n, 1, 1, 1, generator=draw) < 0.6, colour, anything)
    blank = plain + 0.02 * torch.randn(images.shape, generator=draw)
    clouds = 0.5 * plain + 0.5 * _smooth_noise(n, size, int(torch.randint(2, 9, (1,), generator=draw)), draw)
    static = plain + 0.3 * torch.randn(images.shape, generator=draw)
    kinds = [
        blank,
        clouds,
        static,
        _recoloured(images, draw),
        _patchwork(images, draw),
        blur(images, float(_uniform(1, 7, 14, draw)) * size / 64),
        0.5 * images + 0.5 * images.roll(1, 0).flip(2),
    ]
    which = torch.randint(0, len(kinds), (n,), generator=draw)
    return torch.stack([kinds[k][i] for i, k in enumerate(which.tolist())]).clamp(0, 1)
