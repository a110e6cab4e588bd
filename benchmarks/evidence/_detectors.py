"""The polyp detectors of `bench downstream`: a small CNN and a small ViT, trained from scratch by one fixed recipe.

Images are ``(n, 3, 64, 64)`` in 0..1, labels ``(n,)`` with 1 for polyps. A detector's start, its batches and its
flips depend on the seed alone, so two arms of one seed differ in their images and in nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 64


@dataclass(frozen=True)
class Recipe:
    """AdamW with a warm-up and a cosine decay of its rate, and as many steps whatever the images are."""

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float


def _strided(widths: Sequence[int]) -> list[nn.Module]:
    """3x3 convolutions with group norm, each halving the sides."""
    layers: list[nn.Module] = []
    for inputs, width in zip((3, *widths), widths, strict=False):
        layers += [nn.Conv2d(inputs, width, 3, 2, 1, bias=False), nn.GroupNorm(8, width), nn.SiLU()]
    return layers


class SmallCNN(nn.Module):
    """Strided convolutions to 8x8 places. ``forward(images (n, 3, 64, 64)) -> logits (n,)``."""

    def __init__(self, widths: Sequence[int] = (16, 32, 64)):
        super().__init__()
        last = widths[-1]
        mixing = (nn.Conv2d(last, last, 3, 1, 1, bias=False), nn.GroupNorm(8, last), nn.SiLU())
        self.body = nn.Sequential(*_strided(widths), *mixing)
        # the maximum sees a polyp anywhere, the mean sees the whole field
        self.head = nn.Linear(2 * last, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.body(images * 4 - 2)
        return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))[:, 0]


class _Layer(nn.Module):
    """Self-attention and a two-layer network, each after a layer norm and with a shortcut."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.out(mixed)
        return x + self.mlp(self.norm2(x))


class SmallViT(nn.Module):
    """A convolutional stem, then self-attention over its 8x8 places. ``forward(images (n, 3, 64, 64)) -> logits (n,)``.

    The stem stands in for the patch embedding: a few hundred images are too few to learn the one from the other
    (Xiao et al. 2021, "Early Convolutions Help Transformers See Better").
    """

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4):
        super().__init__()
        self.stem = nn.Sequential(*_strided((16, 32)), nn.Conv2d(32, width, 3, 2, 1))
        self.place = nn.Parameter(0.02 * torch.randn(1, (SIDE // 8) ** 2, width))
        self.layers = nn.Sequential(*(_Layer(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(2 * width, 1)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images * 4 - 2).flatten(2).transpose(1, 2) + self.place
        tokens = self.norm(self.layers(tokens))
        return self.head(torch.cat([tokens.mean(1), tokens.amax(1)], 1))[:, 0]


NETWORKS = {"CNN": SmallCNN, "ViT": SmallViT}


def train(name: str, images: Tensor, labels: Tensor, seed: int, recipe: Recipe) -> nn.Module:
    """A detector of `NETWORKS` trained on ``images``; the global random state is left as it was.

    ValueError when images and labels do not fit, or when one class is missing.
    """
    if images.shape[1:] != (3, SIDE, SIDE) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"train: images {tuple(images.shape)} and labels {tuple(labels.shape)} were given; "
            f"expected (n, 3, {SIDE}, {SIDE}) and (n,)."
        )
    if len(labels.unique()) != 2:
        raise ValueError("train: the labels hold one class; a detector needs images with and without polyps.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NETWORKS[name]()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1, cycle_momentum=False
    )
    for _ in range(recipe.steps):
        # uniform numbers scaled to the set, so that the stream is as long for every size of set
        chosen = (torch.rand(recipe.batch, generator=generator) * len(images)).long()
        batch = augmented(images[chosen], generator)
        loss = F.binary_cross_entropy_with_logits(network(batch), labels[chosen].float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rates.step()
    return network.eval()


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images upside down.

    Nothing more on purpose: mirroring left to right, turning or jittering colours would undo the confounding (place of
    the lumen, hue, saturation) whose cure is measured here.
    """
    flip = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flip[:, None, None, None], images.flip(2), images)


@torch.inference_mode()
def scores(network: nn.Module, images: Tensor) -> Tensor:
    """Logits ``(n,)`` of polyps."""
    return torch.cat([network(part) for part in images.split(128)])
