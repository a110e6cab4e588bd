"""PixArt of any size of weights and of latents.

Stock ``PixArtMS`` divides by zero when the latent's sides average 32 or less, and fails at sides that are no multiple
of its patch size; ComfyUI's detection knows one width (1152), 16 heads and 4 channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.common_dit import pad_to_patch_size
from comfy.ldm.pixart.pixartms import PixArtMS, get_2d_sincos_pos_embed_torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...checkpoints.pixart_config import ALPHA
from ...checkpoints.pixart_state import Sizes

GRID = 64  # latent side of PixArt's 512-pixel training, to which positions are scaled


class AnySizePixArtMS(PixArtMS):
    """``PixArtMS`` whose position grid keeps its 512-pixel extent for smaller latents instead of shrinking to nothing.

    Latents that stock PixArt can run go through stock PixArt. Sides that are no multiple of the patch size are padded
    and cut again, as ComfyUI's other diffusion transformers do. ``grid_extent``, in patches, is that of a model trained
    with another position grid, such as the 256-pixel one's of 16; every latent's grid spans it then.
    """

    grid_extent: float | None = None

    def forward(self, x, timesteps, context, *args, **kwargs):
        """``x (batch, channels, height, width)``, ``timesteps (batch,)``, ``context (batch, tokens, channels)``."""
        height, width = x.shape[-2:]
        padded = pad_to_patch_size(x, (self.patch_size, self.patch_size))
        return super().forward(padded, timesteps, context, *args, **kwargs)[..., :height, :width]

    def forward_orig(self, x, timestep, y, mask=None, c_size=None, c_ar=None, **kwargs):
        """``x (batch, channels, height, width)``, ``timestep (batch,)``, ``y (batch, 1, tokens, channels)``."""
        if self.grid_extent is None and round((x.shape[-2] + x.shape[-1]) // 2 / GRID) >= 1:
            return super().forward_orig(x, timestep, y, mask=mask, c_size=c_size, c_ar=c_ar, **kwargs)
        return self.forward_small(x, timestep, y, c_size, c_ar, **kwargs)

    def forward_small(self, x: Tensor, timestep: Tensor, y: Tensor, c_size=None, c_ar=None, **kwargs) -> Tensor:
        """The same network over the model's own parts, with the position grid of a 512-pixel image or its own."""
        height, width = x.shape[-2:]
        tokens = (self.x_embedder(x) + self._positions(height, width, x)).to(x.dtype)
        t = self.t_embedder(timestep, x.dtype)
        if self.micro_conditioning and c_size is not None and c_ar is not None:
            size, ratio = self.csize_embedder(c_size, x.shape[0]), self.ar_embedder(c_ar, x.shape[0])
            t = t + torch.cat([size, ratio], dim=1)
        modulation = self.t_block(t)
        text = self.y_embedder(y, self.training).squeeze(1).view(1, -1, self.hidden_size)
        for block in self.blocks:
            tokens = block(tokens, text, modulation, None, (height, width), **kwargs)
        return self.unpatchify(self.final_layer(tokens, t), height, width)

    def _positions(self, height: int, width: int, like: Tensor) -> Tensor:
        patch = self.patch_size
        interpolation = self.pe_interpolation if self.pe_interpolation and self.pe_precision is None else 1.0
        stock = self.grid_extent is None
        grid = get_2d_sincos_pos_embed_torch(
            self.hidden_size,
            h=height // patch,
            w=width // patch,
            pe_interpolation=interpolation if stock else 1.0,
            base_size=GRID // patch if stock else self.grid_extent,
            device=like.device,
            dtype=like.dtype if stock else torch.float32,  # as diffusers does; half precision blurs large positions
        )
        return grid.unsqueeze(0)


def allow_any_size(model: ModelPatcher, grid_extent: float | None = None) -> ModelPatcher:
    """Make a freshly loaded PixArt take any latent size; other models are left alone. Returns ``model``.

    ``grid_extent`` is how far its position grid reaches, in patches; None for 512 pixels'.
    """
    network = model.model.diffusion_model
    if type(network) is PixArtMS:
        network.__class__ = AnySizePixArtMS
        # The usual extent goes through stock PixArt wherever that runs.
        if grid_extent is not None and abs(grid_extent - GRID / network.patch_size) > 1e-2:
            network.grid_extent = grid_extent
    return model


@dataclass(frozen=True)
class Recipe:
    """All that makes a PixArt beside its weights: sizes, heads, family (`ALPHA` or `SIGMA`), extent of positions."""

    sizes: Sizes
    heads: int
    family: str
    grid_extent: float | None = None


def build(state: dict[str, Tensor], recipe: Recipe, options: Mapping[str, Any], disable_dynamic: bool) -> ModelPatcher:
    """A PixArt as MODEL from weights under their original names; ``options`` as ``comfy.sd``'s loader takes them.

    ``state`` must fit ``recipe.sizes`` (`pixart_state.to_original` sees to it) and is emptied.
    """
    config = _model_config(recipe)
    device = options.get("load_device", comfy.model_management.get_torch_device())
    offload = options.get("offload_device", comfy.model_management.unet_offload_device())
    supported = list(config.supported_inference_dtypes)
    dtype = options.get("dtype") or comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state),
        supported_dtypes=supported,
        weight_dtype=comfy.utils.weight_dtype(state),
    )
    cast = comfy.model_management.unet_manual_cast(dtype, device, supported)
    config.set_inference_dtype(dtype, cast, device=device)
    if options.get("custom_operations") is not None:
        config.custom_operations = options["custom_operations"]
    if options.get("fp8_optimizations"):
        config.optimizations["fp8"] = True
    model = config.get_model(state, "")
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=device, offload_device=offload)
    if not comfy.model_management.is_device_cpu(offload):
        model.to(offload)
    model.load_model_weights(state, "", assign=patcher.is_dynamic())
    return allow_any_size(patcher, recipe.grid_extent)


def _model_config(recipe: Recipe) -> comfy.supported_models.PixArtAlpha:
    """ComfyUI's description of the model, made by hand; LoRAs are mapped by its `depth` and `hidden_size`."""
    alpha = recipe.family == ALPHA
    sizes = recipe.sizes
    config = (comfy.supported_models.PixArtAlpha if alpha else comfy.supported_models.PixArtSigma)(
        {
            "image_model": "pixart_alpha" if alpha else "pixart_sigma",
            "in_channels": sizes.in_channels,
            "patch_size": sizes.patch_size,
            "hidden_size": sizes.width,
            "depth": sizes.depth,
            "num_heads": recipe.heads,
            "caption_channels": sizes.caption_channels,
            "model_max_length": sizes.tokens,
            "micro_condition": sizes.micro_conditioning,
            "pred_sigma": sizes.predicts_sigma,
        }
    )
    config.latent_format = latent_format(recipe.family, sizes.in_channels)
    return config


def latent_format(family: str, channels: int) -> comfy.latent_formats.LatentFormat:
    """The latent scale of a family's VAE: SD 1.5's for alpha, SDXL's for Sigma, 1 where channels are not their 4."""
    if channels == 4:
        return comfy.latent_formats.SD15() if family == ALPHA else comfy.latent_formats.SDXL()
    plain = comfy.latent_formats.LatentFormat()
    plain.latent_channels = channels
    return plain
