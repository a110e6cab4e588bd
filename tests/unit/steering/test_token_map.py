"""Thresholds that a map chooses itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medsteer_core.errors import MedSteerError
from medsteer_core.steering.token_map import OWN_THRESHOLD, otsu_thresholds, threshold_mask, thresholds


@given(st.floats(0.05, 0.3), st.floats(0.7, 1.0), st.integers(1, 120))
def test_two_levels_are_parted_between_them(low, high, count):
    maps = torch.full((1, 11, 11), low)
    maps.view(-1)[:count] = high
    limit = float(otsu_thresholds(maps))
    assert low < limit <= high
    assert int(threshold_mask(maps, OWN_THRESHOLD, 0).sum()) == count


def test_every_map_has_its_own_threshold_and_equal_ones_the_same():
    maps = torch.stack([torch.linspace(0, 1, 64).reshape(8, 8) ** power for power in (1.0, 3.0)])
    one, other = thresholds(maps, OWN_THRESHOLD).tolist()
    assert one != other and thresholds(maps[:1], OWN_THRESHOLD).tolist() == [one]
    assert thresholds(maps, 0.25).tolist() == [0.25, 0.25]


def test_a_map_of_nothing_marks_nothing():
    assert not threshold_mask(torch.zeros(2, 4, 4), OWN_THRESHOLD, 1).any()


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_a_threshold_that_is_none_is_refused(value):
    with pytest.raises(MedSteerError, match="from 0"):
        thresholds(torch.zeros(1, 2, 2), value)
