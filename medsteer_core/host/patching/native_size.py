"""The size of images that a model was made for, where that is known, and what is said of others."""

from __future__ import annotations

from collections.abc import Sequence

from comfy.ldm.pixart.pixartms import PixArtMS
from comfy.model_patcher import ModelPatcher

PIXART_SIDE = 512  # of the PixArt whose positions are not stretched
NEAR = 2.0  # times the pixels, or a part of them, that a model of several shapes can do


def native_side(model: ModelPatcher) -> int | None:
    """The side in pixels of the square images that a model was trained on; None where nothing tells."""
    own = getattr(model.get_model_object("latent_format"), "native_side", None)
    network = model.model.diffusion_model
    if own is not None or not isinstance(network, PixArtMS):
        return own
    return round(PIXART_SIDE * (network.pe_interpolation or 1))


def pixels_of(model: ModelPatcher, shape: Sequence[int]) -> tuple[int, int]:
    """Height and width in pixels of latents ``(..., h, w)``."""
    ratio = model.get_model_object("latent_format").spacial_downscale_ratio
    return shape[-2] * ratio, shape[-1] * ratio


def about_size(model: ModelPatcher, shape: Sequence[int], asked: tuple[int, int] | None = None) -> list[str]:
    """Warnings about the size of latents ``(..., h, w)``: not the model's, or not the one ``asked`` for (h, w)."""
    (height, width), side = pixels_of(model, shape), native_side(model)
    told = []
    if asked is not None and asked != (height, width):
        told.append(
            f"Warning: {asked[1]} x {asked[0]} pixels were asked for and {width} x {height} come out, the nearest that "
            "whole latent pixels give."
        )
    if side is not None and not _suits(model, height, width, side):
        told.append(
            f"Warning: this model was made for {side} x {side} pixels, and these are {width} x {height}: it repeats or "
            f"distorts what it draws. Set the latent's width and height to {side}."
        )
    return told


def draws_squares(model: ModelPatcher) -> bool:
    """Whether a model was trained on images of one size and shape alone."""
    return hasattr(model.get_model_object("latent_format"), "native_side")


def _suits(model: ModelPatcher, height: int, width: int, side: int) -> bool:
    if draws_squares(model):
        return height == width == side
    return side * side / NEAR <= height * width <= side * side * NEAR
