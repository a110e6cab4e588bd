"""The judges: a classifier of the eight classes with a ninth answer, "none of these"; a segmenter of the findings; a
regressor of the anatomy; and a distance that tells what is unlike any render, whatever class it is given.

All are trained on renders only, never on generated images (`train/judges.py`). They look at 64x64 pixels: any image is
resized. Truth (class, masks, anatomy) is known for renders alone: the judges' errors are measured on those, as they
are and passed through the autoencoder. Of generated images no truth is known; there they have judges only.
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
# The anatomy's factors that could show in any class. Site and tint are left out: they are the finding's own.
# The roll shows as the turn of a triangle, which is alike after a third of a turn.
FACTORS: tuple[str, ...] = (
    "lumen_centre_x",
    "lumen_centre_y",
    "lumen_radius",
    "fold_count",
    "fold_spacing",
    "fold_depth",
    "fold_triangularity",
    "roll_sin3",
    "roll_cos3",
    "hue",
    "saturation",
    "mottle",
    "vessels",
    "moisture",
    "light_x",
    "light_y",
    "gain",
    "vignette",
    "octagon",
)


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


class Regressor(nn.Module):
    """``forward(images (batch, 3, 64, 64) in 0..1) -> factors (batch, len(FACTORS))``, each in its own unit.

    The buffers are set in training: the factors' ``mean`` and ``spread``, the held-out ``error`` of each (RMSE, its
    own unit) and which are ``kept``: those that the regressor does tell from a render.
    """

    mean: Tensor
    spread: Tensor
    error: Tensor
    kept: Tensor

    def __init__(self, widths: Sequence[int] = (24, 40, 64, 64)):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 5, stride=2, padding=2)
        self.body = nn.Sequential(*(_Block(a, b, 2) for a, b in zip(widths, widths[1:], strict=False)))
        # not pooled: where things are is what is asked
        self.head = nn.Linear(widths[-1] * (SIZE >> len(widths)) ** 2, len(FACTORS))
        self.register_buffer("mean", torch.zeros(len(FACTORS)))
        self.register_buffer("spread", torch.ones(len(FACTORS)))
        self.register_buffer("error", torch.ones(len(FACTORS)))
        self.register_buffer("kept", torch.ones(len(FACTORS), dtype=torch.bool))

    @property
    def factors(self) -> tuple[str, ...]:
        """Names of the kept factors: the columns of `in_errors`."""
        return tuple(name for name, kept in zip(FACTORS, self.kept.tolist(), strict=True) if kept)

    def maps(self, images: Tensor) -> Tensor:
        """Feature maps ``(batch, width, 4, 4)``."""
        return self.body(F.silu(self.stem(images * 2 - 1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.maps(images).flatten(1)) * self.spread + self.mean

    def in_errors(self, images: Tensor) -> Tensor:
        """The kept factors ``(batch, kept)``, each in units of its held-out error."""
        return (self(images) / self.error)[:, self.kept]


class Distance(nn.Module):
    """How far features lie from those of renders: Mahalanobis distance to the nearest class (Lee et al., 2018).

    ``forward(features (batch, features)) -> (batch,)`` in units of ``limit``, the 99th percentile of held-out renders.
    The buffers are fitted in training: the classes' ``means (classes, features)`` and ``whitening (features,
    features)``, by which the covariance that the classes share becomes the identity.
    """

    means: Tensor
    whitening: Tensor
    limit: Tensor

    def __init__(self, features: int, classes: int = len(CLASSES)):
        super().__init__()
        self.register_buffer("means", torch.zeros(classes, features))
        self.register_buffer("whitening", torch.eye(features))
        self.register_buffer("limit", torch.ones(()))

    def forward(self, features: Tensor) -> Tensor:
        white, centres = features @ self.whitening, self.means @ self.whitening
        return torch.cdist(white, centres, compute_mode="donot_use_mm_for_euclid_dist").amin(1) / self.limit


@dataclass(frozen=True)
class Verdict:
    """What the judges say of a batch.

    ``probabilities (batch, 9)`` in the order of `LABELS`; finding ``masks (batch, findings, H, W)``; ``distances
    (batch,)`` from renders, where above 1 lies the furthest hundredth of held-out renders; ``anatomy (batch,
    factors)``, the regressed factors in units of their held-out error, so that the mean absolute difference of two
    rows is a drift in errors. For renders these can be checked against the truth; for generated images they are all
    that is known.
    """

    probabilities: Tensor
    masks: Tensor
    distances: Tensor
    anatomy: Tensor

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
    """The four judges together, from the bundle's tensors (`Bundle.judges`)."""

    def __init__(self, classifier: Classifier, segmenter: Segmenter, regressor: Regressor, distance: Distance):
        self.classifier, self.segmenter = classifier.eval(), segmenter.eval()
        self.regressor, self.distance = regressor.eval(), distance.eval()

    @property
    def factors(self) -> tuple[str, ...]:
        """Names of the columns of `Verdict.anatomy`."""
        return self.regressor.factors

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Verdict:
        """Judge images ``(batch, 3, H, W)`` in 0..1; masks come back at the images' size, thresholded at 0.5."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"judges want images of shape (batch, 3, height, width), got {tuple(images.shape)}")
        small = resize(images.float().clamp(0, 1))
        features = self.classifier.features(small)
        probabilities = self.classifier.head(features).softmax(1)
        soft = self.segmenter(small).sigmoid()
        masks = F.interpolate(soft, size=images.shape[-2:], mode="bilinear", align_corners=False) > 0.5
        return Verdict(probabilities, masks, self.distance(features), self.regressor.in_errors(small))


def resize(images: Tensor) -> Tensor:
    """Images ``(batch, 3, H, W)`` at the judges' 64x64 pixels, antialiased."""
    if images.shape[-2:] == (SIZE, SIZE):
        return images
    return F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
