"""EndoPhantom's autoencoder: a fixed linear 8x encoder and a small convolutional decoder.

The encoder is the principal components of 8x8 pixel patches, so that latents keep an image's coarse-to-fine order and
never change when the decoder is trained further. The decoder sees neighbouring latents, so patches join without seams.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 8


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate")
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class PatchAutoencoder(nn.Module):
    """Images ``(batch, 3, H, W)`` in -1..1 to latents ``(batch, channels, H/8, W/8)`` of unit mean square, and back."""

    def __init__(self, channels: int = 16, width: int = 96, depth: int = 3):
        super().__init__()
        self.channels = channels
        self.encoder = nn.Conv2d(3, channels, PATCH, stride=PATCH)
        self.linear = nn.Conv2d(channels, 3 * PATCH**2, 3, padding=1, padding_mode="replicate")
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1, padding_mode="replicate")
        self.body = nn.Sequential(*(_Residual(width) for _ in range(depth)))
        self.conv_out = nn.Conv2d(width, 3 * PATCH**2, 3, padding=1, padding_mode="replicate")
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def encode(self, images: Tensor, *_args, **_kwargs) -> Tensor:
        return self.encoder(images)

    def decode(self, latents: Tensor, *_args, **_kwargs) -> Tensor:
        detail = self.conv_out(F.silu(self.body(self.conv_in(latents))))
        return F.pixel_shuffle(self.linear(latents) + detail, PATCH)

    @torch.no_grad()
    def fit_encoder(self, images: Tensor) -> float:
        """Set the encoder to the principal components of ``images (n, 3, H, W)``; returns the variance share kept.

        The linear decoder starts as the encoder's pseudo-inverse.
        """
        patches = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2).reshape(-1, 3 * PATCH**2).double()
        mean = patches.mean(0)
        centred = patches - mean
        variances, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        components = vectors[:, -self.channels :].flip(1).T
        signs = components.sum(1).sign()
        components = components * torch.where(signs == 0, torch.ones_like(signs), signs)[:, None]
        kept = variances[-self.channels :].sum()
        scale = (kept / self.channels).rsqrt()
        self.encoder.weight.copy_((components * scale).view(self.channels, 3, PATCH, PATCH))
        self.encoder.bias.copy_(-(components * scale) @ mean)
        self.linear.weight.zero_()
        self.linear.weight[:, :, 1, 1] = (components.T / scale).float()
        self.linear.bias.copy_(mean)
        return float(kept / variances.sum())
