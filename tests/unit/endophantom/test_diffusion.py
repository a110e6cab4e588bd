"""The noise schedule and the sampler of the training checks."""

import math

import torch

from medsteer_core.endophantom import diffusion


def test_the_schedule_is_pixarts():
    shares = diffusion.alphas_cumprod()
    assert shares.shape == (1000,)
    assert math.isclose(float(shares[0]), 1 - 1e-4, rel_tol=1e-6)
    assert math.isclose(float(shares[-1]), 4.0358e-5, rel_tol=1e-3)


def test_v_target_gives_back_image_and_noise():
    draw = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(4, 2, 3, 3, generator=draw), torch.randn(4, 2, 3, 3, generator=draw)
    t = torch.tensor([0, 250, 700, 999])
    x, v = diffusion.noised_and_target(x0, noise, t)
    share = diffusion.alphas_cumprod()[t].view(-1, 1, 1, 1)
    assert torch.allclose(share.sqrt() * x - (1 - share).sqrt() * v, x0, atol=1e-5)
    assert torch.allclose((1 - share).sqrt() * x + share.sqrt() * v, noise, atol=1e-5)


def test_ddim_with_a_perfect_model_returns_the_image():
    draw = torch.Generator().manual_seed(2)
    x0, noise = torch.randn(2, 1, 4, 4, generator=draw), torch.randn(2, 1, 4, 4, generator=draw)
    shares = diffusion.alphas_cumprod()

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        share = shares[t].view(-1, 1, 1, 1)
        eps = (x - share.sqrt() * x0) / (1 - share).sqrt()
        return share.sqrt() * eps - (1 - share).sqrt() * x0

    assert torch.allclose(diffusion.ddim(predict, noise, steps=10), x0, atol=1e-4)


def test_timesteps_are_in_range_and_reproducible():
    first = diffusion.sample_timesteps(2000, torch.Generator().manual_seed(3))
    again = diffusion.sample_timesteps(2000, torch.Generator().manual_seed(3))
    assert torch.equal(first, again)
    assert 0 <= int(first.min()) and int(first.max()) <= 999
    assert (first > 900).any() and (first < 100).any()
