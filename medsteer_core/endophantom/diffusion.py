"""The noise schedule that EndoPhantom is trained with, and a DDIM sampler for checks that need no ComfyUI."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TIMESTEPS = 1000


def alphas_cumprod() -> Tensor:
    """Cumulative signal share ``(1000,)`` of PixArt's schedule: betas linear from 1e-4 to 0.02."""
    betas = torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64)
    return torch.cumprod(1 - betas, dim=0).float()


def sample_timesteps(n: int, generator: torch.Generator) -> Tensor:
    """Training timesteps ``(n,)``: half uniform, half log-normal in sigma, where shapes are decided."""
    uniform = torch.randint(0, TIMESTEPS, (n,), generator=generator)
    sigmas = ((1 - alphas_cumprod()) / alphas_cumprod()).sqrt()
    wanted = torch.exp(torch.randn(n, generator=generator) * 1.2 + 0.2)
    lognormal = torch.searchsorted(sigmas, wanted).clamp(max=TIMESTEPS - 1)
    return torch.where(torch.rand(n, generator=generator) < 0.5, uniform, lognormal)


def noised_and_target(x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The model's input and its v-target (arXiv 2202.00512, section 4), both shaped as ``x0 (batch, C, H, W)``."""
    share = alphas_cumprod().to(x0.device)[t].view(-1, 1, 1, 1)
    signal, sigma = share.sqrt(), (1 - share).sqrt()
    return signal * x0 + sigma * noise, signal * noise - sigma * x0


@torch.no_grad()
def ddim(predict_v: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int = 20) -> Tensor:
    """Deterministic DDIM from pure noise. ``predict_v(x, t (batch,)) -> v``; returns x0."""
    shares = alphas_cumprod().to(noise.device)
    schedule = torch.linspace(TIMESTEPS - 1, 0, steps + 1)[:-1].round().long().tolist()
    x = noise
    for i, t in enumerate(schedule):
        share = shares[t]
        following = shares[schedule[i + 1]] if i + 1 < steps else torch.ones(())
        v = predict_v(x, torch.full((x.shape[0],), t, device=x.device))
        x0 = share.sqrt() * x - (1 - share).sqrt() * v
        eps = (1 - share).sqrt() * x + share.sqrt() * v
        x = following.sqrt() * x0 + (1 - following).sqrt() * eps
    return x
