import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medsteer_core.errors import MedSteerError
from medsteer_core.vectors.schedule import SigmaWindow, check_percent, interpolate_index

SIGMAS = [16.0, 4.0, 1.0, 0.25]


def test_halfway_in_log_sigma_is_weight_one_half():
    assert interpolate_index(SIGMAS, 8.0) == (0, 1, pytest.approx(0.5))
    assert interpolate_index(SIGMAS, 0.5) == (2, 3, pytest.approx(0.5))


def test_flow_models_interpolate_sigma_itself():
    assert interpolate_index([1.0, 0.6, 0.2], 0.9, flow=True) == (0, 1, pytest.approx(0.25))


@given(st.floats(0.25, 16.0))
def test_the_weights_rebuild_log_sigma(sigma):
    lo, hi, weight = interpolate_index(SIGMAS, sigma)
    assert 0 <= hi - lo <= 1
    rebuilt = (1 - weight) * math.log(SIGMAS[lo]) + weight * math.log(SIGMAS[hi])
    assert rebuilt == pytest.approx(math.log(sigma), abs=1e-9)


@pytest.mark.parametrize("flow", [False, True])
def test_a_recorded_sigma_has_weight_zero_at_its_own_step(flow):
    assert [interpolate_index(SIGMAS, sigma, flow) for sigma in SIGMAS] == [(i, i, 0.0) for i in range(4)]


def test_a_float32_tensor_of_sigmas_is_hit_exactly_by_its_own_values():
    sigmas = torch.tensor([14.614641, 0.7, 0.0291675])
    assert interpolate_index(sigmas, sigmas[1].item()) == (1, 1, 0.0)


def test_beyond_the_ends_the_end_stands():
    assert interpolate_index(SIGMAS, 100.0) == (0, 0, 0.0)
    assert interpolate_index(SIGMAS, 0.01) == (3, 3, 0.0)
    assert interpolate_index([2.0], 1.0) == (0, 0, 0.0)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_a_sigma_that_is_not_positive_and_finite_is_an_error(sigma):
    with pytest.raises(MedSteerError, match="positive finite"):
        interpolate_index(SIGMAS, sigma)


def test_no_recorded_sigmas_is_an_error():
    with pytest.raises(MedSteerError, match="at least one"):
        interpolate_index([], 1.0)


def test_a_window_holds_its_start_and_not_its_end():
    window = SigmaWindow(4.0, 1.0)
    assert [sigma in window for sigma in (4.1, 4.0, 2.0, 1.0, 0.9)] == [False, True, True, False, False]


@given(st.floats(0.01, 20.0))
def test_adjacent_windows_cover_every_sigma_exactly_once(sigma):
    windows = [SigmaWindow(math.inf, 4.0), SigmaWindow(4.0, 1.0), SigmaWindow(1.0, 0.0)]
    assert sum(sigma in window for window in windows) == 1


def test_the_default_window_is_all_of_sampling():
    assert 1e9 in SigmaWindow() and 1e-9 in SigmaWindow()


def test_any_of_tells_whether_a_schedule_falls_in_the_window():
    assert SigmaWindow(4.0, 1.0).any_of(torch.tensor([16.0, 2.0, 0.0]))
    assert not SigmaWindow(4.0, 3.0).any_of([16.0, 2.0, 0.0])
    assert not SigmaWindow(4.0, 4.0).any_of([4.0])


@pytest.mark.parametrize("ends", [(1.0, 4.0), (math.nan, 0.0), (4.0, math.nan), (1.0, -1.0)])
def test_a_window_that_runs_upwards_is_an_error(ends):
    with pytest.raises(MedSteerError, match="Swap start and end"):
        SigmaWindow(*ends)


def test_percents_in_order_pass():
    for start, end in [(0, 1), (0.2, 0.8), (0.5, 0.5)]:
        check_percent(start, end)


@pytest.mark.parametrize("ends", [(0.8, 0.2), (-0.1, 1), (0, 1.1), (math.nan, 1), (0, math.nan)])
def test_percents_out_of_order_or_range_are_an_error(ends):
    with pytest.raises(MedSteerError, match=r"start_percent is .* and end_percent is"):
        check_percent(*ends)
