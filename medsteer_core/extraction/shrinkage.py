"""A covariance from few samples of many channels, shrunk so that it can be inverted."""

import torch
from torch import Tensor

# The least shrinkage: what keeps the inverse finite when fewer samples than channels ask for none.
LEAST = 1e-6


def shrinkage(centred: Tensor) -> float:
    """How much of the covariance of `centred` (n, C) to replace by a multiple of the identity: LEAST to 1.

    The share that asymptotically least errs (Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional
    covariance matrices", section 3), from the samples' inner products alone, so that many channels cost little. 1 for
    samples that don't vary.
    """
    return _share(centred, _products(centred))


def _products(centred: Tensor) -> Tensor:
    """(n, n) inner products of the samples, or (C, C) of the channels, whichever is smaller."""
    return centred @ centred.mT if centred.shape[0] < centred.shape[1] else centred.mT @ centred


def _share(centred: Tensor, products: Tensor) -> float:
    rows, channels = centred.shape
    # |S|^2 and tr S of S = X'X/n; both products have the same non-zero eigenvalues.
    squared = float(products.square().sum()) / rows**2
    mean = float(products.diagonal().sum()) / rows / channels
    far = squared - channels * mean**2  # |S - mean I|^2
    if not far > 1e-12 * squared:
        return 1.0
    lengths = centred.square().sum(dim=1)
    noise = (float(lengths.square().sum()) / rows - squared) / rows
    return min(1.0, max(LEAST, noise / far))


def inverse_times(centred: Tensor, vector: Tensor, shrunk: float | None = None) -> Tensor:
    """The shrunk covariance's inverse times `vector` (C,), up to a positive factor; `centred` is (n, C), float64.

    `shrunk` is the share to replace, None for `shrinkage(centred)`. With fewer samples than channels an n x n system is
    solved instead of a C x C one (Woodbury's identity).
    """
    rows, channels = centred.shape
    products = _products(centred)
    shrunk = _share(centred, products) if shrunk is None else shrunk
    total = products.diagonal().sum()
    if shrunk >= 1 or total == 0:
        return vector
    # (1 - shrunk) X'X/n + shrunk * mean * I, times n / (1 - shrunk).
    ridge = shrunk / (1 - shrunk) * total / channels
    if rows < channels:
        inner = products + ridge * torch.eye(rows, dtype=centred.dtype)
        return vector - centred.mT @ torch.linalg.solve(inner, centred @ vector)
    return torch.linalg.solve(products + ridge * torch.eye(channels, dtype=centred.dtype), vector)
