"""The encoder keeps what it says it keeps, through TAESD's layers, and is exact."""

import pytest
import torch
from torch.nn import functional as F

from medsteer_core.endophantom.autoencoder import TinyAutoencoder, principal_components


def low_rank_images(n: int, rank: int) -> torch.Tensor:
    """Images in -1..1 whose 8x8 patches are mixtures of ``rank`` fixed patterns."""
    draw = torch.Generator().manual_seed(0)
    patterns = torch.randn(rank, 3 * 64, generator=draw)
    patches = torch.randn(n, 16, rank, generator=draw) @ patterns
    images = F.fold(patches.transpose(1, 2), (32, 32), 8, stride=8)
    return images / images.abs().max()


def fitted(images: torch.Tensor, channels: int) -> tuple[TinyAutoencoder, float]:
    weight, bias, share = principal_components(images, channels)
    model = TinyAutoencoder(channels)
    model.set_encoder(weight, bias)
    return model, share


def test_patches_of_rank_r_survive_r_components():
    images = low_rank_images(40, 4)
    weight, bias, share = principal_components(images, 4)
    assert share > 0.999999
    latents = F.conv2d(images, weight, bias, stride=8)
    # the components are orthogonal, so their transpose, scaled, is the inverse
    scale = weight.flatten(1).square().sum(1).view(4, 1, 1, 1)
    mean = images.unfold(2, 8, 8).unfold(3, 8, 8).mean((0, 2, 3))
    back = F.conv_transpose2d(latents, weight / scale, stride=8) + mean.repeat(1, 4, 4)
    torch.testing.assert_close(back, images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 16, 31])
def test_taesds_layers_compute_the_linear_map_exactly(channels):
    """Signed weights, signed biases, colours and all 64 pixels of a patch told apart, on sizes that are not square."""
    draw = torch.Generator().manual_seed(channels)
    weight = torch.randn(channels, 3, 8, 8, generator=draw) / 14
    bias = torch.randn(channels, generator=draw)
    model = TinyAutoencoder(channels)
    model.set_encoder(weight, bias)
    images = torch.rand(2, 3, 40, 24, generator=draw) * 2 - 1
    with torch.no_grad():
        latents = model.encode(images)
    torch.testing.assert_close(latents, F.conv2d(images, weight, bias, stride=8), rtol=0, atol=1e-5)


def test_latents_have_unit_mean_square_and_zero_mean():
    images = low_rank_images(40, 6) * 0.8 + 0.2
    model, _ = fitted(images, 6)
    with torch.no_grad():
        latents = model.encode(images)
    assert latents.shape == (40, 6, 4, 4)
    assert abs(float(latents.square().mean()) - 1) < 1e-3
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3


def test_components_come_in_falling_variance():
    images = low_rank_images(60, 8)
    model, share = fitted(images, 5)
    with torch.no_grad():
        variances = model.encode(images).var((0, 2, 3))
    assert 0.3 < share < 1.0
    assert (variances.diff() <= 0).all()


def test_decoding_gives_eight_pixels_for_one_latent():
    model = TinyAutoencoder(4)
    with torch.no_grad():
        assert model.decode(torch.zeros(2, 4, 3, 5)).shape == (2, 3, 24, 40)


def test_more_channels_than_the_layers_have_room_for_are_refused():
    with pytest.raises(ValueError, match="room for 31"):
        TinyAutoencoder(32)
