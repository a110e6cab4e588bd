"""A plain-torch PixArt with the state-dict keys and outputs of ComfyUI's ``PixArtMS``, to train without ComfyUI.

Architecture: PixArt-alpha (arXiv 2310.00426): adaLN-single, self-attention, text cross-attention. No
micro-conditioning, no predicted variance, no key/value compression.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class PixArtConfig:
    """Sizes of a PixArt. ``pe_interpolation`` scales the position grid; None lets the host derive it from the size."""

    in_channels: int = 16
    patch_size: int = 2
    hidden_size: int = 192
    depth: int = 8
    num_heads: int = 6
    caption_channels: int = 128
    model_max_length: int = 16
    pe_interpolation: float = 4.0

    def to_dict(self) -> dict:
        return asdict(self)


def position_embedding(width: int, rows: int, cols: int, base: float, interpolation: float) -> Tensor:
    """Sine-cosine positions ``(rows * cols, width)`` of a token grid stretched to span ``base / interpolation``.

    The layout is PixArt's: the first half of the channels codes the column, the second half the row.
    """
    y = torch.arange(rows, dtype=torch.float32) / (rows / base) / interpolation
    x = torch.arange(cols, dtype=torch.float32) / (cols / base) / interpolation
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float32) / (width / 4.0))

    def code(position: Tensor) -> Tensor:
        angle = position.reshape(-1, 1) * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    return torch.cat([code(grid_x), code(grid_y)], dim=1)


def timestep_code(t: Tensor, width: int = 256) -> Tensor:
    """Sinusoidal code ``(batch, width)`` of timesteps ``(batch,)`` in 0..999."""
    half = width // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t[:, None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, out: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of ``(batch, heads, tokens, channels)``, written out: torch's fused CPU backward is 5x slower."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
    return scores.softmax(-1) @ v


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = _attend(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class _CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        batch, tokens, width = x.shape
        q = self.q_linear(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
        k, v = self.kv_linear(y).view(batch, y.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = _attend(q, k, v, mask)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = _SelfAttention(width, heads)
        self.cross_attn = _CrossAttention(width, heads)
        self.mlp = _Mlp(width, 4 * width, width)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))

    def forward(self, x: Tensor, y: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:
        parts = (self.scale_shift_table[None] + t.view(t.shape[0], 6, -1)).chunk(6, dim=1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        x = x + gate_a * self.attn(_norm(x) * (1 + scale_a) + shift_a)
        x = x + self.cross_attn(x, y, mask)
        return x + gate_m * self.mlp(_norm(x) * (1 + scale_m) + shift_m)


class _FinalLayer(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table[None] + t[:, None]).chunk(2, dim=1)
        return self.linear(_norm(x) * (1 + scale) + shift)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class _PatchEmbed(nn.Module):
    def __init__(self, channels: int, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)


class _TimestepEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))


class _CaptionEmbedder(nn.Module):
    def __init__(self, channels: int, width: int, length: int):
        super().__init__()
        self.y_proj = _Mlp(channels, width, width)
        self.register_buffer("y_embedding", torch.zeros(length, channels))


class PixArtTwin(nn.Module):
    """PixArt for training. ``forward`` takes what ComfyUI's model takes, plus a key mask for padded prompts."""

    def __init__(self, config: PixArtConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.x_embedder = _PatchEmbed(config.in_channels, config.patch_size, width)
        self.t_embedder = _TimestepEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = _CaptionEmbedder(config.caption_channels, width, config.model_max_length)
        self.blocks = nn.ModuleList(_Block(width, config.num_heads) for _ in range(config.depth))
        self.final_layer = _FinalLayer(width, config.patch_size**2 * config.in_channels)
        self._initialise()

    def _initialise(self) -> None:
        """Small output projections and open gates: from closed gates the patches learn no common structure for long."""
        depth_scale = 1.0 / math.sqrt(2 * self.config.depth)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
            for block in self.blocks:
                block.scale_shift_table[2] = 1.0
                block.scale_shift_table[5] = 1.0
                for output in (block.attn.proj, block.cross_attn.proj, block.mlp.fc2):
                    output.weight.mul_(depth_scale)
            self.t_block[1].weight.mul_(0.1)
            nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Predict from ``x (batch, channels, H, W)``, ``timesteps (batch,)`` and ``context (batch, tokens, width)``.

        ``mask (batch, tokens)`` is True for real text tokens. Returns a tensor shaped as ``x``.
        """
        patch, (height, width) = self.config.patch_size, x.shape[-2:]
        rows, cols = height // patch, width // patch
        base = max(1, round((height + width) // 2 / 64)) * 64 // patch
        position = position_embedding(self.config.hidden_size, rows, cols, base, self.config.pe_interpolation)
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + position.to(x.device)
        t = self.t_embedder.mlp(timestep_code(timesteps))
        t0 = self.t_block(t)
        y = self.y_embedder.y_proj(context)
        for block in self.blocks:
            x = block(x, y, t0, mask)
        x = self.final_layer(x, t).view(x.shape[0], rows, cols, patch, patch, self.config.in_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.config.in_channels, height, width)
