"""Regions of pictures: the lit field, margins, shares, overlaps."""

import pytest
import torch

from medsteer_core.endophantom.phantom import Anatomy, render
from medsteer_core.endophantom.walls import Canvas
from medsteer_core.scores.regions import dilated, lit_field, mean_where, overlap, share, share_of


def box(rows, columns, side=32):
    mask = torch.zeros(1, side, side, dtype=torch.bool)
    mask[:, slice(*rows), slice(*columns)] = True
    return mask


def test_the_lit_field_of_renders_is_the_scopes_field_of_view():
    anatomy = Anatomy.sample(4, seed=5)
    true = Canvas.of(anatomy, 64, 64).field_of_view() > 0.5
    found = lit_field(render(anatomy, "normal cecum", 64).image)
    assert ((found & true).sum() / (found | true).sum()) > 0.93
    # the field is never cut short, which would make masks look larger
    assert ((true & ~found).sum() / true.sum()) < 0.01


def test_a_dark_lumen_belongs_to_the_field():
    image = torch.full((1, 3, 32, 32), 0.5)
    image[:, :, 12:20, 12:20] = 0.0
    assert lit_field(image).all()


def test_an_image_without_light_is_all_field():
    assert lit_field(torch.zeros(2, 3, 32, 32)).all()


def test_single_bright_pixels_do_not_light_up_the_surround():
    image = torch.zeros(1, 3, 32, 32)
    image[:, :, 8:24, 8:24] = 0.5
    image[:, :, 1, 1] = image[:, :, 30, 30] = 0.6
    assert lit_field(image).sum() <= 20 * 20


def test_a_mask_grows_by_its_reach_each_way():
    assert torch.equal(dilated(box((10, 12), (10, 14)), 3), box((7, 15), (7, 17)))


def test_shares_are_of_the_picture_or_of_the_field():
    mask = box((0, 8), (0, 32))
    assert share(mask) == [0.25]
    assert share_of(mask, box((0, 16), (0, 32))) == [0.5]
    assert share_of(mask, box((16, 32), (0, 32))) == [0.0]


def test_overlap_is_intersection_over_union_and_none_of_nothing():
    first, nothing = box((0, 8), (0, 8)), box((0, 0), (0, 0))
    assert overlap(first, box((0, 8), (4, 12))) == [pytest.approx(1 / 3)]
    assert overlap(first, nothing) == [0.0]
    assert overlap(nothing, nothing) == [None]


def test_a_mean_over_no_pixel_is_none():
    values = torch.arange(9.0).view(3, 3)
    assert mean_where(values, values > 6) == 7.5
    assert mean_where(values, values > 9) is None
