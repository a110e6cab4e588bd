import json

import pytest
import torch
from torch.nn import functional as F

from medsteer_core.errors import MedSteerError
from medsteer_core.extraction.axes import AXES, discriminant_axis, mean_axis
from medsteer_core.extraction.samples_record import SampleRecord
from medsteer_core.extraction.separability import (
    auroc,
    auto_sites,
    held_out_auroc,
    held_out_projections,
    report,
    split_half_stability,
)


def records(gaps, count=40, channels=32, seed=0, absent_count=None, first_absent=0, shared=0.0):
    """Two records of a site for each list of gaps (one a step), with unit noise; `shared` is a pair's common noise."""
    generator = torch.Generator().manual_seed(seed)
    counts, sites = (count, absent_count or count), ({}, {})
    for name, steps in gaps.items():
        direction = F.normalize(torch.randn(channels, generator=generator), dim=0)
        common = shared * torch.randn(max(counts), 1, channels, generator=generator)
        for side, sign in zip((0, 1), (0.5, -0.5), strict=True):
            noise = torch.randn(counts[side], len(steps), channels, generator=generator)
            shift = sign * torch.tensor(steps)[:, None] * direction
            sites[side][name] = 7 + noise + common[: counts[side]] + shift
    sigmas = torch.arange(len(next(iter(gaps.values()))), 0, -1).float()
    numbers = torch.arange(count), torch.arange(first_absent, first_absent + counts[1])
    return [SampleRecord(sites[side], sigmas, numbers[side]) for side in (0, 1)]


# AUROC


def test_auroc_is_the_share_of_pairs_in_order_and_ties_count_half():
    present = torch.tensor([[3.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    absent = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    assert auroc(present, absent).tolist() == [pytest.approx(4.5 / 6), 0.5]


def test_a_wide_gap_separates_unseen_samples_and_no_gap_does_not():
    found = held_out_auroc(*records({"far": [9.0, 9.0], "same": [0.0, 0.0]}, count=100))
    assert list(found) == ["far", "same"]
    assert found["far"].tolist() == [1.0, 1.0]
    # A mean over 5 folds of about 400 pairs each: 0.03 standard error.
    assert found["same"].shape == (2,) and (found["same"] - 0.5).abs().max() < 0.12


def test_it_is_tried_on_samples_that_it_was_not_estimated_from():
    """Without any difference an axis in 512 channels separates the very samples it was estimated from perfectly."""
    present, absent = records({"b": [0.0] * 8}, count=20, channels=512)
    p, a = present.sites["b"].double(), absent.sites["b"].double()
    d = mean_axis(p, a)
    assert auroc(*(torch.einsum("nsc,sc->ns", side, d) for side in (p, a))).min() == 1.0
    assert abs(float(held_out_auroc(present, absent)["b"].mean()) - 0.5) < 0.1


def test_the_auroc_is_the_normal_distributions_for_a_known_gap():
    """Unit noise and gap 2 along a direction that many samples give: AUROC is Phi(2 / sqrt 2) = 0.921."""
    found = held_out_auroc(*records({"b": [2.0]}, count=1500, channels=8))
    assert float(found["b"]) == pytest.approx(0.921, abs=0.015)


def test_two_samples_of_one_noise_are_never_apart():
    """The axis sees no sample's pair: what fold the pairs of 4 are in shows in the axis that it is called with."""
    present, absent = records({"b": [1.0]}, count=6)
    shuffled = torch.tensor([3, 0, 5, 1, 4, 2])
    absent = SampleRecord({"b": absent.sites["b"][shuffled]}, absent.sigmas, absent.samples[shuffled])
    tagged = [
        SampleRecord({"b": r.samples[:, None, None].float().expand(6, 1, 2).clone()}, r.sigmas, r.samples)
        for r in (present, absent)
    ]
    seen = []

    def axis(p, a):
        seen.append((sorted(p[:, 0, 0].tolist()), sorted(a[:, 0, 0].tolist())))
        return mean_axis(p, a)

    held_out_auroc(*tagged, axis, folds=3)
    split_half_stability(*tagged, axis, splits=2)
    assert len(seen) == 3 + 2 * 2 and all(p == a for p, a in seen)


def test_unpaired_records_of_different_sizes_work_too():
    present, absent = records({"b": [9.0]}, count=10, absent_count=15, first_absent=10)
    assert held_out_auroc(present, absent)["b"].tolist() == [1.0]
    assert 0.8 < float(split_half_stability(present, absent)["b"]) <= 1.0


def test_folds_are_at_most_as_many_as_samples():
    present, absent = records({"b": [9.0]}, count=3)
    assert held_out_auroc(present, absent, folds=50)["b"].tolist() == [1.0]
    assert report(present, absent)["folds"] == 3


# Stability


def test_stability_is_what_the_noise_leaves_of_the_cosine():
    """Halves of 50 give gap * d and noise of variance 2/50 in 32 channels: |cos| is about gap^2 / (gap^2 + 1.28)."""
    found = split_half_stability(*records({"b": [2.0] * 40 + [4.0] * 40}, count=100), splits=4)["b"]
    assert float(found[:40].mean()) == pytest.approx(4 / 5.28, abs=0.03)
    assert float(found[40:].mean()) == pytest.approx(16 / 17.28, abs=0.01)


def test_chance_is_the_mean_absolute_cosine_of_random_directions():
    found = split_half_stability(*records({"b": [0.0] * 64}, count=40, channels=32), splits=8)["b"]
    assert float(found.mean()) == pytest.approx((2 / torch.pi / 32) ** 0.5, rel=0.2)


def test_the_splits_are_seeded():
    both = records({"b": [1.0]})
    once, again, other = (split_half_stability(*both, seed=seed)["b"] for seed in (3, 3, 4))
    assert torch.equal(once, again) and not torch.equal(once, other)


# For the vector


def test_the_report_is_json_and_holds_both_for_every_site_and_step():
    found = report(*records({"b.0": [9.0, 9.0], "b.1": [0.0, 9.0]}), axis=AXES["lda"])
    assert json.loads(json.dumps(found)) == found
    assert found["folds"] == 5 and found["splits"] == 8
    assert found["auroc"]["b.0"] == [1.0, 1.0] and found["auroc"]["b.1"][1] == 1.0 and found["auroc"]["b.1"][0] < 0.8
    assert found["stability"]["b.0"][0] > 0.9 > 0.6 > found["stability"]["b.1"][0]


def test_a_step_without_any_difference_is_chance():
    present, _ = records({"b": [1.0]})
    assert held_out_auroc(present, present)["b"].tolist() == [0.5]
    assert split_half_stability(present, present)["b"].tolist() == [0.0]


def test_auto_takes_the_sites_whose_mean_passes_in_order():
    known = {"b.2": [1.0, 0.9], "b.0": [0.5, 0.6], "b.1": torch.tensor([0.8, 1.0])}
    assert auto_sites(known) == ("b.2", "b.1")
    assert auto_sites(known, 0.95) == ("b.2",)
    assert auto_sites(known, 0.0) == ("b.2", "b.0", "b.1")


def test_auto_without_any_site_names_the_best_and_says_what_to_do():
    with pytest.raises(MedSteerError, match=r"AUROC of 0.9 or more.*best is 'b.1' with 0.70. Lower the threshold"):
        auto_sites({"b.0": [0.5], "b.1": [0.7]})
    with pytest.raises(MedSteerError, match="does not say how well its sites separate"):
        auto_sites({})
    with pytest.raises(MedSteerError, match="threshold of automatic sites is nan; 0 to 1"):
        auto_sites({"b": [0.5]}, float("nan"))


@pytest.mark.parametrize("measure", [held_out_auroc, split_half_stability])
def test_too_few_samples_are_refused_and_how_many_depends_on_the_axis(measure):
    with pytest.raises(MedSteerError, match="1 samples of present and 1 of absent; at least 2"):
        measure(*records({"b": [1.0]}, count=1))
    with pytest.raises(MedSteerError, match="at least 4"):
        measure(*records({"b": [1.0]}, count=3), discriminant_axis)
    assert measure(*records({"b": [9.0]}, count=2))["b"].shape == (1,)
    assert measure(*records({"b": [9.0]}, count=4), discriminant_axis)["b"].shape == (1,)


def test_one_fold_and_records_of_other_models_are_refused():
    both = records({"b": [1.0]})
    with pytest.raises(MedSteerError, match="number of folds is 1; 2 or more"):
        held_out_auroc(*both, folds=1)
    with pytest.raises(MedSteerError, match="different sites"):
        held_out_auroc(both[0], records({"c": [1.0]})[1])


# Projections


def test_projections_are_of_unseen_samples_and_from_the_midpoint():
    """The offset of 7 in every channel is gone; without a gap 512 channels show none, since each sample is unseen."""
    present, absent = held_out_projections(*records({"b": [0.0, 8.0]}, count=60, channels=16), "b", 1)
    assert present.shape == absent.shape == (60,)
    assert float(present.mean()) == pytest.approx(4, abs=0.4) and float(absent.mean()) == pytest.approx(-4, abs=0.4)
    none = held_out_projections(*records({"b": [0.0]}, count=60, channels=512), "b", 0)
    assert abs(float(none[0].mean() - none[1].mean())) < 0.6


def test_each_projection_stands_at_its_samples_place():
    present, absent = records({"b": [6.0]}, count=10, absent_count=7)
    present.sites["b"][4] += 10 * (present.sites["b"].mean(0) - absent.sites["b"].mean(0))
    first, second = held_out_projections(present, absent, "b", 0)
    assert (len(first), len(second)) == (10, 7) and int(first.argmax()) == 4
