"""The least strength of each image: what the sampler gives at that strength, over one factual, and what is refused."""

from dataclasses import replace

import pytest
import tiny
import torch
from medsteer_pack.medsteer_core.errors import MedSteerError
from medsteer_pack.medsteer_core.host.sampling import runs as sampling
from medsteer_pack.medsteer_core.host.sampling.calibration import calibrate, told
from medsteer_pack.medsteer_core.host.sampling.counterfactual import sample_pair
from medsteer_pack.medsteer_core.host.sampling.flips import ByTarget
from medsteer_pack.medsteer_core.host.sampling.pair_request import CONCEPT, PairRequest


def request(model, *, sampler="euler", latent=None, **changes):
    schedule = sampling.schedule(model, 4, sampler, "normal")
    return PairRequest(tiny.cond(1), tiny.cond(2), latent or tiny.latent(batch=3), 11, 3.0, schedule, **changes)


def noise():
    """The noise of `request`'s seed for its three images."""
    return sampling.noise_for(torch.zeros(1, 4, 8, 8), 11, range(3))


class Says:
    """Flips as a function of a factual and a counterfactual says."""

    def __init__(self, says):
        self.says = says

    def begin(self, start, noise):
        pass

    def __call__(self, factual, counterfactual):
        return self.says(factual, counterfactual)


def changed_by(least):
    """For whom an image flips when it has moved by ``least`` on average."""
    return Says(lambda factual, counterfactual: float((counterfactual - factual).abs().mean()) >= least)


@pytest.fixture(scope="module")
def steered(pixart):
    return tiny.steered(pixart, tiny.vector(pixart), operator="suppress", strength=2.0, start=0.3)


def test_each_image_has_what_the_sampler_gives_at_its_own_strength(steered):
    whole = sample_pair(steered, request(steered, lock=CONCEPT, threshold=0.5))
    moved = (whole.counterfactual - whole.factual).abs().flatten(1).mean(1)
    made = calibrate(
        steered, request(steered, lock=CONCEPT, threshold=0.5), changed_by(float(moved.min()) * 0.7), 6, 2.0
    )
    assert made.counted == [True] * 3 and len({found.least for found in made.found}) > 1
    torch.testing.assert_close(made.pair.factual, whole.factual, atol=1e-5, rtol=0)
    assert torch.equal(made.pair.mask, whole.mask)
    for place, found in enumerate(made.found):
        assert 0 < found.least < 1 and len(found.tried) <= 6
        own = sample_pair(steered, request(steered, lock=CONCEPT, threshold=0.5, multiples=(found.least,)))
        one, other = made.pair.counterfactual[place], own.counterfactual[place]
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        assert made.pair.records[place] == own.records[place]
        assert told(made)[place]["multiple"] == found.least


def test_the_factual_of_a_single_image_is_the_samplers_to_the_bit_and_sampled_once(steered):
    one = request(steered, latent=tiny.latent(batch=1))
    made, whole = calibrate(steered, one, changed_by(1e9), 3, 2.0), sample_pair(steered, one)
    assert torch.equal(made.pair.factual, whole.factual)
    assert made.found[0].least is None and [m for m, _ in made.found[0].tried] == [1.0, 1.5, 2.0]
    assert torch.equal(made.pair.counterfactual, whole.counterfactual)  # never flipped: as Steer says
    assert "never flipped, shown at Steer's strength: number 1" in made.pair.summary
    assert "flipped 0 of 1" in made.pair.summary


def test_images_that_are_not_what_they_should_be_are_not_asked_about(steered):
    made = calibrate(steered, request(steered), Says(lambda *_: None), 5, 2.0)
    assert made.counted == [False] * 3 and all(not found.tried for found in made.found)
    assert "3 not asked about" in made.pair.summary


def test_without_a_judge_the_way_to_the_targets_own_images_counts(pixart, steered):
    asked = request(steered)
    flips = ByTarget(steered, asked, tiny.cond(3))
    whole = sample_pair(steered, asked)
    flips.begin(torch.zeros_like(whole.factual), noise())
    targets = [flips.share(one, one) for one in whole.factual.split(1)]
    assert targets == pytest.approx([0.0] * 3, abs=1e-5)  # a factual has gone nowhere
    drawn = sampling.resample(
        pixart, tiny.cond(3), tiny.cond(2), torch.zeros_like(whole.factual), noise(), asked.schedule, 3.0, 11
    )
    gone = [flips.share(*both) for both in zip(whole.factual.split(1), drawn.split(1), strict=True)]
    assert sum(gone) / 3 == pytest.approx(1.0, abs=1e-4)  # and what the target's prompt draws the whole way, on average
    made = calibrate(steered, asked, ByTarget(steered, asked, tiny.cond(3)), 3, 2.0)
    assert made.counted == [True] * 3
    again = calibrate(steered, asked, ByTarget(steered, asked, tiny.cond(3)), 3, 2.0)
    assert [found.tried for found in made.found] == [found.tried for found in again.found]


def test_without_judge_and_target_nothing_can_be_said(pixart, steered):
    with pytest.raises(MedSteerError, match="judge is 'none', and no prompt says what the images should become"):
        ByTarget(steered, request(steered), None)
    with pytest.raises(MedSteerError, match="not steered"):
        ByTarget(pixart, request(pixart), tiny.cond(3))


def test_at_strength_zero_nothing_changes_whatever_is_tried(pixart):
    still = tiny.steered(pixart, tiny.vector(pixart), operator="suppress", strength=0.0)
    made = calibrate(still, request(still), changed_by(1e-9), 3, 2.0)
    assert torch.equal(made.pair.factual, made.pair.counterfactual)


def test_what_has_no_strength_is_refused(pixart, steered):
    with pytest.raises(MedSteerError, match="The model is not steered, so there is no strength to find"):
        calibrate(pixart, request(pixart, counterfactual=tiny.cond(3)), changed_by(0), 3, 2.0)
    ablated = tiny.steered(pixart, tiny.vector(pixart), operator="ablate")
    with pytest.raises(MedSteerError, match="ablate has no strength"):
        calibrate(ablated, request(ablated), changed_by(0), 3, 2.0)
    with pytest.raises(MedSteerError, match="passes is 0"):
        calibrate(steered, request(steered), changed_by(0), 0, 2.0)
    with pytest.raises(MedSteerError, match="draws its noise for all images of a batch at once"):
        calibrate(steered, request(steered, sampler="euler_ancestral"), changed_by(0), 3, 2.0)


def test_every_image_keeps_its_own_conditioning_mask_and_number(steered):
    both = [[torch.cat([tiny.cond(1)[0][0], tiny.cond(4)[0][0]]), {}]]
    latent = {**tiny.latent(batch=2), "batch_index": [5, 9]}
    masks = torch.zeros(2, 64, 64)
    masks[0, :32], masks[1, 32:] = 1, 1
    asked = replace(request(steered, latent=latent, mask=masks), positive=both)
    made, whole = calibrate(steered, asked, changed_by(0), 1, 2.0), sample_pair(steered, asked)
    torch.testing.assert_close(made.pair.counterfactual, whole.counterfactual, atol=1e-5, rtol=0)
    assert torch.equal(made.pair.mask, whole.mask) and made.pair.records == whole.records
