"""EndoPhantom's autoencoder: the layers of TAESD (Bohan, 2023), so that ComfyUI's own Load VAE takes its weights.

The encoder is set and not trained: it computes the principal components of 8x8 pixel patches exactly, so that latents
keep an image's coarse-to-fine order and never change when the decoder is trained further. The decoder is trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATCH, WIDTH = 8, 64
# Raw latents are this much smaller than the generator's, which keeps them where the decoder's soft clamp is linear.
SCALE = 0.2
_CONSTANT = WIDTH - 1  # the encoder's channel that is 1 everywhere: the strided layers have no bias


def _conv(inputs: int, outputs: int, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


class _Block(nn.Module):
    """Three convolutions and a shortcut; the names are TAESD's."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(
            _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH)
        )  # fmt: skip
        nn.init.zeros_(self.conv[4].weight)  # a block starts as the identity
        nn.init.zeros_(self.conv[4].bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class _SoftClamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def _encoder(channels: int) -> nn.Sequential:
    down = [layer for _ in range(3) for layer in (_conv(WIDTH, WIDTH, stride=2, bias=False), *_blocks(3))]
    return nn.Sequential(_conv(3, WIDTH), _Block(), *down, _conv(WIDTH, channels))


def _decoder(channels: int) -> nn.Sequential:
    up = [layer for blocks in (3, 3, 1) for layer in (*_doubled(), *_blocks(blocks))]
    return nn.Sequential(_SoftClamp(), _conv(channels, WIDTH), nn.ReLU(), *_blocks(3), *up, _conv(WIDTH, 3))


def _blocks(count: int) -> list[_Block]:
    return [_Block() for _ in range(count)]


def _doubled() -> tuple[nn.Module, nn.Module]:
    return nn.Upsample(scale_factor=2), _conv(WIDTH, WIDTH, bias=False)


class TinyAutoencoder(nn.Module):
    """Images ``(batch, 3, H, W)`` in -1..1 to latents ``(batch, channels, H/8, W/8)`` of unit mean square, and back."""

    def __init__(self, channels: int = 16):
        super().__init__()
        if 2 * channels >= WIDTH:
            raise ValueError(f"the encoder has room for {WIDTH // 2 - 1} latent channels, not {channels}")
        self.channels = channels
        self.taesd_encoder = _encoder(channels)
        self.taesd_decoder = _decoder(channels)
        self.vae_scale = nn.Parameter(torch.tensor(SCALE), requires_grad=False)
        self.vae_shift = nn.Parameter(torch.tensor(0.0), requires_grad=False)

    def encode(self, images: Tensor) -> Tensor:
        return self.taesd_encoder((images + 1) / 2) / self.vae_scale + self.vae_shift

    def decode(self, latents: Tensor) -> Tensor:
        return self.taesd_decoder((latents - self.vae_shift) * self.vae_scale) * 2 - 1

    @torch.no_grad()
    def set_encoder(self, weight: Tensor, bias: Tensor) -> None:
        """Make the encoder give ``weight (channels, 3, 8, 8)`` times each patch of an image in -1..1, plus ``bias``.

        Two strided layers sort a patch's pixels into channels, the third takes the components' positive and negative
        parts apart (a block cuts off what is below 0), the last puts them together. Every block is the identity.
        """
        encoder = self.taesd_encoder
        for parameter in encoder.parameters():
            parameter.zero_()
        encoder[0].weight[torch.arange(3), torch.arange(3), 1, 1] = 1.0
        encoder[0].bias[_CONSTANT] = 1.0
        _sort_pixels(encoder[2].weight, 3)
        _sort_pixels(encoder[6].weight, 12)
        # for images in 0..1 instead of -1..1, at the raw latents' scale
        bias = (bias - weight.sum((1, 2, 3))) * SCALE
        weight = 2 * weight * SCALE
        # pixel (4 y2 + 2 y1 + y0, ...) of a patch comes through the taps y0 then y1 then y2 of the three layers
        split = weight.view(self.channels, 3, 2, 2, 2, 2, 2, 2)  # colour, y2, y1, y0, x2, x1, x0
        taps = split.permute(0, 3, 6, 4, 7, 1, 2, 5).reshape(self.channels, 48, 2, 2)
        for sign, first in ((1.0, 0), (-1.0, self.channels)):
            rows = slice(first, first + self.channels)
            encoder[10].weight[rows, :48, 1:, 1:] = sign * taps
            encoder[10].weight[rows, _CONSTANT, 1, 1] = sign * bias
            encoder[14].weight[torch.arange(self.channels), torch.arange(self.channels) + first, 1, 1] = sign


def _sort_pixels(weight: Tensor, channels: int) -> None:
    """A strided convolution that turns 2x2 pixels of ``channels`` into 4 times as many channels, tap by tap."""
    for y in range(2):
        for x in range(2):
            for channel in range(channels):
                weight[(2 * y + x) * channels + channel, channel, 1 + y, 1 + x] = 1.0
    weight[_CONSTANT, _CONSTANT, 1, 1] = 1.0


@torch.no_grad()
def principal_components(images: Tensor, channels: int) -> tuple[Tensor, Tensor, float]:
    """The ``channels`` principal components of 8x8 patches of ``images (n, 3, H, W)``, scaled to unit mean square.

    Returns a weight ``(channels, 3, 8, 8)``, a bias ``(channels,)`` and the share of the variance they keep.
    """
    patches = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2).reshape(-1, 3 * PATCH**2).double()
    mean = patches.mean(0)
    centred = patches - mean
    variances, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    components = vectors[:, -channels:].flip(1).T
    signs = components.sum(1).sign()
    components = components * torch.where(signs == 0, torch.ones_like(signs), signs)[:, None]
    kept = variances[-channels:].sum()
    components = components * (kept / channels).rsqrt()
    weight = components.view(channels, 3, PATCH, PATCH)
    return weight.float(), -(components @ mean).float(), float(kept / variances.sum())
