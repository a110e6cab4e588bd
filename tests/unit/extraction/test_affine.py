import math

import pytest
import torch

from medsteer_core.errors import MedSteerError
from medsteer_core.extraction.affine import affine_map, fit, held_out, leading_directions
from medsteer_core.extraction.capture import SigmaStatistics
from medsteer_core.extraction.token_pairs import TokenPairs
from medsteer_core.steering.operators import affine

CHANNELS, RANK, IMAGES, TOKENS = 24, 3, 8, 64


def planted(seed=0, noise=0.02, channels=CHANNELS, images=IMAGES, tokens=TOKENS):
    """Pairs whose difference is an affine map of rank 3 of the present activation, with noise: (pairs, directions)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    directions = torch.linalg.qr(normal(channels, RANK)).Q.mT
    readers, offsets = normal(RANK, channels) / channels**0.5, torch.tensor([2.0, -1.0, 0.5])
    a = 3 * normal(channels) + normal(images * tokens, channels)
    difference = (a @ readers.mT + offsets) @ directions
    samples = torch.arange(images).repeat_interleave(tokens)
    return TokenPairs(a, a - difference + noise * normal(*a.shape), samples), directions


def statistics(mean, sigma=2.0):
    return SigmaStatistics(torch.tensor([sigma]), mean[None], torch.ones(1), torch.tensor([IMAGES]))


def made(pair, rank=RANK, **changes):
    present, absent = ({"b": statistics(side.mean(0))} for side in (pair.present, pair.absent))
    return affine_map({"b": [pair]}, present, absent, rank, {"noise": "same state"}, **changes)


def largest_angle(one, other):
    """The largest principal angle between two spans of orthonormal rows, in degrees."""
    cosine = torch.linalg.svdvals(one.double() @ other.double().mT).min().clamp(max=1)
    return math.degrees(math.acos(cosine))


@pytest.mark.parametrize("channels", [CHANNELS, 600], ids=["more tokens than channels", "more channels than tokens"])
def test_the_directions_span_what_the_difference_spans(channels):
    pair, directions = planted(channels=channels, noise=0.005)
    found, _, _ = fit(pair.present, pair.absent, RANK)
    torch.testing.assert_close(found @ found.mT, torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-9)
    assert largest_angle(found, directions) < 3


def test_the_map_predicts_new_tokens():
    """Noise of 0.02 a channel is a share of about 0.002 of the squared difference, which is not the map's to know."""
    site = made(planted(seed=0)[0]).sites["b"]
    generator = torch.Generator().manual_seed(9)
    pair, _ = planted(seed=0)
    fresh = pair.present.mean(0) + torch.randn(2000, CHANNELS, generator=generator)
    true = planted_difference(fresh)
    predicted = fresh - affine(fresh, site.directions[0], site.readers[0], site.offsets[0], 1.0, 0.0, False)
    assert 1 - (true - predicted).square().sum() / true.square().sum() > 0.99


def planted_difference(a):
    """The map that `planted(0)` holds, without noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(CHANNELS, RANK, generator=generator)).Q.mT
    readers = torch.randn(RANK, CHANNELS, generator=generator) / CHANNELS**0.5
    return (a @ readers.mT + torch.tensor([2.0, -1.0, 0.5])) @ directions


def test_the_share_explained_is_measured_on_images_left_out():
    vector = made(planted()[0])
    assert vector.provenance["explained"] == pytest.approx(0.995, abs=0.005)
    assert vector.provenance["explained_by_site"] == {"b": [vector.provenance["explained"]]}


def test_a_difference_that_the_activation_does_not_tell_is_not_explained():
    """A fit of noise explains the tokens that it has seen and not those it has not."""
    generator = torch.Generator().manual_seed(0)
    a, difference = torch.randn(2, 4 * 20, CHANNELS, generator=generator)
    pair = TokenPairs(a, a - difference, torch.arange(4).repeat_interleave(20))
    assert held_out(pair, 8) < 0.05
    directions, readers, offsets = fit(pair.present, pair.absent, 8)
    left = difference.double() - (a.double() @ readers.mT + offsets) @ directions
    assert 1 - left.square().sum() / difference.square().sum() > 0.15


def test_less_rank_explains_less():
    pair, _ = planted()
    shares = [held_out(pair, rank) for rank in (1, 2, 3)]
    assert shares[0] < shares[1] - 0.02 < shares[2] - 0.04


def test_one_image_leaves_nothing_to_hold_out():
    pair, _ = planted(images=1)
    assert held_out(pair, RANK) is None
    assert made(pair).provenance["explained"] is None
    assert held_out(planted(images=2)[0], RANK) > 0.9


def test_directions_point_from_absent_to_present_and_gaps_are_the_means_distance_along_them():
    pair, _ = planted()
    site = made(pair).sites["b"]
    difference = pair.present.mean(0) - pair.absent.mean(0)
    torch.testing.assert_close(site.directions[0] @ difference, site.gaps[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(site.projections[0, 0] - site.projections[0, 1], site.gaps[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(site.centres[0], (pair.present.mean(0) + pair.absent.mean(0)) / 2)
    assert (site.gaps >= 0).all()


def test_the_sign_of_a_direction_changes_nothing_in_what_is_taken_away():
    """Directions are turned to point to present; their readers turn with them."""
    pair, _ = planted()
    site = made(pair).sites["b"]
    directions, readers, offsets = fit(pair.present, pair.absent, RANK)
    raw = (pair.present.double() @ readers.mT + offsets) @ directions
    turned = (pair.present @ site.readers[0].mT + site.offsets[0]) @ site.directions[0]
    torch.testing.assert_close(turned, raw.float(), rtol=1e-4, atol=1e-4)


def test_provenance_says_what_was_fitted():
    facts = made(planted()[0], flow=True).provenance
    wanted = {
        "noise": "same state",
        "estimator": "affine_map",
        "rank": 3,
        "token_pairs": IMAGES * TOKENS,
        "ridge": 0.01,
    }
    assert {name: facts[name] for name in wanted} == wanted
    assert facts["observations"] == {"present": IMAGES, "absent": IMAGES} and facts["degenerate"] == 0


def test_tokens_that_do_not_vary_are_fitted_by_their_mean():
    a = torch.ones(40, 6)
    directions, readers, offsets = fit(a, a - torch.tensor([3.0, 0, 0, 0, 0, 0]), 1)
    assert readers.abs().max() < 1e-9
    torch.testing.assert_close(offsets @ directions, torch.tensor([3.0, 0, 0, 0, 0, 0], dtype=torch.float64))


def test_a_level_without_difference_gets_a_map_that_does_nothing():
    pair, _ = planted()
    still = TokenPairs(pair.present, pair.present, pair.samples)
    sigmas, means = torch.tensor([2.0, 1.0]), (pair.present.mean(0), pair.absent.mean(0))
    present = SigmaStatistics(sigmas, torch.stack([means[0], means[0]]), torch.ones(2), torch.tensor([8, 8]))
    absent = SigmaStatistics(sigmas, torch.stack([means[0], means[1]]), torch.ones(2), torch.tensor([8, 8]))
    vector = affine_map({"b": [still, pair]}, {"b": present}, {"b": absent}, RANK, {})
    site = vector.sites["b"]
    assert site.readers[0].abs().max() == 0 and site.offsets[0].abs().max() == 0 and site.gaps[0].max() == 0
    assert vector.provenance["degenerate"] == 1
    assert vector.provenance["explained_by_site"]["b"][0] is None


def test_prompts_without_any_difference_are_refused():
    pair, _ = planted()
    with pytest.raises(MedSteerError, match="same activations everywhere"):
        made(TokenPairs(pair.present, pair.present.clone(), pair.samples))


@pytest.mark.parametrize("rank", [0, CHANNELS + 1])
def test_a_rank_that_the_channels_do_not_allow_is_refused(rank):
    with pytest.raises(MedSteerError, match=rf"rank is {rank}; site 'b' allows 1 to {CHANNELS}"):
        made(planted()[0], rank=rank)


@pytest.mark.parametrize("shape", [(200, 10), (10, 200)])
def test_leading_directions_hold_the_most_squared_length_of_any(shape):
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = leading_directions(rows, 4)
    held = (rows @ found.mT).square().sum()
    torch.testing.assert_close(held, torch.linalg.svdvals(rows)[:4].square().sum())
