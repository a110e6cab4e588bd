"""Step 3: train the autoencoder's decoder on renders. The encoder is fixed, so this never invalidates the generator."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..autoencoder import TinyAutoencoder
from .data import load_encoder, render_batch
from .files import load, save_atomic

POOL_SEED, HELD_OUT_SEED = 5_000_000, 6_000_000
RATE = 1e-3


def edges(image: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, horizontally and vertically."""
    return image[..., :, 1:] - image[..., :, :-1], image[..., 1:, :] - image[..., :-1, :]


def reconstruction_loss(out: Tensor, image: Tensor) -> Tensor:
    """Absolute error of pixels and of their differences: the second keeps rims and highlights sharp."""
    pixel = (out - image).abs().mean()
    return pixel + sum((a - b).abs().mean() for a, b in zip(edges(out), edges(image), strict=True))


def run(folder: Path, steps: int, batch: int = 8, pool: int = 4096, seed: int = 3) -> None:
    """Train to ``steps`` with a checkpoint every 250; a rerun resumes. Prints the held-out PSNR."""
    torch.manual_seed(seed)
    model = load_encoder(folder).to(memory_format=torch.channels_last)
    optim = torch.optim.AdamW(model.taesd_decoder.parameters(), lr=RATE, weight_decay=0.0)
    path, first = folder / "decoder.pt", 0
    if path.exists():
        state = load(path)
        model.load_state_dict(state["model"])
        optim.load_state_dict(state["optimizer"])
        first = state["step"]
    images = torch.cat([(render_batch(64, POOL_SEED + i)[0] * 255).round().byte() for i in range(pool // 64)])
    draw, started = torch.Generator().manual_seed(seed + first), time.time()
    for step in range(first, steps):
        for group in optim.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 100) * max(0.01, 1 - step / steps)
        rows = torch.randint(0, len(images), (batch,), generator=draw)
        image = images[rows].float() / 127.5 - 1
        if step % 2:
            image = image.flip(-1)
        with torch.no_grad():
            latents = model.encode(image)
            latents = latents + 0.03 * torch.randn(latents.shape, generator=draw)  # the generator's are not exact
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model.decode(latents)
        loss = reconstruction_loss(out.float(), image)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.taesd_decoder.parameters(), 1.0)
        optim.step()
        optim.zero_grad(set_to_none=True)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_atomic({"step": step + 1, "model": model.state_dict(), "optimizer": optim.state_dict()}, path)
            pace = (time.time() - started) / (step + 1 - first)
            print(
                f"decoder step {step + 1}/{steps} loss {loss.item():.4f} psnr {psnr(model):.2f} dB {pace:.2f} s/step",
                flush=True,
            )


@torch.no_grad()
def psnr(model: TinyAutoencoder, n: int = 64) -> float:
    """PSNR in dB of held-out renders passed through the autoencoder."""
    image = render_batch(n, HELD_OUT_SEED)[0]
    out = (model.decode(model.encode(image * 2 - 1)) + 1) / 2
    return float(-10 * F.mse_loss(out.clamp(0, 1), image).log10())


def load_trained(folder: Path) -> TinyAutoencoder:
    """The autoencoder of a run's last checkpoint, or with an untrained decoder when there is none yet."""
    model = load_encoder(folder)
    path = folder / "decoder.pt"
    if path.exists():
        model.load_state_dict(load(path)["model"])
    return model.eval()
