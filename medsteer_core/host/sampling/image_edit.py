"""The counterfactual of real images: onto the model's canvas, edited there, and back in their own pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...errors import MedSteerError
from ...pictures.own_pixels import Canvas, as_rgb, canvas_for, checked_images, edited, soft_mask, without_ghosts
from ..patching.native_size import draws_squares, native_side
from .counterfactual import Pair, sample_pair
from .pair_request import OPEN, PairRequest, RealFactual

MODELS_SIZE, OWN_SIZE = "the model's", "the image's"
SIZES = (MODELS_SIZE, OWN_SIZE)


@dataclass(frozen=True, eq=False)
class ImagePair:
    """What a node run gives, K counterfactuals of B images, all images of the first multiple first.

    factual: the images as they came (B, H, W, C); counterfactual (K * B, H, W, C) in 0..1, equal to them where
    mask (B, H, W) is 0; concept_map (B, H, W): where the edit acts, 1 at the most
    pair: its latents, records and doubts; summary: all that in words
    """

    factual: Tensor
    counterfactual: Tensor
    concept_map: Tensor
    mask: Tensor
    pair: Pair
    summary: str

    @property
    def records(self) -> list[dict[str, Any]]:
        return self.pair.records


def edit_images(
    model: ModelPatcher, vae: Any, images: Tensor, request: PairRequest, size: str = MODELS_SIZE, group: str = ""
) -> ImagePair:
    """Counterfactuals of IMAGEs ``(B, H, W, C)``: what `sample_pair` makes of their latents, in their own pixels.

    ``size``: one of `SIZES`, at which the model sees them. ``group``: whose images they are (a patient's, a case's), in
    one line or a line for each image, so that data sets keep them in one split; the records hold a hash of it. The
    request's latent is not looked at; its mask is one of the images.

    Raises MedSteerError for images that are none, a VAE of another model's latents, and video models.
    """
    if size not in SIZES:
        raise MedSteerError(f"size is '{size}'; one of {', '.join(SIZES)} was expected.")
    real = checked_images(images)
    groups = _groups(group, len(real))
    canvas = _canvas(model, real, size)
    seen = canvas.put(as_rgb(real))
    latents = _encoded(model, vae, seen)
    mask = None if request.mask is None else _mask_on(canvas, request.mask)
    seen_at = None if canvas.is_own_size else (canvas.rows, canvas.columns)
    told = [RealFactual(image_hash(image), own, seen_at) for image, own in zip(real, groups, strict=True)]
    pair = sample_pair(model, replace(request, latent={"samples": latents}, mask=mask, real=told))
    difference = canvas.back(_difference(vae, pair, latents, seen))
    share = None
    if request.mask is not None:  # as it was drawn, and not as whole latent pixels
        share = request.mask.reshape(-1, *real.shape[-2:]).float().cpu().clamp(0, 1).expand(len(real), -1, -1)
    elif pair.mask_source != OPEN:
        share = canvas.back(soft_mask(pair.mask)[:, None])[:, 0].clamp(0, 1)
    times = len(pair.counterfactual) // len(real)
    changed = edited(real.repeat(times, 1, 1, 1), difference, None if share is None else share.repeat(times, 1, 1))
    return ImagePair(
        factual=images,
        counterfactual=changed.movedim(1, -1),
        concept_map=canvas.back(pair.concept_map[:, None])[:, 0].clamp(0, 1),
        mask=torch.ones(len(real), *real.shape[-2:]) if share is None else (share > 0).float(),
        pair=pair,
        summary="\n".join([pair.summary, *_about(canvas)]),
    )


def image_hash(image: Tensor) -> str:
    """16 hex digits of SHA-256 over an image's size and 8-bit pixels ``(C, H, W)`` in 0..1: of what is seen, not of a
    file, so that neither its name nor what it says of a patient counts."""
    levels = (image * 255).round().to(torch.uint8).contiguous()
    return hashlib.sha256(f"{tuple(image.shape)} ".encode() + levels.numpy().tobytes()).hexdigest()[:16]


def _canvas(model: ModelPatcher, real: Tensor, size: str) -> Canvas:
    side = native_side(model) if size == MODELS_SIZE else None
    ratio = model.get_model_object("latent_format").spacial_downscale_ratio
    return canvas_for(*real.shape[-2:], ratio, side, side is not None and draws_squares(model))


def _encoded(model: ModelPatcher, vae: Any, pixels: Tensor) -> Tensor:
    """Latents ``(B, C, h, w)`` of pixels ``(B, 3, H, W)``. MedSteerError where the model can't take them."""
    latents = vae.encode(pixels.movedim(1, -1))
    wanted = model.get_model_object("latent_format")
    expected = tuple(length // wanted.spacial_downscale_ratio for length in pixels.shape[-2:])
    if latents.ndim != 4 or latents.shape[1] != wanted.latent_channels or tuple(latents.shape[-2:]) != expected:
        raise MedSteerError(
            f"The VAE gives latents of shape {tuple(latents.shape)}; (images, {wanted.latent_channels}, {expected[0]}, "
            f"{expected[1]}) was expected. Connect the VAE that belongs to the model. Video models can't edit images."
        )
    return latents


def _mask_on(canvas: Canvas, mask: Tensor) -> Tensor:
    """A MASK of the image as one of the canvas. MedSteerError where it does not lie on the image."""
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or tuple(mask.shape[-2:]) != (canvas.height, canvas.width):
        raise MedSteerError(
            f"mask has shape {tuple(mask.shape)}; (masks, {canvas.height}, {canvas.width}), the image's size, was "
            "expected. Draw it on the image (Open in Mask Editor), or resize it."
        )
    return canvas.put(mask[:, None].float())[:, 0]


def _difference(vae: Any, pair: Pair, latents: Tensor, seen: Tensor) -> Tensor:
    """What the edits change of the canvas ``seen``, as ``(K * B, 3, H, W)``: nothing where the latents are equal.

    Under a lock the outlines of what is gone go with it.
    """
    before = _decoded(vae, latents)
    parts = []
    for after in pair.counterfactual.split(len(latents)):
        change = _decoded(vae, after) - before
        if pair.mask_source != OPEN:
            change = without_ghosts(change, seen, before)
        same = (after == latents).flatten(1).all(1)
        change[same] = 0
        parts.append(change)
    return torch.cat(parts)


def _decoded(vae: Any, latents: Tensor) -> Tensor:
    return vae.decode(latents)[..., :3].movedim(-1, 1).float().cpu()


def _groups(text: str, images: int) -> list[str]:
    """The group of each image, "" where none is named. MedSteerError for another number of lines."""
    lines = [line.strip() for line in text.strip().splitlines()] or [""]
    if len(lines) not in (1, images):
        raise MedSteerError(
            f"group has {len(lines)} lines for {images} images; one for all, or one each, was expected."
        )
    return lines * images if len(lines) == 1 else lines


def _about(canvas: Canvas) -> Sequence[str]:
    told = [f"real image: {canvas.width} x {canvas.height} pixels, its own outside the mask"]
    if not canvas.is_own_size:
        told.append(f"seen by the model at {canvas.columns} x {canvas.rows}; the difference is brought back")
    return told
