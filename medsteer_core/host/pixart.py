"""PixArt at any latent size.

Stock ``PixArtMS`` divides by zero when the latent's sides average 32 or less, and fails at sides that are no multiple
of its patch size.
"""

from __future__ import annotations

import torch
from comfy.ldm.common_dit import pad_to_patch_size
from comfy.ldm.pixart.pixartms import PixArtMS, get_2d_sincos_pos_embed_torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

GRID = 64  # latent side of PixArt's 512-pixel training, to which positions are scaled


class AnySizePixArtMS(PixArtMS):
    """``PixArtMS`` whose position grid keeps its 512-pixel extent for smaller latents instead of shrinking to nothing.

    Latents that stock PixArt can run go through stock PixArt. Sides that are no multiple of the patch size are padded
    and cut again, as ComfyUI's other diffusion transformers do.
    """

    def forward(self, x, timesteps, context, *args, **kwargs):
        """``x (batch, channels, height, width)``, ``timesteps (batch,)``, ``context (batch, tokens, channels)``."""
        height, width = x.shape[-2:]
        padded = pad_to_patch_size(x, (self.patch_size, self.patch_size))
        return super().forward(padded, timesteps, context, *args, **kwargs)[..., :height, :width]

    def forward_orig(self, x, timestep, y, mask=None, c_size=None, c_ar=None, **kwargs):
        """``x (batch, channels, height, width)``, ``timestep (batch,)``, ``y (batch, 1, tokens, channels)``."""
        if round((x.shape[-2] + x.shape[-1]) // 2 / GRID) >= 1:
            return super().forward_orig(x, timestep, y, mask=mask, c_size=c_size, c_ar=c_ar, **kwargs)
        return self.forward_small(x, timestep, y, c_size, c_ar, **kwargs)

    def forward_small(self, x: Tensor, timestep: Tensor, y: Tensor, c_size=None, c_ar=None, **kwargs) -> Tensor:
        """The same network over the model's own parts, with the position grid of a 512-pixel image."""
        height, width = x.shape[-2:]
        tokens = self.x_embedder(x) + self._positions(height, width, x)
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
        grid = get_2d_sincos_pos_embed_torch(
            self.hidden_size,
            h=height // patch,
            w=width // patch,
            pe_interpolation=interpolation,
            base_size=GRID // patch,
            device=like.device,
            dtype=like.dtype,
        )
        return grid.unsqueeze(0)


def allow_any_size(model: ModelPatcher) -> ModelPatcher:
    """Make a freshly loaded PixArt take any latent size; other models are left alone. Returns ``model``."""
    network = model.model.diffusion_model
    if type(network) is PixArtMS:
        network.__class__ = AnySizePixArtMS
    return model
