"""The linear encoder keeps what it says it keeps, and the decoder joins patches."""

import torch

from medsteer_core.endophantom.autoencoder import PatchAutoencoder


def low_rank_images(n: int, rank: int) -> torch.Tensor:
    """Images whose 8x8 patches are mixtures of ``rank`` fixed patterns."""
    draw = torch.Generator().manual_seed(0)
    patterns = torch.randn(rank, 3 * 64, generator=draw)
    patches = torch.randn(n, 16, rank, generator=draw) @ patterns
    return torch.nn.functional.fold(patches.transpose(1, 2), (32, 32), 8, stride=8)


def test_patches_of_rank_r_survive_r_components_exactly():
    images = low_rank_images(40, 4)
    model = PatchAutoencoder(channels=4, width=16, depth=1)
    kept = model.fit_encoder(images)
    assert kept > 0.999999
    with torch.no_grad():
        assert torch.allclose(model.decode(model.encode(images)), images, atol=1e-3)


def test_latents_have_unit_mean_square_and_zero_mean():
    images = low_rank_images(40, 6) + 3.0
    model = PatchAutoencoder(channels=6, width=16, depth=1)
    model.fit_encoder(images)
    with torch.no_grad():
        latents = model.encode(images)
    assert latents.shape == (40, 6, 4, 4)
    assert abs(float(latents.square().mean()) - 1) < 1e-3
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3


def test_components_come_in_falling_variance():
    images = low_rank_images(60, 8)
    model = PatchAutoencoder(channels=5, width=16, depth=1)
    share = model.fit_encoder(images)
    with torch.no_grad():
        variances = model.encode(images).var((0, 2, 3))
    assert 0.3 < share < 1.0
    assert (variances.diff() <= 0).all()
