"""The judges: a classifier of the eight classes with a ninth answer, "none of these", and a segmenter of the findings.

Both are trained on renders only, never on generated images (`train/judges.py`). They look at 64x64 pixels: any image is
resized. Truth is known for renders alone; on generated images their answers are a judge's opinion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .phantom import CLASSES, FINDINGS

NONE = "none of these"
LABELS: tuple[str, ...] = (*CLASSES, NONE)
SIZE = 64


class _Block(nn.Module):
    """Two 3x3 convolutions with group norm and a shortcut; ``stride`` 2 halves the resolution."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(8, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm1(self.conv1(x)))
        return F.silu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Classifier(nn.Module):
    """``forward(images (batch, 3, 64, 64) in 0..1) -> logits (batch, 9)``, in the order of `LABELS`."""

    def __init__(self, widths: Sequence[int] = (24, 48, 80, 112)):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        pairs = zip(widths, widths[1:], strict=False)
        self.body = nn.Sequential(_Block(widths[0], widths[0], 2), *(_Block(a, b, 2) for a, b in pairs))
        self.head = nn.Linear(2 * widths[-1], len(LABELS))

    def features(self, images: Tensor) -> Tensor:
        """Pooled features ``(batch, 2 * width)``: mean and maximum over the field."""
        x = self.body(self.stem(images * 2 - 1))
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class Segmenter(nn.Module):
    """A small U-Net. ``forward(images (batch, 3, 64, 64) in 0..1) -> logits (batch, findings, 64, 64)``."""

    def __init__(self, widths: Sequence[int] = (16, 32, 64, 80)):
        super().__init__()
        self.stem = _Block(3, widths[0])
        self.down = nn.ModuleList(_Block(a, b, 2) for a, b in zip(widths, widths[1:], strict=False))
        self.up = nn.ModuleList(_Block(a + b, a) for a, b in zip(widths, widths[1:], strict=False))
        self.head = nn.Conv2d(widths[0], len(FINDINGS), 1)

    def forward(self, images: Tensor) -> Tensor:
        levels = [self.stem(images * 2 - 1)]
        for block in self.down:
            levels.append(block(levels[-1]))
        x = levels.pop()
        for block in reversed(self.up):
            below = levels.pop()
            x = block(torch.cat([below, F.interpolate(x, size=below.shape[-2:], mode="nearest")], dim=1))
        return self.head(x)


@dataclass(frozen=True)
class Verdict:
    """What the judges say of a batch: ``probabilities (batch, 9)`` and finding ``masks (batch, findings, H, W)``."""

    probabilities: Tensor
    masks: Tensor

    @property
    def labels(self) -> list[str]:
        return [LABELS[i] for i in self.probabilities.argmax(1)]

    def probability(self, label: str) -> Tensor:
        """Probability ``(batch,)`` of one label of `LABELS`."""
        return self.probabilities[:, LABELS.index(label)]

    def mask(self, finding: str) -> Tensor:
        """Mask ``(batch, H, W)`` of one finding of `FINDINGS`."""
        return self.masks[:, FINDINGS.index(finding)]


class Judges:
    """Classifier and segmenter together, from the bundle's tensors (`bundle.load_judges`)."""

    def __init__(self, classifier: Classifier, segmenter: Segmenter):
        self.classifier, self.segmenter = classifier.eval(), segmenter.eval()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Verdict:
        """Judge images ``(batch, 3, H, W)`` in 0..1; masks come back at the images' size, thresholded at 0.5."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"judges want images of shape (batch, 3, height, width), got {tuple(images.shape)}")
        small = resize(images.float().clamp(0, 1))
        probabilities = self.classifier(small).softmax(1)
        soft = self.segmenter(small).sigmoid()
        masks = F.interpolate(soft, size=images.shape[-2:], mode="bilinear", align_corners=False) > 0.5
        return Verdict(probabilities, masks)


def resize(images: Tensor) -> Tensor:
    """Images ``(batch, 3, H, W)`` at the judges' 64x64 pixels, antialiased."""
    if images.shape[-2:] == (SIZE, SIZE):
        return images
    return F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
