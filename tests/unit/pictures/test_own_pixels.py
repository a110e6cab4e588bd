"""Real images on a model's canvas and edits back in their own pixels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsteer_core.errors import MedSteerError
from medsteer_core.pictures.own_pixels import as_rgb, canvas_for, checked_images, edited, soft_mask, without_ghosts


def test_an_image_of_the_models_size_is_its_own_canvas():
    canvas = canvas_for(128, 128, 8, 128, square=True)
    image = torch.rand(2, 3, 128, 128)
    assert canvas.is_own_size and torch.equal(canvas.put(image), image) and torch.equal(canvas.back(image), image)


@pytest.mark.parametrize(
    ("size", "options", "seen"),
    [
        ((1080, 1920), dict(side=128, square=True), (128, 128)),
        ((1080, 1920), dict(side=512), (384, 680)),  # as many pixels as 512 x 512, in whole latent pixels
        ((100, 130), dict(), (104, 136)),  # filled up
        ((64, 64), dict(), (64, 64)),
    ],
)
def test_the_canvas_has_whole_latent_pixels_and_as_many_as_the_model_was_made_for(size, options, seen):
    canvas = canvas_for(*size, 8, **options)
    shown = canvas.put(torch.rand(1, 3, *size))
    assert tuple(shown.shape[-2:]) == seen and tuple(canvas.back(shown).shape[-2:]) == size
    assert 0 <= float(shown.min()) and float(shown.max()) <= 1


def test_what_fills_up_is_the_images_edge_and_does_not_come_back():
    image = torch.rand(1, 3, 100, 130)
    canvas = canvas_for(100, 130, 8)
    shown = canvas.put(image)
    assert torch.equal(shown[..., :100, :130], image) and torch.equal(shown[..., 103, :130], image[..., 99, :])
    assert torch.equal(canvas.back(shown), image)


@given(st.integers(8, 300), st.integers(8, 300), st.sampled_from([None, 64, 128]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_size_comes_back_as_it_was(height, width, side, square):
    canvas = canvas_for(height, width, 8, side, square and side is not None)
    shown = canvas.put(torch.zeros(1, 1, height, width))
    assert shown.shape[-2] % 8 == shown.shape[-1] % 8 == 0
    assert canvas.back(shown).shape == (1, 1, height, width)


def test_an_image_smaller_than_a_latent_pixel_is_refused():
    with pytest.raises(MedSteerError, match="4 x 200 pixels; at least 8 x 8"):
        canvas_for(200, 4, 8)


def test_a_masks_edge_fades_outside_of_it_and_ends():
    mask = torch.zeros(1, 64, 64)
    mask[:, 24:40, 24:40] = 1
    soft = soft_mask(mask, 4)
    assert bool((soft[mask > 0] == 1).all()) and 0 < float(soft[0, 32, 43]) < 1
    assert float(soft[:, :, :16].sum() + soft[:, :, 48:].sum()) == 0
    assert torch.equal(soft_mask(torch.ones(1, 9, 9)), torch.ones(1, 9, 9))


def test_only_what_changes_leaves_the_images_bits():
    image = torch.rand(2, 3, 16, 16)
    difference = torch.zeros(2, 3, 16, 16)
    assert torch.equal(edited(image, difference), image)
    difference[:, :, :8] = 0.3
    share = torch.zeros(2, 16, 16)
    share[:, :4] = 1
    changed = edited(image, difference, share)
    assert torch.equal(changed[:, :, 4:], image[:, :, 4:])
    torch.testing.assert_close(changed[:, :, :4], (image[:, :, :4] + 0.3).clamp(0, 1))


def test_alpha_stays_and_grey_gets_the_mean_of_the_difference():
    difference = torch.stack([torch.full((8, 8), value) for value in (0.1, 0.2, 0.3)])[None]
    rgba = torch.full((1, 4, 8, 8), 0.5)
    torch.testing.assert_close(edited(rgba, difference)[0, :, 0, 0], torch.tensor([0.6, 0.7, 0.8, 0.5]))
    grey = edited(torch.full((1, 1, 8, 8), 0.5), difference)
    torch.testing.assert_close(grey, torch.full((1, 1, 8, 8), 0.7))
    assert as_rgb(grey).shape == as_rgb(rgba).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (torch.rand(8, 8, 3), "shape .8, 8, 3."),
        (torch.rand(1, 8, 8, 5), "1, 3 or 4 channels"),
        (torch.rand(0, 8, 8, 3), "image has shape"),
        (torch.full((1, 8, 8, 3), 255.0), "outside 0..1"),
        (torch.full((1, 8, 8, 3), torch.nan), "outside 0..1"),
    ],
)
def test_what_is_no_image_is_refused(image, told):
    with pytest.raises(MedSteerError, match=told):
        checked_images(image)


def test_fine_edges_that_the_autoencoder_missed_go_with_what_is_gone_and_stay_elsewhere():
    before = torch.full((1, 3, 48, 48), 0.5)
    image = before.clone()
    image[..., 20:28, 24] = 0.9  # a fine edge on the finding
    image[..., 20:28, 4] = 0.9  # and one far from it
    difference = torch.zeros(1, 3, 48, 48)
    difference[..., 16:32, 16:32] = -0.2
    plain, clean = edited(image, difference), edited(image, without_ghosts(difference, image, before))
    torch.testing.assert_close(plain[..., 24, 24], torch.full((1, 3), 0.7))
    torch.testing.assert_close(clean[..., 24, 24], torch.full((1, 3), 0.3))
    assert torch.equal(clean[..., :8], image[..., :8])
    nothing = torch.zeros_like(difference)
    assert torch.equal(without_ghosts(nothing, image, before), nothing)
