"""Step 4, second part: train the regressor of the anatomy on renders of all classes. Never on generated images."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import phantom
from ..anatomy import Anatomy
from ..judges import FACTORS, Regressor, resize
from ..phantom import CLASSES
from .augment import blur, jpeg
from .data import SIZE as SIDE
from .files import load, save_atomic

POOL_SEED, ERROR_SEED = 8_500_000, 8_900_000
RATE = 2e-3
KEPT_ABOVE = 0.5  # share of a factor's variance (R^2) below which its regression is left out of the verdict

# A factor must not read differently for the finding that lies on the wall: two renders of one scene should agree.
AGREEMENT = 2.0
ORGANS = (
    ("normal cecum", "polyps", "dyed lifted polyps", "dyed resection margins", "ulcerative colitis"),
    ("normal z-line", "esophagitis"),
    ("normal pylorus",),
)

# a mirror turns these factors' sign; the roll becomes pi - roll, so that the sine of its triple stays
_TURNED = ("lumen_centre_x", "light_x", "roll_cos3")


def targets(anatomy: Anatomy) -> Tensor:
    """The factors `FACTORS` of each scene, ``(n, factors)``, in their own units."""
    factors = anatomy.factors()
    # the folds' triangle is all that the roll turns about, and it looks the same after a third of a turn
    factors["roll_sin3"], factors["roll_cos3"] = (3 * factors["roll"]).sin(), (3 * factors["roll"]).cos()
    return torch.stack([factors[name] for name in FACTORS], 1)


def pool(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """``n`` scenes, each as two random classes of one organ, at the judges' size: uint8 images ``(n, 2, 3, 64, 64)``
    and their factors ``(n, factors)``."""
    images, factors = [], []
    for i in range(0, n, 64):
        anatomy, draw = Anatomy.sample(64, seed + i), torch.Generator().manual_seed(seed + i)
        first = torch.randint(0, len(CLASSES), (64,), generator=draw).tolist()
        organs = [next(organ for organ in ORGANS if CLASSES[label] in organ) for label in first]
        picks = torch.rand(64, generator=draw).tolist()
        names = [[CLASSES[label] for label in first], [o[int(u * len(o))] for o, u in zip(organs, picks, strict=True)]]
        both = [resize(phantom.render(anatomy, each, SIDE, seed + i + j).image) for j, each in enumerate(names)]
        images.append((torch.stack(both, 1) * 255).round().byte())
        factors.append(targets(anatomy))
    return torch.cat(images), torch.cat(factors)


def spoil(images: Tensor, draw: torch.Generator) -> Tensor:
    """Blur, noise and JPEG, each in part of the batch: colour and brightness are factors, so they stay."""
    images = images.clone()
    groups = torch.randperm(len(images), generator=draw).chunk(6)
    for group in groups[:3]:
        images[group] = blur(images[group], float(torch.rand(1, generator=draw)) * 0.8 + 0.2)
    noisy = 0.03 * torch.rand(len(images), 1, 1, 1, generator=draw)
    images = (images + noisy * torch.randn(images.shape, generator=draw)).clamp(0, 1)
    images[groups[-1]] = jpeg(images[groups[-1]], draw)
    return images


def run(folder: Path, steps: int, batch: int = 32, scenes: int = 12_288, measured: int = 2048, seed: int = 7) -> None:
    """Train to ``steps`` with a checkpoint every 250; a rerun resumes. ``measured`` held-out scenes give errors."""
    torch.manual_seed(seed)
    model = Regressor().to(memory_format=torch.channels_last)
    optim = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.02)
    path, first = folder / "regressor.pt", 0
    if path.exists():
        state = load(path)
        model.load_state_dict(state["model"])
        optim.load_state_dict(state["optimizer"])
        first = state["step"]
    if first >= steps:
        return
    images, factors = pool(scenes, POOL_SEED)
    model.mean.copy_(factors.mean(0))
    model.spread.copy_(factors.std(0))
    draw, started = torch.Generator().manual_seed(seed + first), time.time()
    for step in range(first, steps):
        for group in optim.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50) * max(0.02, 1 - step / steps)
        rows = torch.randint(0, len(images), (batch,), generator=draw)
        image, factor = images[rows].flatten(0, 1).float() / 255, factors[rows].repeat_interleave(2, 0)
        if step % 2:
            image, factor = image.flip(-1), mirrored(factor)
        image, wanted = spoil(image, draw), (factor - model.mean) / model.spread
        with torch.autocast("cpu", dtype=torch.bfloat16):
            maps = model.maps(image)
        guess = model.head(maps.float().flatten(1))
        loss = F.mse_loss(guess, wanted) + AGREEMENT * F.mse_loss(guess[::2], guess[1::2])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        optim.zero_grad(set_to_none=True)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            if step + 1 == steps:
                images, factors = pool(measured, ERROR_SEED)
                measure(model, images[:, 0], factors)
            save_atomic({"step": step + 1, "model": model.state_dict(), "optimizer": optim.state_dict()}, path)
            pace = (time.time() - started) / (step + 1 - first)
            print(f"regressor step {step + 1}/{steps} loss {loss.item():.3f} {pace:.2f} s/step", flush=True)


def mirrored(factors: Tensor) -> Tensor:
    """The factors ``(n, factors)`` of the scenes seen in a mirror."""
    return factors * torch.tensor([-1.0 if name in _TURNED else 1.0 for name in FACTORS])


@torch.no_grad()
def measure(model: Regressor, images: Tensor, factors: Tensor) -> Tensor:
    """Store each factor's error (RMSE, its own units) on held-out renders, and which are regressed well enough.

    ``images (n, 3, 64, 64)`` uint8, ``factors (n, factors)``. Returns the R^2 of each factor, ``(factors,)``.
    """
    guesses = torch.cat([model(part.float() / 255) for part in images.split(256)])
    error, explained = accuracy(guesses, factors)
    model.error.copy_(error)
    model.kept.copy_(explained >= KEPT_ABOVE)
    return explained


def accuracy(guesses: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """RMSE and R^2 of each factor, ``(factors,)`` both, for guesses and truth ``(n, factors)``."""
    squared = (guesses - factors).square().mean(0)
    return squared.sqrt(), 1 - squared / factors.var(0, correction=0)
