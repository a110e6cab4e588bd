"""What two images differ by, without any judge: SSIM, PSNR, the changed share of pixels; and whether they fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import MedSteerError, needs

CHANGED_LEVELS = 8
# Stands for the infinite PSNR of equal images: JSON has no infinity, and a mean of pairs stays a number.
PSNR_CEILING = 100.0
# SSIM as Wang et al. (2004) define it: an 11x11 Gaussian window of sigma 1.5.
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5


def compare(factual: Tensor, counterfactual: Tensor) -> dict[str, Any]:
    """What two images ``(3, H, W)`` in 0..1 differ by, without any judge, as numbers for JSON.

    ssim; psnr_db (100 where the images are equal); mean_abs_difference in 0..1; changed_fraction, the share of pixels
    whose channels differ by more than 8 of 255 levels on average; identical. MedSteerError for images that do not fit.
    """
    a, b = checked_pair(factual, counterfactual, batch=False)
    difference = (a - b).abs()
    numbers = {
        "ssim": ssim_map(a, b).mean().item(),
        "psnr_db": psnr(difference.square().mean().item()),
        "mean_abs_difference": difference.mean().item(),
        "changed_fraction": changed(difference)[0].item(),
    }
    return {**{name: round(value, 4) for name, value in numbers.items()}, "identical": torch.equal(a, b)}


def compare_pairs(factuals: Tensor, counterfactuals: Tensor) -> dict[str, Any]:
    """`compare` of pairs ``(n, 3, H, W)``: one pair's numbers, or those of each under ``pairs``."""
    a, b = checked_pair(factuals, counterfactuals, batch=True)
    pairs = [compare(*pair) for pair in zip(a, b, strict=True)]
    return pairs[0] if len(pairs) == 1 else {"pairs": pairs}


def in_words(compared: Mapping[str, Any]) -> str:
    """One line on what `compare_pairs` gave."""
    pairs = compared.get("pairs", [compared])
    ssim, psnr, changed = (mean([pair[name] for pair in pairs]) for name in ("ssim", "psnr_db", "changed_fraction"))
    start = "" if len(pairs) == 1 else f"mean of {len(pairs)} pairs: "
    return f"{start}SSIM {ssim:.3f}, PSNR {psnr:.1f} dB, {changed:.1%} of pixels changed"


def channels_first(images: Tensor) -> Tensor:
    """ComfyUI's images ``(n, H, W, 3 or more)`` as ``(n, 3, H, W)``; an alpha channel is left out."""
    return images[..., :3].movedim(-1, 1)


def checked_pair(factual: Tensor, counterfactual: Tensor, batch: bool) -> tuple[Tensor, Tensor]:
    """Both images as float32 batches ``(n, 3, H, W)`` on the CPU; MedSteerError where they do not fit."""
    images = []
    for name, image in (("factual", factual), ("counterfactual", counterfactual)):
        shape, wanted = tuple(image.shape), "(n, 3, height, width)" if batch else "(3, height, width)"
        if len(shape) != 3 + batch or shape[-3] != 3 or min(shape[-2:]) < SSIM_WINDOW or 0 in shape:
            hint = " Channels come first: use image.movedim(-1, -3)." if shape[-1:] == (3,) else ""
            raise MedSteerError(
                f"the {name} has shape {shape}; {wanted} with sides of {SSIM_WINDOW} pixels or more was expected.{hint}"
            )
        pixels = image.detach().float().cpu()
        if not pixels.isfinite().all():
            count = int((~pixels.isfinite()).sum())
            raise MedSteerError(
                f"the {name} has {count} values that are not finite; 0..1 was expected. Sample it again."
            )
        if pixels.min() < -0.5 or pixels.max() > 2:
            low, high = pixels.min().item(), pixels.max().item()
            raise MedSteerError(
                f"the {name} has values from {low:.4g} to {high:.4g}; 0..1 was expected. Scale it first."
            )
        images.append(pixels.clamp(0, 1) if batch else pixels.clamp(0, 1)[None])
    if images[0].shape[1:] == images[1].shape[1:] and len(images[0]) != len(images[1]):
        raise MedSteerError(
            f"There are {len(images[0])} factual images and {len(images[1])} counterfactuals; one for each was "
            "expected. Set strengths to one value; Strength Sweep draws several of one factual."
        )
    if images[0].shape != images[1].shape:
        raise MedSteerError(
            f"the factual has shape {tuple(factual.shape)} and the counterfactual {tuple(counterfactual.shape)}; equal "
            "shapes were expected. Make both from the same latent size."
        )
    return images[0], images[1]


def ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """SSIM of each pixel's window, (n, H, W), mean of the channels; borders are reflected."""
    with needs("torchmetrics"):
        from torchmetrics.functional.image import structural_similarity_index_measure

    options = {"sigma": SSIM_SIGMA, "kernel_size": SSIM_WINDOW, "data_range": 1.0, "reduction": "none"}
    _, full = structural_similarity_index_measure(a, b, **options, return_full_image=True)
    return full.mean(1)


def changed(difference: Tensor) -> Tensor:
    """Share (n,) of pixels that differ by more than `CHANGED_LEVELS`; ``difference`` (n, 3, H, W), absolute."""
    # the small step keeps a difference of exactly 8 levels below the limit in float32
    return (difference.mean(1) * 255 > CHANGED_LEVELS + 1e-3).float().mean((1, 2))


def psnr(mean_square: float | None) -> float | None:
    """PSNR in dB of a mean squared error in 0..1, at most `PSNR_CEILING`."""
    if mean_square is None:
        return None
    return PSNR_CEILING if mean_square == 0 else min(PSNR_CEILING, -10 * math.log10(mean_square))


def mean(values: list[float]) -> float | None:
    """The mean; None of nothing."""
    return sum(values) / len(values) if values else None
