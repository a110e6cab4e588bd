"""The panel of pairs: which tile stands where, what is left out, what is refused."""

import pytest
import torch

from medsteer_core.errors import MedSteerError
from medsteer_core.pictures.panel import pair_panel

GREY = torch.full((1, 3, 32, 32), 0.5)
CELL, LEFT, TOP, BOTTOM = 224, 24, 52, 216


def brighter(count=1):
    images = GREY.repeat(count, 1, 1, 1)
    images[:, :, 8:24, 8:24] += 0.2
    return images


def centre(column, row=0):
    return TOP + row * (CELL + 52) + CELL // 2, LEFT + column * (CELL + 8) + CELL // 2


def test_the_tiles_are_factual_counterfactual_difference_and_concept_map():
    concept = torch.zeros(1, 32, 32)
    concept[:, 8:24, 8:24] = 1.0
    panel = pair_panel(GREY, brighter(), concept)
    assert panel.shape == (3, TOP + CELL + BOTTOM, 968)
    torch.testing.assert_close(panel[(slice(None), *centre(0))], torch.full((3,), 0.5), atol=0.01, rtol=0)
    torch.testing.assert_close(panel[(slice(None), *centre(1))], torch.full((3,), 0.7), atol=0.01, rtol=0)
    red, _, blue = panel[(slice(None), *centre(2))]
    assert red - blue > 0.1  # orange: brighter in the counterfactual
    torch.testing.assert_close(panel[(slice(None), *centre(3))], torch.tensor([0.993, 0.906, 0.144]), atol=0.01, rtol=0)


def test_without_a_concept_map_there_are_three_tiles():
    assert pair_panel(GREY, brighter()).shape == (3, TOP + CELL + BOTTOM, 968)


def test_a_map_in_latent_pixels_or_of_one_image_fits_every_pair():
    small = torch.zeros(1, 4, 4)
    small[:, 1:3, 1:3] = 1.0
    large = small.repeat_interleave(8, 1).repeat_interleave(8, 2).expand(2, -1, -1)
    pair = GREY.expand(2, -1, -1, -1), brighter(2)
    assert torch.equal(pair_panel(*pair, small), pair_panel(*pair, large))


def test_of_many_pairs_the_first_four_are_drawn_and_the_rest_is_told():
    four, six = (pair_panel(GREY.expand(n, -1, -1, -1), brighter(n)) for n in (4, 6))
    assert four.shape == six.shape and torch.equal(four[:, :-40], six[:, :-40])
    assert four[:, -30:].min() > 0.99 and six[:, -30:].min() < 0.7


def test_several_strengths_and_maps_that_do_not_fit_are_refused():
    with pytest.raises(MedSteerError, match="1 factual images and 3 counterfactuals.*Strength Sweep"):
        pair_panel(GREY, brighter(3))
    with pytest.raises(MedSteerError, match=r"concept_map has shape \(3, 8, 8\)"):
        pair_panel(GREY, brighter(), torch.zeros(3, 8, 8))
