"""Where in the image a steering would act: the change that each token would see, as a map over the latent."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import MedSteerError

Grid = tuple[int, int]


def token_grid(tokens: int, height: int, width: int) -> Grid:
    """(rows, columns) of `tokens` image tokens of a latent of `height` x `width`, for square patches.

    Sides that are no multiple of the patch are padded, as ComfyUI's models do. Raises MedSteerError where no square
    patch gives this many tokens (video latents, for instance).
    """
    for patch in range(1, max(height, width) + 1):
        rows, columns = math.ceil(height / patch), math.ceil(width / patch)
        if rows * columns == tokens:
            return rows, columns
        if rows * columns < tokens:
            break
    raise MedSteerError(
        f"The model has {tokens} image tokens for a latent of {height}x{width}, which no square patch gives. Masks and "
        "maps work for image models only."
    )


def to_pixels(values: Tensor, height: int, width: int) -> Tensor:
    """(images, tokens) as (images, height, width): every latent pixel has its token's value."""
    rows, columns = token_grid(values.shape[-1], height, width)
    patch = math.ceil(height / rows)
    if math.ceil(width / patch) != columns or math.ceil(height / patch) != rows:
        patch = math.ceil(width / columns)
    wide = values.reshape(-1, rows, columns).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    return wide[:, :height, :width]


def token_weights(mask: Tensor, tokens: int, height: int, width: int) -> Tensor:
    """A MASK (masks, H, W) of any size as weights (masks, tokens, 1) of a latent's tokens: what it covers of each."""
    grid = token_grid(tokens, height, width)
    covered = torch.nn.functional.adaptive_avg_pool2d(mask[:, None].float(), grid)
    return covered.reshape(len(mask), tokens, 1)


class TokenChange:
    """Running mean over sites and model calls of each token's relative change, `|steered - a| / mean token norm`."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._count: dict[int, int] = {}

    @property
    def seen(self) -> bool:
        """Whether any change was observed."""
        return any(bool((values > 0).any()) for values in self._sums.values())

    @torch.no_grad()
    def observe(self, before: Tensor, after: Tensor) -> None:
        """`before` and `after` (images, tokens, C): a site's activation in one call, and what steering makes of it."""
        change = torch.linalg.vector_norm((after - before).float(), dim=-1)
        length = torch.linalg.vector_norm(before.float(), dim=-1).mean(dim=-1, keepdim=True)
        relative = change / length.clamp_min(torch.finfo(torch.float32).tiny)
        tokens = relative.shape[-1]
        known = self._sums.get(tokens)
        self._sums[tokens] = relative if known is None else known + relative
        self._count[tokens] = self._count.get(tokens, 0) + 1

    def maps(self, height: int, width: int) -> Tensor:
        """(images, height, width) on the CPU: the mean change at each latent pixel, 1 at each image's largest.

        Models whose sites have other token counts (a UNet's levels) are averaged at the latent's pixels, each site
        with the same weight. Zeros where nothing would change. Raises MedSteerError when nothing was observed.
        """
        if not self._sums:
            raise MedSteerError("There is no concept map: no step of this schedule fell into the steering window.")
        total = sum(self._count.values())
        parts = [to_pixels(values, height, width) for values in self._sums.values()]
        mean = (torch.stack(parts).sum(dim=0) / total).cpu()
        return mean / mean.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def prediction_map(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """How far two predictions ``(images, C, H, W)`` lie apart at each pixel, over several pairs of them.

    Returns (images, height, width) on the CPU: the mean over pairs, each of them relative to its own mean, 1 at each
    image's largest; zeros where they are equal.
    """
    tiny = torch.finfo(torch.float32).tiny
    total = torch.zeros(())
    for one, other in pairs:
        apart = torch.linalg.vector_norm((other - one).float(), dim=1).cpu()
        total = total + apart / apart.mean(dim=(1, 2), keepdim=True).clamp_min(tiny)
    return total / total.amax(dim=(1, 2), keepdim=True).clamp_min(tiny)


def smoothed(maps: Tensor, times: int) -> Tensor:
    """Maps (images, height, width) after ``times`` binomial filters of 3 x 3 pixels, 1 at the largest again."""
    if times < 0:
        raise MedSteerError(f"lock_smoothing is {times}; 0 or more was expected.")
    if not times:
        return maps
    row = torch.tensor([1.0, 2.0, 1.0])
    kernel = (row[:, None] * row)[None, None] / 16
    for _ in range(times):
        maps = torch.nn.functional.pad(maps[:, None], (1, 1, 1, 1), mode="replicate")
        maps = torch.nn.functional.conv2d(maps, kernel)[:, 0]
    return maps / maps.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


OWN_THRESHOLD = 0.0  # for each map the threshold that parts its values best


def otsu_thresholds(maps: Tensor, bins: int = 64) -> Tensor:
    """(images,): for each map (images, H, W) in 0..1 the threshold that leaves most variance between its two parts.

    N. Otsu, A threshold selection method from gray-level histograms (1979).
    """
    levels = (torch.arange(bins) + 0.5) / bins
    share = torch.stack([torch.histc(values.float(), bins, 0, 1) for values in maps.cpu()])
    share = share / share.sum(1, keepdim=True)
    below, weighed = share.cumsum(1), (share * levels).cumsum(1)
    between = (weighed[:, -1:] * below - weighed) ** 2 / (below * (1 - below)).clamp_min(1e-9)
    return levels[between.argmax(1)] + 0.5 / bins


def thresholds(maps: Tensor, threshold: float) -> Tensor:
    """(images,): the share of its largest value from which on each map marks; `OWN_THRESHOLD` takes Otsu's.

    Raises MedSteerError for a threshold that is none.
    """
    if not 0 <= threshold <= 1:
        raise MedSteerError(f"mask_threshold is {threshold}; from 0 (each map's own) to 1 was expected.")
    return otsu_thresholds(maps) if threshold == OWN_THRESHOLD else torch.full((len(maps),), threshold)


def threshold_mask(maps: Tensor, threshold: float, dilation: int) -> Tensor:
    """(images, H, W) bool: where a map is at least ``threshold`` of its largest value, grown by ``dilation`` pixels.

    See `thresholds`.
    """
    limits = thresholds(maps, threshold)
    if dilation < 0:
        raise MedSteerError(f"mask_dilation is {dilation}; 0 or more latent pixels were expected.")
    chosen = ((maps >= limits.to(maps)[:, None, None]) & (maps > 0)).float()[:, None]
    size = 2 * dilation + 1
    return torch.nn.functional.max_pool2d(chosen, size, stride=1, padding=dilation)[:, 0] > 0


def mask_for_latent(mask: Tensor, images: int, height: int, width: int) -> Tensor:
    """A MASK (1 or `images`, any H, any W) as a binary mask (images, height, width) in latent pixels.

    A latent pixel is inside when the mask covers any of it: at least one part in a hundred.
    """
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3 or mask.shape[0] not in (1, images):
        raise MedSteerError(
            f"The mask has shape {tuple(mask.shape)}; (1, height, width) or ({images}, height, width) was expected."
        )
    if not bool(torch.isfinite(mask).all()):
        raise MedSteerError("The mask has values that are not finite; values from 0 to 1 were expected.")
    area = torch.nn.functional.adaptive_avg_pool2d if mask.shape[1] >= height and mask.shape[2] >= width else None
    values = mask.float().cpu()[:, None]
    small = area(values, (height, width)) if area else torch.nn.functional.interpolate(values, size=(height, width))
    return (small[:, 0] >= 0.01).expand(images, height, width)
