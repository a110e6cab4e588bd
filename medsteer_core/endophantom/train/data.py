"""Step 1: fit the encoder, then render phantoms and keep their latents in shards."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from .. import phantom
from ..autoencoder import PatchAutoencoder
from .files import load, save_atomic

SIZE = 128
ENCODER_SEED, DATA_SEED = 11, 1_000_000
SHARD = 1024


def render_batch(n: int, seed: int, size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``n`` phantoms of random classes: images ``(n, 3, size, size)`` in 0..1, masks, class ids ``(n,)``."""
    labels = torch.randint(0, len(phantom.CLASSES), (n,), generator=torch.Generator().manual_seed(seed))
    anatomy = phantom.Anatomy.sample(n, seed)
    out = phantom.render(anatomy, [phantom.CLASSES[i] for i in labels], size, noise_seed=seed)
    return out.image, out.masks, labels


def fit_encoder(folder: Path, channels: int, images: int = 1024) -> PatchAutoencoder:
    """The run's encoder; fitted on ``images`` phantoms the first time."""
    path = folder / "encoder.pt"
    model = PatchAutoencoder(channels)
    if path.exists():
        model.load_state_dict(load(path)["model"])
        return model
    batches = [render_batch(64, ENCODER_SEED + i)[0] * 2 - 1 for i in range(images // 64)]
    share = model.fit_encoder(torch.cat(batches))
    save_atomic({"model": model.state_dict(), "variance_kept": share}, path)
    print(f"encoder: {channels} components keep {share:.5f} of the variance", flush=True)
    return model


@torch.no_grad()
def run(folder: Path, count: int, channels: int) -> None:
    """Render ``count`` phantoms into shards of latents; each phantom is kept with its mirror image. Resumable."""
    encoder = fit_encoder(folder, channels)
    for index in range((count + SHARD - 1) // SHARD):
        path = folder / f"latents_{index:04d}.pt"
        if path.exists():
            continue
        started, parts, classes = time.time(), [], []
        for chunk in range(SHARD // 64):
            image, _, labels = render_batch(64, DATA_SEED + index * SHARD + chunk * 64)
            both = torch.cat([image, image.flip(-1)]) * 2 - 1
            parts.append(encoder.encode(both).half())
            classes.append(labels.repeat(2))
        save_atomic({"latents": torch.cat(parts), "labels": torch.cat(classes).to(torch.uint8)}, path)
        print(f"shard {index}: {SHARD} phantoms in {time.time() - started:.1f} s", flush=True)
