import dataclasses

import pytest
import torch

from medsteer_core.errors import MedSteerError
from medsteer_core.extraction.capture import ActivationSums, SigmaStatistics
from medsteer_core.extraction.estimators import mean_difference


def statistics(means, variances=None, sigmas=(4.0, 1.0)):
    """Statistics from the means (S, C) as a nested list."""
    mean = torch.tensor(means, dtype=torch.float32)
    variance = torch.tensor(variances or [0.0] * len(means))
    return SigmaStatistics(torch.tensor(sigmas[: len(means)]), mean, variance, torch.full((len(means),), 5))


def test_hand_computed_numbers():
    present = {"b": statistics([[5.0, 1.0, 0.0], [0.0, 0.0, 2.0]], [4.0, 9.0])}
    absent = {"b": statistics([[1.0, 4.0, 0.0], [0.0, 0.0, 0.0]], [1.0, 16.0])}
    vector = mean_difference(present, absent, {"present": "polyps"})
    site = vector.sites["b"]
    torch.testing.assert_close(site.directions, torch.tensor([[[0.8, -0.6, 0.0]], [[0.0, 0.0, 1.0]]]))
    torch.testing.assert_close(site.gaps, torch.tensor([[5.0], [2.0]]))
    torch.testing.assert_close(site.centres, torch.tensor([[3.0, 2.5, 0.0], [0.0, 0.0, 1.0]]))
    torch.testing.assert_close(site.projections, torch.tensor([[[3.4], [-1.6]], [[2.0], [0.0]]]))
    torch.testing.assert_close(site.spreads, torch.tensor([[2.0, 1.0], [3.0, 4.0]]))
    assert vector.sigmas.tolist() == [4.0, 1.0]
    assert vector.provenance == {
        "present": "polyps",
        "estimator": "mean_difference",
        "observations": {"present": 5, "absent": 5},
        "degenerate": 0,
    }


def test_the_gap_is_the_difference_of_the_projections():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(2, 2, 16, generator=generator) * 10
    site = mean_difference({"b": statistics(means[0].tolist())}, {"b": statistics(means[1].tolist())}, {}).sites["b"]
    torch.testing.assert_close(site.projections[:, 0] - site.projections[:, 1], site.gaps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(site.directions.norm(dim=-1), torch.ones(2, 1))


def test_a_planted_direction_is_recovered_from_noisy_samples():
    generator = torch.Generator().manual_seed(3)
    planted = torch.nn.functional.normalize(torch.randn(2, 64, generator=generator), dim=-1)
    common = 20 * torch.randn(64, generator=generator)
    sums = {"present": ActivationSums(), "absent": ActivationSums()}
    for name, side in (("present", 1.5), ("absent", -1.5)):
        for _ in range(40):
            for step, sigma in enumerate((8.0, 2.0)):
                noise = torch.randn(4, 1, 64, generator=generator) + torch.randn(4, 30, 64, generator=generator)
                sums[name].observe("b", sigma, common + side * planted[step] + 0.3 * noise)
    vector = mean_difference(sums["present"].statistics(), sums["absent"].statistics(), {})
    cosine = (vector.sites["b"].directions[:, 0] * planted).sum(dim=-1)
    assert cosine.min() > 0.99
    torch.testing.assert_close(vector.sites["b"].gaps, torch.full((2, 1), 3.0), rtol=0.05, atol=0)
    # Per-sample token means vary by 0.3 * sqrt(1 + 1/30) in each of 64 channels.
    torch.testing.assert_close(vector.sites["b"].spreads, torch.full((2, 2), 2.44), rtol=0.05, atol=0)


def test_sites_of_different_widths_stay_in_order():
    present = {"b.10": statistics([[1.0, 0.0]]), "b.2": statistics([[0.0, 0.0, 1.0]])}
    absent = {"b.2": statistics([[0.0, 0.0, 0.0]]), "b.10": statistics([[0.0, 0.0]])}
    vector = mean_difference(present, absent, {}, flow=True)
    assert vector.site_names == ("b.10", "b.2") and vector.flow
    assert (vector.channels("b.10"), vector.channels("b.2")) == (2, 3)


def test_a_step_without_difference_borrows_the_nearest_direction_with_gap_zero():
    sigmas = (8.0, 4.0, 2.0, 1.0)
    present = {"b": statistics([[7.0, 7.0], [3.0, 0.0], [7.0, 7.0 * (1 + 1e-7)], [7.0, 9.0]], sigmas=sigmas)}
    absent = {"b": statistics([[7.0, 7.0], [0.0, 0.0], [7.0, 7.0], [7.0, 7.0]], sigmas=sigmas)}
    vector = mean_difference(present, absent, {})
    site = vector.sites["b"]
    torch.testing.assert_close(site.directions[:, 0], torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    assert site.gaps.flatten().tolist() == [0.0, 3.0, 0.0, 2.0]
    assert vector.provenance["degenerate"] == 2


def test_a_site_without_any_difference_is_left_out_and_named():
    present = {"dead": statistics([[0.0, 0.0], [0.0, 0.0]]), "b": statistics([[1.0, 0.0], [1.0, 0.0]])}
    absent = {"dead": statistics([[0.0, 0.0], [0.0, 0.0]]), "b": statistics([[0.0, 0.0], [0.0, 0.0]])}
    vector = mean_difference(present, absent, {})
    assert vector.site_names == ("b",)
    assert vector.provenance["dropped_sites"] == ["dead"]


@pytest.mark.parametrize("rounding", [0.0, 1e-7])
def test_identical_prompts_are_an_error_that_says_what_to_do(rounding):
    same = [[100.0, 200.0], [300.0, 1.0]]
    nearly = [[100.0 * (1 + rounding), 200.0], [300.0, 1.0]]
    with pytest.raises(MedSteerError, match=r"same activations everywhere.*Give two different prompts"):
        mean_difference({"b": statistics(same)}, {"b": statistics(nearly)}, {})


def test_what_does_not_match_is_named():
    good = {"b": statistics([[1.0, 0.0], [1.0, 0.0]])}
    with pytest.raises(MedSteerError, match="no activations to compare"):
        mean_difference(good, {}, {})
    with pytest.raises(MedSteerError, match=r"different sites \(1 and 2; not in both: c\)"):
        mean_difference(good, {**good, "c": good["b"]}, {})
    with pytest.raises(MedSteerError, match=r"Site 'b': .* \(2, 2\), the absent one \(1, 2\)"):
        mean_difference(good, {"b": statistics([[0.0, 0.0]])}, {})
    shifted = {"b": dataclasses.replace(good["b"], sigmas=torch.tensor([4.0, 0.9]))}
    with pytest.raises(MedSteerError, match=r"sigmas are 2 from 4 to 1 here and 2 from 4 to 0.9 there"):
        mean_difference(good, shifted, {})
    mixed = {**good, "c": shifted["b"]}
    with pytest.raises(MedSteerError, match="Site 'c': the sigmas are"):
        mean_difference(mixed, mixed, {})
