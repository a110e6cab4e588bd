import pytest
import torch

from medsteer_core.errors import MedSteerError
from medsteer_core.extraction.token_pairs import MOST_PAIRS, PairedActivations, pairs_that_fit

SITE, TOKENS, CHANNELS = "b.0", 10, 3


def activations(images, shift=0.0):
    """(images, tokens, 3): every token says which image and token it is, and whose side it is."""
    a = torch.zeros(len(images), TOKENS, CHANNELS)
    a[..., 0] = torch.tensor(images)[:, None]
    a[..., 1] = torch.arange(TOKENS)
    a[..., 2] = shift
    return a


def seen(batches, most=12, visits=1, first="present", sigma=2.0):
    """What was kept of runs over these batches of images; in each visit `first` is shown first."""
    pairs = PairedActivations(most)
    other = "absent" if first == "present" else "present"
    for images in batches:
        pairs.begin(images)
        for visit in range(visits):
            for side in (first, other):
                pairs.side(side).observe(SITE, sigma, activations(images, (side == "present") + 10.0 * visit))
    return pairs


def test_row_i_of_both_sides_is_the_same_token_of_the_same_image():
    (kept,) = seen([range(3), range(3, 6)]).pairs()[SITE]
    assert torch.equal(kept.present[:, :2], kept.absent[:, :2])
    assert torch.equal(kept.present[:, 0].long(), kept.samples)
    assert (kept.present[:, 2] - kept.absent[:, 2]).unique().tolist() == [1.0]


@pytest.mark.parametrize("most", [1, 12, 59, 60, 500])
def test_no_more_than_the_wanted_pairs_are_kept_and_none_twice(most):
    (kept,) = seen([range(3), range(3, 6)], most).pairs()[SITE]
    assert len(kept.present) == min(most, 60)
    assert len({(int(row[0]), int(row[1])) for row in kept.present}) == min(most, 60)


def test_the_size_of_the_batches_changes_nothing():
    one, other = (seen(batches).pairs()[SITE][0] for batches in ([range(6)], [[0], [1, 2], [3, 4, 5]]))
    for name in ("present", "absent", "samples"):
        assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("most", [25, 60, 80])
def test_many_small_batches_keep_what_one_large_one_keeps(most):
    one, other = (seen(batches, most).pairs()[SITE][0] for batches in ([range(30)], [[i] for i in range(30)]))
    assert len(one.present) == most
    for name in ("present", "absent", "samples"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_every_image_has_its_share():
    (kept,) = seen([range(start, start + 20) for start in range(0, 200, 20)], most=500).pairs()[SITE]
    counts = torch.bincount(kept.samples, minlength=200)
    assert counts.max() <= TOKENS and counts[:100].sum() == pytest.approx(250, abs=40)
    tokens = torch.bincount(kept.present[:, 1].long(), minlength=TOKENS)
    assert tokens.min() > 30 and tokens.max() < 70  # 50 each


def test_it_does_not_matter_which_side_comes_first():
    one, other = (seen([range(4)], first=side).pairs()[SITE][0] for side in ("present", "absent"))
    assert torch.equal(one.present, other.present) and torch.equal(one.absent, other.absent)


def test_two_visits_at_one_sigma_are_paired_in_order():
    """A Heun sampler comes twice to a level, with two states: the sides of each are 10 apart from the other's."""
    (kept,) = seen([range(3)], most=60, visits=2).pairs()[SITE]
    assert len(kept.present) == 60
    assert (kept.present[:, 2] - kept.absent[:, 2]).unique().tolist() == [1.0]
    assert sorted(kept.absent[:, 2].unique().tolist()) == [0.0, 10.0]


def test_both_sides_of_two_visits_may_come_one_after_the_other():
    pairs = PairedActivations(20)
    pairs.begin([0])
    for side, visit in (("present", 0), ("present", 1), ("absent", 0), ("absent", 1)):
        pairs.side(side).observe(SITE, 2.0, activations([0], (side == "present") + 10.0 * visit))
    (kept,) = pairs.pairs()[SITE]
    assert (kept.present[:, 2] - kept.absent[:, 2]).unique().tolist() == [1.0]


def test_levels_come_highest_first_and_rounding_makes_no_new_one():
    pairs = PairedActivations(4)
    for sigma in (1.0, 3.0, 1.0 + 1e-7):
        pairs.begin([0])
        for side in ("present", "absent"):
            pairs.side(side).observe(SITE, sigma, activations([0], sigma))
    first, second = pairs.pairs()[SITE]
    assert first.present[0, 2] == 3.0 and second.present[0, 2] == 1.0
    assert pairs.statistics("present")[SITE].sigmas.tolist() == [3.0, 1.0]


def test_the_class_means_count_every_token():
    statistics = seen([range(3), range(3, 6)], most=2).statistics("present")[SITE]
    torch.testing.assert_close(statistics.mean, torch.tensor([[2.5, 4.5, 1.0]]))
    assert statistics.count.tolist() == [6]


def test_a_state_that_only_one_side_saw_is_an_error():
    pairs = PairedActivations()
    pairs.begin([0])
    pairs.side("absent").observe(SITE, 2.0, activations([0]))
    for end in (pairs.pairs, lambda: pairs.begin([1])):
        with pytest.raises(MedSteerError, match="'b.0' saw only one of the two prompts at sigma 2"):
            end()


def test_rows_that_are_not_one_an_image_and_sides_of_two_shapes_are_errors():
    pairs = PairedActivations()
    pairs.begin([0, 1])
    with pytest.raises(MedSteerError, match="gave 1 rows for a batch of 2 images"):
        pairs.side("present").observe(SITE, 2.0, activations([0]))
    pairs = PairedActivations()
    pairs.begin([0])
    pairs.side("present").observe(SITE, 2.0, activations([0]))
    with pytest.raises(MedSteerError, match=r"shape \(1, 10, 3\) and \(1, 5, 3\) at the same state"):
        pairs.side("absent").observe(SITE, 2.0, activations([0])[:, :5])


def test_large_models_keep_fewer_pairs():
    assert pairs_that_fit([192] * 8, 20) == MOST_PAIRS
    most = pairs_that_fit([1152] * 28, 20)  # PixArt
    assert most == 387 and most * 1152 * 28 * 20 * 8 <= 2e9
    assert pairs_that_fit([10**6] * 100, 1000) == 1
