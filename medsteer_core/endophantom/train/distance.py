"""Step 4, third part: fit the distance of the classifier's features to renders. Never on generated images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..judges import Classifier, Distance, resize
from ..phantom import CLASSES
from .data import render_batch
from .files import save_atomic

FIT_SEED, LIMIT_SEED = 8_600_000, 8_700_000
QUANTILE = 0.99


@torch.no_grad()
def fit(features: Tensor, labels: Tensor) -> Distance:
    """The distance to the classes' means under their shared covariance; its limit is still 1.

    ``features (n, features)`` of renders and class ids ``labels (n,)``. The features are brought to unit variance
    within the classes and their covariance is shrunk towards the identity by Ledoit and Wolf's (2004) estimate of the
    best amount. ValueError for a class with fewer than two renders.
    """
    features, counts = features.double(), labels.bincount(minlength=len(CLASSES))
    if counts.min() < 2:
        raise ValueError(f"a distance needs two renders of each class or more, got {counts.tolist()}")
    means = torch.stack([features[labels == i].mean(0) for i in range(len(CLASSES))])
    within = features - means[labels]
    scale = within.square().mean(0).sqrt().clamp_min(1e-6)
    within = within / scale
    n, width = within.shape
    covariance = within.T @ within / n
    off_target = (covariance - torch.eye(width).double()).square().sum()
    error = (within.square().sum(1).square().mean() - covariance.square().sum()) / n
    shrinkage = float((error / off_target).clamp(0, 1))
    variances, vectors = torch.linalg.eigh((1 - shrinkage) * covariance + shrinkage * torch.eye(width).double())
    out = Distance(width)
    out.means.copy_(means)
    out.whitening.copy_(vectors / variances.sqrt() / scale[:, None])
    return out


@torch.no_grad()
def set_limit(distance: Distance, features: Tensor) -> None:
    """Make 1 the 99th percentile of the distances of held-out renders' ``features (n, features)``."""
    distance.limit.fill_(1.0)
    distance.limit.copy_(distance(features).quantile(QUANTILE))


@torch.no_grad()
def pool(classifier: Classifier, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features ``(n, features)`` and class ids ``(n,)`` of ``n`` renders."""
    features, labels = [], []
    for i in range(0, n, 64):
        image, _, label = render_batch(64, seed + i)
        features.append(classifier.features(resize(image)))
        labels.append(label)
    return torch.cat(features), torch.cat(labels)


def run(folder: Path, classifier: Classifier, renders: int = 4096) -> None:
    """Fit the distance for ``classifier`` on ``renders`` renders and set its limit on as many others."""
    path = folder / "distance.pt"
    if path.exists():
        return
    distance = fit(*pool(classifier, renders, FIT_SEED))
    set_limit(distance, pool(classifier, renders, LIMIT_SEED)[0])
    save_atomic({"renders": renders, "model": distance.state_dict()}, path)
    print(f"distance: fitted on {renders} renders, limit {float(distance.limit):.2f} standard deviations", flush=True)
