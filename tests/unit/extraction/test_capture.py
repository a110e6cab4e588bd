import math

import pytest
import torch

from medsteer_core.errors import MedSteerError
from medsteer_core.extraction.capture import ActivationSums


def activations(rows=5, tokens=7, channels=3, seed=0, offset=0.0):
    return torch.randn(rows, tokens, channels, generator=torch.Generator().manual_seed(seed)) + offset


def naive(batches):
    """Mean and total variance of the per-sample token means, in float64 from everything at once."""
    means = torch.cat([batch.double().mean(dim=1) for batch in batches])
    return means.mean(dim=0), means.var(dim=0, unbiased=True).sum()


def test_streaming_equals_the_calculation_from_everything_at_once():
    batches = [activations(rows, seed=rows) for rows in (1, 4, 2, 8)]
    sums = ActivationSums()
    for batch in batches:
        sums.observe("b", 2.0, batch)
    result = sums.statistics()["b"]
    mean, variance = naive(batches)
    torch.testing.assert_close(result.mean[0].double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.variance[0].double(), variance, rtol=1e-5, atol=0)
    assert result.count.tolist() == [15]
    assert {result.mean.dtype, result.variance.dtype, result.sigmas.dtype} == {torch.float32}


def test_a_small_spread_around_a_far_mean_survives():
    # Sums of squares in float32 would lose it: 1e4 squared is 1e8, and float32 has 7 digits.
    batches = [activations(4, seed=seed, offset=1e4) for seed in range(10)]
    sums = ActivationSums()
    for batch in batches:
        sums.observe("b", 1.0, batch)
    assert sums.statistics()["b"].variance.item() == pytest.approx(naive(batches)[1].item(), rel=0.02)


def test_hand_computed_numbers():
    sums = ActivationSums()
    sums.observe("b", 1.0, torch.tensor([[[1.0, 0.0], [3.0, 0.0]]]))  # token mean (2, 0)
    sums.observe("b", 1.0, torch.tensor([[[4.0, 6.0], [4.0, 6.0]]]))  # token mean (4, 6)
    result = sums.statistics()["b"]
    assert result.mean.tolist() == [[3.0, 3.0]]
    assert result.variance.tolist() == [20.0]  # ((1+1) + (9+9)) / (2 - 1)


def test_one_sample_has_variance_zero():
    sums = ActivationSums()
    sums.observe("b", 1.0, activations(1))
    assert sums.statistics()["b"].variance.tolist() == [0.0]


def test_sites_come_in_order_of_observation_and_sigmas_descending():
    sums = ActivationSums()
    for sigma in (1.0, 8.0, 4.0):
        for site, channels in (("b.10", 3), ("b.2", 5)):
            sums.observe(site, sigma, torch.full((2, 4, channels), sigma))
    result = sums.statistics()
    assert list(result) == ["b.10", "b.2"]
    assert result["b.2"].sigmas.tolist() == [8.0, 4.0, 1.0]
    assert result["b.2"].mean[:, 0].tolist() == [8.0, 4.0, 1.0]
    assert result["b.10"].mean.shape == (3, 3) and result["b.2"].mean.shape == (3, 5)


def test_sigmas_that_differ_by_rounding_are_one():
    sums = ActivationSums()
    for sigma in (7.0, 7.0 * (1 + 5e-6), 7.0 * (1 - 5e-6)):
        sums.observe("b", sigma, activations(1))
    sums.observe("b", 7.0 * (1 + 1e-4), activations(1))
    assert sums.statistics()["b"].count.tolist() == [1, 3]


def test_memory_does_not_grow_with_samples():
    sums = ActivationSums()
    sizes = []
    for seed in range(50):
        for sigma in (4.0, 4.0 * (1 + 1e-7 * seed), 1.0):
            sums.observe("b", sigma, activations(3, seed=seed))
        sizes.append(sums.stored_elements)
    assert set(sizes) == {2 * (3 + 1)}  # two sigmas; three channels and a scatter


def test_nothing_of_the_activation_is_kept_alive():
    sums = ActivationSums()
    activation = activations(1, 1000, 4)
    sums.observe("b", 1.0, activation)
    expected = activation.mean(dim=1)[0].clone()
    activation.zero_()
    torch.testing.assert_close(sums.statistics()["b"].mean[0], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    batches = [activations(4, 500, seed=seed, offset=100.0).to(dtype) for seed in range(5)]
    sums = ActivationSums()
    for batch in batches:
        sums.observe("b", 1.0, batch)
    torch.testing.assert_close(sums.statistics()["b"].mean[0].double(), naive(batches)[0], rtol=1e-6, atol=0)


def test_observing_in_and_out_of_inference_mode_and_with_gradients_works():
    sums = ActivationSums()
    with torch.inference_mode():
        sums.observe("b", 1.0, activations(2))
    sums.observe("b", 1.0, activations(2).requires_grad_())
    assert not sums.statistics()["b"].mean.requires_grad


def test_no_rows_are_no_sample():
    sums = ActivationSums()
    sums.observe("b", 1.0, activations(0))
    with pytest.raises(MedSteerError, match="No activation was observed"):
        sums.statistics()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_activation_that_is_not_finite_names_site_and_sigma(bad):
    sums = ActivationSums()
    sums.observe("b.0", 2.5, activations())
    sums.observe("b.1", 2.5, activations() * bad)
    with pytest.raises(MedSteerError, match=r"Site 'b.1' gave NaN or infinite activations at sigma 2.5"):
        sums.statistics()


def test_activations_of_another_shape_are_refused():
    sums = ActivationSums()
    with pytest.raises(MedSteerError, match=r"Site 'b' gave an activation of shape \(5, 7\)"):
        sums.observe("b", 1.0, torch.zeros(5, 7))
    sums.observe("b", 1.0, activations(channels=3))
    with pytest.raises(MedSteerError, match="Site 'b' gave 4 channels after 3"):
        sums.observe("b", 1.0, activations(channels=4))
