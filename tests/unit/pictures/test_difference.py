"""Drawn pairs: sizes, signs, scale. The colours are read back from the pictures."""

import io
import threading

import pytest
import torch

from medsteer_core.errors import MedSteerError
from medsteer_core.pictures.difference import contact_sheet, difference_image, luminance_difference, pair_strip, png

GREY = torch.full((3, 64, 64), 0.5)
ORANGE, PURPLE, NEUTRAL = (1, 0, -1)


def stepped(levels):
    """Grey, with its middle square brighter by 8-bit levels."""
    image = GREY.clone()
    image[:, 16:48, 16:48] += levels / 255
    return image


def hue(picture, row, column):
    """Which side of the colour map a pixel has: more red than blue is orange."""
    red, _, blue = picture[:, row, column].tolist()
    return ORANGE if red - blue > 0.1 else PURPLE if blue - red > 0.1 else NEUTRAL


def test_luminance_weighs_the_channels_as_the_eye_does():
    factual = torch.zeros(4, 3, 11, 11)
    counterfactual = factual.clone()
    for channel in range(3):
        counterfactual[channel, channel] = 1.0
    counterfactual[3] = 1.0
    means = luminance_difference(factual, counterfactual).mean((1, 2))
    torch.testing.assert_close(means, 255 * torch.tensor([0.2126, 0.7152, 0.0722, 1.0]))


def test_one_pair_is_a_picture_512_pixels_tall():
    picture = difference_image(GREY, stepped(40))
    assert picture.shape == (3, 512, 448)
    assert picture.dtype == torch.float32
    assert 0 <= picture.min() and picture.max() <= 1


def test_brighter_is_orange_and_darker_is_purple():
    centre = (12 + 212, 12 + 212)
    assert hue(difference_image(GREY, stepped(+40)), *centre) == ORANGE
    assert hue(difference_image(GREY, stepped(-40)), *centre) == PURPLE
    assert hue(difference_image(GREY, stepped(+40)), 40, 40) == NEUTRAL


def test_the_legend_stands_below_in_the_same_colours():
    picture = difference_image(GREY, stepped(40))
    bar = 436 + 36
    assert hue(picture, bar, 60) == PURPLE
    assert hue(picture, bar, 448 - 60) == ORANGE
    assert hue(picture, bar, 224) == NEUTRAL


def test_noise_is_not_blown_up():
    noise = GREY + torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0)) / 255
    field = difference_image(GREY, noise)[:, 20:430, 20:430]
    assert (field[0] - field[2]).abs().mean() < 0.05


def test_the_scale_grows_with_the_difference():
    small, large = difference_image(GREY, stepped(16)), difference_image(GREY, stepped(100))
    # both fill their own scale, so that the same colour stands for 16 levels in one and for 100 in the other
    torch.testing.assert_close(small[:, 224, 224], large[:, 224, 224], atol=0.1, rtol=0)
    both = difference_image(torch.stack([GREY, GREY]), torch.stack([stepped(16), stepped(100)]))
    paler, deeper = both[:, 224, 224], both[:, 224, 224 + 432]
    assert paler.mean() > deeper.mean() + 0.2


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_a_batch_is_a_grid_of_at_most_four_columns(count):
    picture = difference_image(GREY.expand(count, -1, -1, -1), stepped(40).expand(count, -1, -1, -1))
    columns, rows = min(count, 4), -(-count // 4)
    side = 424 if rows == 1 else 300
    assert picture.shape[1] == 12 + rows * side + (rows - 1) * 8 + 76
    assert picture.shape[2] == max(448, 24 + columns * side + (columns - 1) * 8)


def test_no_more_than_eight_pairs_are_drawn():
    a, b = GREY.expand(11, -1, -1, -1), stepped(40).expand(11, -1, -1, -1)
    assert torch.equal(difference_image(a, b), difference_image(a[:8], b[:8]))


@pytest.mark.parametrize("size", [(11, 11), (64, 256), (300, 40), (200, 333)])
def test_any_size_is_drawn_in_its_own_shape_with_room_for_the_legend(size):
    image = torch.full((3, *size), 0.5)
    picture = difference_image(image, image.flip(0))
    assert picture.shape[1] <= 512
    assert picture.shape[2] >= 448
    assert pair_strip(image, image).shape[2] >= 900


def test_equal_images_say_so():
    words = difference_image(GREY, GREY)[:, 200:250, 100:350]
    assert words.min() < 0.6
    assert difference_image(GREY, stepped(40))[:, 30:60, 100:350].min() > 0.9


def test_a_strip_shows_factual_then_counterfactual_then_difference():
    strip = pair_strip(GREY, stepped(60), ("before", "after", "change"))
    assert strip.shape == (3, 512, 24 + 3 * 392 + 16)
    row, first, step = 44 + 196, 12 + 196, 400
    torch.testing.assert_close(strip[:, row, first], torch.full((3,), 0.5), atol=0.01, rtol=0)
    torch.testing.assert_close(strip[:, row, first + step], torch.full((3,), 0.5 + 60 / 255), atol=0.01, rtol=0)
    assert hue(strip, row, first + 2 * step) == ORANGE


def test_a_strip_has_a_row_for_each_pair():
    pairs = GREY.expand(3, -1, -1, -1)
    assert pair_strip(pairs, pairs).shape == (3, 44 + 3 * 300 + 16 + 76, 24 + 900 + 16)


def test_a_strip_wants_three_captions():
    with pytest.raises(MedSteerError, match="got 2 captions; three"):
        pair_strip(GREY, GREY, ("a", "b"))


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(MedSteerError, match="equal shapes were expected"):
        difference_image(GREY, GREY[:, :32])
    with pytest.raises(
        MedSteerError, match="1 factual images and 3 counterfactuals; one for each was expected. Set st"
    ):
        difference_image(GREY.expand(1, -1, -1, -1), GREY.expand(3, -1, -1, -1))
    with pytest.raises(MedSteerError, match="not finite"):
        difference_image(GREY, GREY * float("nan"))


def test_a_contact_sheet_has_a_labelled_row_for_each_set():
    dark, light = torch.full((4, 3, 32, 32), 0.2), torch.full((4, 3, 32, 32), 0.8)
    sheet = contact_sheet({"dark": dark, "light": light}, cell_height=100)
    left = 30 + 12 * len("light")
    assert sheet.shape == (3, 24 + 2 * 100 + 8, left + 4 * 100 + 3 * 8 + 12)
    for row, level in ((62, 0.2), (170, 0.8)):
        for column in range(4):
            shown = sheet[:, row, left + 108 * column + 50]
            torch.testing.assert_close(shown, torch.full((3,), level), atol=0.01, rtol=0)
    assert sheet[:, 40:84, :left].min() < 0.5


def test_a_contact_sheet_wants_one_shape():
    with pytest.raises(MedSteerError, match="one shape"):
        contact_sheet({"a": GREY[None], "b": GREY.expand(2, -1, -1, -1)})
    with pytest.raises(MedSteerError, match="one shape"):
        contact_sheet({})


def test_a_png_holds_the_picture_to_half_a_level():
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    picture = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
    read = pil_to_tensor(Image.open(io.BytesIO(png(picture)))).float() / 255
    assert (read - picture).abs().max() <= 0.5 / 255 + 1e-6


def test_drawing_leaves_no_global_figure_and_works_in_a_thread():
    drawn = []
    thread = threading.Thread(target=lambda: drawn.append(difference_image(GREY, stepped(40))))
    thread.start()
    thread.join()
    assert torch.equal(drawn[0], difference_image(GREY, stepped(40)))
    from matplotlib._pylab_helpers import Gcf

    assert Gcf.get_all_fig_managers() == []
