"""Step 1: fit the encoder, then render phantoms and keep their latents in shards."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import phantom
from ..anatomy import scene_seeds, uniform_draws
from ..autoencoder import PATCH, TinyAutoencoder, principal_components
from ..confounding import auroc_by_class, lean
from .files import load, save_atomic

SIZE = 128
ENCODER_SEED, DATA_SEED = 11, 1_000_000
SHARD = 1024


def render_batch(n: int, seed: int, size: int = SIZE, confounding: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """``n`` phantoms of random classes: images ``(n, 3, size, size)`` in 0..1, masks, class ids ``(n,)``.

    With ``confounding`` above 0 their anatomy leans with the class.
    """
    labels = torch.randint(0, len(phantom.CLASSES), (n,), generator=torch.Generator().manual_seed(seed))
    anatomy = phantom.Anatomy.sample(n, seed, labels, confounding)
    out = phantom.render(anatomy, [phantom.CLASSES[i] for i in labels], size, noise_seed=seed)
    return out.image, out.masks, labels


def components(folder: Path, channels: int = 16, images: int = 1024) -> tuple[Tensor, Tensor]:
    """Weight and bias of the run's linear encoder; fitted on ``images`` phantoms the first time."""
    path = folder / "encoder.pt"
    if not path.exists():
        batches = [render_batch(64, ENCODER_SEED + i)[0] * 2 - 1 for i in range(images // 64)]
        weight, bias, share = principal_components(torch.cat(batches), channels)
        save_atomic({"weight": weight, "bias": bias, "variance_kept": share}, path)
        print(f"encoder: {channels} components keep {share:.5f} of the variance", flush=True)
    saved = load(path)
    return saved["weight"], saved["bias"]


def load_encoder(folder: Path) -> TinyAutoencoder:
    """The run's autoencoder with an untrained decoder."""
    weight, bias = components(folder)
    model = TinyAutoencoder(len(bias))
    model.set_encoder(weight, bias)
    return model


@torch.no_grad()
def run(folder: Path, count: int, channels: int, confounding: float = 0.0) -> None:
    """Render ``count`` phantoms into shards of latents. Resumable.

    Mirror images are no further data here: they would undo the lean of what lies left or right.
    """
    weight, bias = components(folder, channels)  # the encoder's map, without the layers that it takes to compute it
    for index in range((count + SHARD - 1) // SHARD):
        path = folder / f"latents_{index:04d}.pt"
        if path.exists():
            continue
        started, parts, classes = time.time(), [], []
        for chunk in range(SHARD // 64):
            image, _, labels = render_batch(64, DATA_SEED + index * SHARD + chunk * 64, confounding=confounding)
            parts.append(F.conv2d(image * 2 - 1, weight, bias, stride=PATCH).half())
            classes.append(labels)
        shard = {"latents": torch.cat(parts), "labels": torch.cat(classes).to(torch.uint8), "confounding": confounding}
        save_atomic(shard, path)
        print(f"shard {index}: {SHARD} phantoms in {time.time() - started:.1f} s", flush=True)


def print_confounding(confounding: float, n: int = 20_000) -> Tensor:
    """Print how well the anatomy of training phantoms tells their class (AUROC, one against the rest); ``(8,)``."""
    labels = torch.randint(0, len(phantom.CLASSES), (n,), generator=torch.Generator().manual_seed(DATA_SEED))
    draws = lean(uniform_draws(scene_seeds(n, DATA_SEED)), labels, confounding)
    areas = auroc_by_class(draws, labels, confounding)
    for name, area in zip(phantom.CLASSES, areas.tolist(), strict=True):
        print(f"  {name}: {area:.3f}")
    print(f"confounding {confounding}: anatomy tells the class with AUROC {float(areas.mean()):.3f} (mean)")
    return areas
