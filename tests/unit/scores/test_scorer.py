"""Scores of pairs: numbers by hand, with judges that say what the test tells them."""

import json
import math
from dataclasses import replace

import pytest
import torch

from medsteer_core.endophantom.judges import LABELS, Verdict
from medsteer_core.endophantom.phantom import CLASSES, FINDINGS, Anatomy, render
from medsteer_core.errors import MedSteerError
from medsteer_core.scores import images as image_pairs
from medsteer_core.scores import scorer as evaluate
from medsteer_core.scores.images import compare
from medsteer_core.scores.scorer import FINDINGS_OF, PairScore, score_pair, score_pairs, summarise, wilson

SIDE = 64


def picture(seed=0, side=SIDE):
    return torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed)) * 0.6 + 0.2


class Told:
    """Judges that give what the test tells them, factuals first: labels, masks (finding -> box), distances from renders
    (half the limit) and anatomies (two factors, all alike)."""

    def __init__(self, labels, boxes, distances=None, anatomy=None):
        self.labels, self.boxes, self.calls = labels, boxes, 0
        self.distances = distances or [0.5] * len(labels)
        self.anatomy = anatomy or [(1.0, -2.0)] * len(labels)

    def __call__(self, images):
        self.calls += 1
        probabilities = torch.full((len(images), len(LABELS)), 0.02)
        masks = torch.zeros(len(images), len(FINDINGS), *images.shape[-2:], dtype=torch.bool)
        for item, (label, boxes) in enumerate(zip(self.labels, self.boxes, strict=True)):
            probabilities[item, LABELS.index(label)] = 0.84
            for finding, (rows, columns) in boxes.items():
                masks[item, FINDINGS.index(finding), slice(*rows), slice(*columns)] = True
        return Verdict(probabilities, masks, torch.tensor(self.distances), torch.tensor(self.anatomy))


BOX = {"polyp": ((16, 32), (16, 32))}


def polyp_gone(after=None, label="normal cecum", **more):
    return Told(["polyps", label], [BOX, after or {}], **more)


def removed(**more):
    """The score of a pair whose polyp goes, as judges say who are told ``more``."""
    return score_pair(picture(), picture(1), "polyps", "normal cecum", polyp_gone(**more))


def added(box, label="polyps", **more):
    """The score of a pair to whose normal cecum ``box`` comes."""
    told = Told(["normal cecum", label], [{}, box], **more)
    return score_pair(picture(), picture(1), "normal cecum", "polyps", told)


def undyed(after, label="polyps"):
    """The score of a dyed lifted polyp that should lose its dye and stay a polyp."""
    told = Told(["dyed lifted polyps", label], [BOX | {"dye": ((30, 40), (16, 32))}, after])
    return score_pair(picture(), picture(1), "dyed lifted polyps", "polyps", told)


def without_the_polyp(factual):
    """The factual with other pixels in the box and nowhere else."""
    changed = factual.clone()
    changed[:, 16:32, 16:32] = picture(9)[:, 16:32, 16:32]
    return changed


# compare


def test_equal_images_differ_in_nothing():
    assert compare(picture(), picture()) == {
        "ssim": 1.0,
        "psnr_db": 100.0,
        "mean_abs_difference": 0.0,
        "changed_fraction": 0.0,
        "identical": True,
    }


def test_a_shift_of_one_tenth_has_a_psnr_of_twenty():
    image = picture()
    numbers = compare(image, image + 0.1)
    assert numbers["psnr_db"] == pytest.approx(20.0, abs=1e-3)
    assert numbers["mean_abs_difference"] == pytest.approx(0.1)
    assert numbers["changed_fraction"] == 1.0
    assert not numbers["identical"]


def test_a_pixel_has_changed_when_its_channels_differ_by_more_than_eight_levels_on_average():
    image = torch.full((3, 20, 20), 0.5)
    eight, nine, one_channel = image.clone(), image.clone(), image.clone()
    eight[:, :10] += 8 / 255
    nine[:, :10] += 9 / 255
    one_channel[0, :5] += 27 / 255
    assert compare(image, eight)["changed_fraction"] == 0.0
    assert compare(image, nine)["changed_fraction"] == 0.5
    assert compare(image, one_channel)["changed_fraction"] == 0.25


def test_ssim_of_flat_images_is_the_luminance_term_alone():
    a, b = torch.full((3, 32, 32), 0.5), torch.full((3, 32, 32), 0.6)
    expected = (2 * 0.5 * 0.6 + 0.01**2) / (0.5**2 + 0.6**2 + 0.01**2)
    assert compare(a, b)["ssim"] == pytest.approx(expected, abs=1e-4)


def test_the_numbers_of_a_comparison_are_json():
    numbers = compare(picture(), picture())
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers


# One pair


def test_a_pair_whose_finding_went_is_a_flip():
    factual = picture()
    score = score_pair(factual, without_the_polyp(factual), "polyps", "normal cecum", polyp_gone())
    assert score.accepted and score.flipped
    assert (score.factual_label, score.counterfactual_label) == ("polyps", "normal cecum")
    assert score.source_probability == pytest.approx((0.84, 0.02))
    assert score.target_probability == pytest.approx((0.02, 0.84))
    assert score.finding_before == pytest.approx(16 * 16 / SIDE**2)
    assert (score.finding_after, score.finding_left) == (0.0, 0.0)


def test_ssim_outside_is_one_when_only_pixels_of_the_finding_changed():
    factual = picture()
    score = score_pair(factual, without_the_polyp(factual), "polyps", "normal cecum", polyp_gone())
    assert score.ssim_outside == pytest.approx(1.0, abs=1e-6)
    assert score.psnr_outside == 100.0
    assert score.ssim < 0.95
    assert not score.identical
    assert score.mask_fraction == pytest.approx(16 * 16 / SIDE**2)
    # the box grown by a 32nd of the side, and by half of SSIM's window
    assert score.outside_fraction == pytest.approx(1 - (16 + 2 * 2 + 2 * 5) ** 2 / SIDE**2)


def test_a_change_outside_lowers_ssim_outside():
    factual = picture()
    changed = without_the_polyp(factual)
    changed[:, 48:56, 48:56] = 1 - changed[:, 48:56, 48:56]
    score = score_pair(factual, changed, "polyps", "normal cecum", polyp_gone())
    assert score.ssim_outside < 0.99
    assert score.psnr_outside < 40


def test_the_outside_is_what_is_outside_in_both_images():
    factual = picture()
    changed = without_the_polyp(factual)
    changed[:, 48:56, 48:56] = 0.5
    told = polyp_gone({"polyp": ((48, 56), (48, 56))}, label="polyps")
    assert score_pair(factual, changed, "polyps", "normal cecum", told).ssim_outside == pytest.approx(1.0, abs=1e-6)


def test_an_artefact_that_looks_like_another_finding_is_not_left_out():
    factual = picture()
    changed = without_the_polyp(factual)
    changed[:, 48:56, 48:56] = 0.5
    told = polyp_gone({"erosions": ((48, 56), (48, 56))})
    assert score_pair(factual, changed, "polyps", "normal cecum", told).ssim_outside < 0.99


def test_there_is_no_outside_when_the_finding_covers_two_fifths():
    told = Told(["ulcerative colitis", "normal cecum"], [{"erosions": ((0, 40), (0, 64))}, {}])
    score = score_pair(picture(), picture(1), "ulcerative colitis", "normal cecum", told)
    assert score.mask_fraction == pytest.approx(40 / 64)
    assert score.ssim_outside is None and score.psnr_outside is None


def test_the_mask_is_counted_in_the_lit_field_and_not_in_its_black_surround():
    factual = picture()
    factual[:, :, :16] = factual[:, :, -16:] = 0.015
    told = polyp_gone()
    told.boxes = [{"polyp": ((16, 48), (20, 44))}, {}]
    score = score_pair(factual, factual, "polyps", "normal cecum", told)
    # the smoothed edge of the field lies within two pixels of the true one
    assert 32 * 24 / (64 * 36) <= score.mask_fraction <= 32 * 24 / (64 * 32)


def test_there_is_no_outside_when_scattered_findings_leave_no_window():
    # 64 small spots cover little, but no 11x11 window lies clear of them
    class Scattered(Told):
        def __call__(self, images):
            verdict = super().__call__(images)
            verdict.masks[0, FINDINGS.index("polyp"), 4::8, 4::8] = True
            return verdict

    told = Scattered(["polyps", "normal cecum"], [{}, {}])
    score = score_pair(picture(), picture(), "polyps", "normal cecum", told)
    assert score.mask_fraction < evaluate.MASK_LIMIT
    assert score.outside_fraction == 0 and score.ssim_outside is None
    assert score.misses == ("mask",) and not score.flipped


def test_a_label_that_flips_while_a_finding_is_left_is_no_flip():
    left = {"polyp": ((0, 4), (0, 4))}
    score = score_pair(picture(), picture(1), "polyps", "normal cecum", polyp_gone(left))
    assert score.counterfactual_label == "normal cecum"
    assert score.finding_left == pytest.approx(16 / SIDE**2) and score.finding_left >= evaluate.FINDING_LEFT_LIMIT
    assert not score.flipped


def test_a_few_stray_pixels_do_not_spoil_a_flip():
    score = score_pair(picture(), picture(1), "polyps", "normal cecum", polyp_gone({"polyp": ((0, 2), (0, 5))}))
    assert 0 < score.finding_left < evaluate.FINDING_LEFT_LIMIT
    assert score.flipped


def test_a_new_finding_is_no_flip_either():
    score = score_pair(picture(), picture(1), "polyps", "normal cecum", polyp_gone({"streaks": ((0, 8), (0, 8))}))
    assert (score.finding_after, score.finding_left) == (0.0, pytest.approx(64 / SIDE**2))
    assert not score.flipped


def test_a_finding_that_the_target_has_may_stay():
    score = undyed(BOX)
    assert score.finding_after == pytest.approx(256 / SIDE**2)
    assert score.finding_left == 0.0
    assert score.flipped


# Each criterion alone decides


def test_a_pair_that_meets_every_criterion_is_a_flip():
    for score in (removed(), added(BOX), undyed(BOX)):
        assert score.accepted and score.flipped and score.misses == ()


@pytest.mark.parametrize(
    ("missed", "told"),
    [
        ("label", {"label": "normal pylorus"}),
        ("finding left", {"after": {"polyp": ((0, 8), (0, 8))}}),
        ("distance", {"distances": [0.5, 1.0]}),
        ("distance", {"distances": [0.5, math.nan]}),
        ("mask", {"boxes": {"polyp": ((0, 40), (0, 64))}}),
    ],
)
def test_a_pair_that_misses_one_criterion_is_no_flip(missed, told):
    boxes = told.pop("boxes", BOX)
    judges = polyp_gone(**told)
    judges.boxes[0] = boxes
    score = score_pair(picture(), picture(1), "polyps", "normal cecum", judges)
    assert score.accepted
    assert score.misses == (missed,)
    assert not score.flipped


def test_a_counterfactual_just_below_the_distance_limit_is_a_flip():
    assert removed(distances=[0.5, 0.999]).flipped
    assert removed(distances=[0.25, 0.75]).distance == (0.25, 0.75)


def test_masks_over_two_fifths_of_the_field_are_no_flip_and_just_under_are():
    for rows, flipped in ((26, False), (25, True)):  # of 64: 0.406 and 0.391
        judges = polyp_gone()
        judges.boxes[0] = {"polyp": ((0, rows), (0, 64))}
        score = score_pair(picture(), picture(1), "polyps", "normal cecum", judges)
        assert (score.flipped, score.ssim_outside is not None) == (flipped, flipped)


def test_an_added_finding_must_be_found():
    assert added(BOX).finding_added is True
    for box in ({}, {"polyp": ((0, 5), (0, 8))}):  # 0.0098 of the picture, below the limit of 0.01
        score = added(box)
        assert score.finding_added is False
        assert score.misses == ("finding not added",) and not score.flipped
    assert added({"polyp": ((0, 6), (0, 7))}).flipped


def test_every_added_finding_must_be_found():
    for box, found in (({"dye": ((0, 16), (0, 16))}, True), ({}, False)):
        told = Told(["polyps", "dyed lifted polyps"], [BOX, BOX | box])
        score = score_pair(picture(), picture(1), "polyps", "dyed lifted polyps", told)
        assert (score.finding_added, score.flipped) == (found, found)


def test_a_wrong_finding_beside_the_added_one_is_no_flip():
    assert added(BOX | {"erosions": ((40, 60), (40, 60))}).misses == ("finding left",)


# What went, what stayed


def test_the_dye_goes_and_the_polyp_is_kept():
    score = undyed({"polyp": ((16, 32), (24, 40))})
    assert score.finding_gone and score.finding_kept is True and score.finding_added is None
    # two 16 pixel boxes that share a half: 128 of 384
    assert score.kept_overlap == pytest.approx(1 / 3)


def test_a_polyp_that_goes_with_its_dye_is_not_kept():
    score = undyed({})
    assert score.finding_gone and score.finding_kept is False
    assert score.kept_overlap == 0.0


def test_dye_that_stays_is_not_gone_although_the_polyp_is_kept():
    score = undyed(BOX | {"dye": ((30, 40), (16, 32))})
    assert not score.finding_gone and score.finding_kept is True
    assert not score.flipped


def test_a_new_finding_does_not_make_the_old_one_stay():
    score = removed(after={"streaks": ((0, 8), (0, 8))})
    assert score.finding_gone and score.finding_left > 0


def test_classes_that_share_no_finding_keep_none():
    score = removed()
    assert score.finding_gone and score.finding_kept is None and score.kept_overlap is None


# Drift


def test_anatomy_drift_is_the_mean_over_factors_of_the_absolute_difference_in_errors():
    score = removed(anatomy=[(1.0, -2.0, 0.0), (1.5, -3.0, 0.0)])
    assert score.anatomy_drifts == pytest.approx((0.5, 1.0, 0.0))
    assert score.anatomy_drift == pytest.approx(0.5)
    assert removed().anatomy_drift == 0.0


def test_off_target_drift_sums_what_the_labels_that_are_neither_source_nor_target_gain_and_lose():
    assert removed().off_target_drift == pytest.approx(0.0, abs=1e-6)
    # ulcerative colitis goes from 0.02 to 0.84
    assert removed(label="ulcerative colitis").off_target_drift == pytest.approx(0.82)
    assert removed(label="none of these").off_target_drift == pytest.approx(0.82)


def test_overlapping_findings_count_once():
    told = Told(["dyed lifted polyps", "normal cecum"], [BOX | {"dye": ((24, 40), (16, 32))}, {}])
    score = score_pair(picture(), picture(1), "dyed lifted polyps", "normal cecum", told)
    assert score.finding_before == pytest.approx(24 * 16 / SIDE**2)


def test_another_label_than_the_target_is_no_flip():
    assert not score_pair(picture(), picture(1), "polyps", "normal cecum", polyp_gone(label="normal pylorus")).flipped


def test_a_factual_of_another_class_is_not_accepted():
    told = Told(["normal cecum", "normal cecum"], [{}, {}])
    score = score_pair(picture(), picture(), "polyps", "normal cecum", told)
    assert not score.accepted
    assert score.identical


def test_a_factual_unlike_any_render_is_not_accepted():
    assert not removed(distances=[1.0, 0.5]).accepted
    assert removed(distances=[0.99, 0.5]).accepted
    # what the counterfactual is like does not matter for that
    assert removed(distances=[0.5, 3.0]).accepted


def test_a_batch_gives_the_scores_of_its_pairs_with_one_call_of_the_judges():
    factuals = torch.stack([picture(0), picture(1)])
    counterfactuals = torch.stack([without_the_polyp(picture(0)), picture(2)])
    anatomy = [(0.0, 0.0), (1.0, 1.0), (0.5, 0.0), (3.0, 1.0)]
    told = Told(["polyps", "polyps", "normal cecum", "polyps"], [BOX, BOX, {}, BOX], [0.1, 0.2, 0.3, 0.4], anatomy)
    scores = score_pairs(factuals, counterfactuals, "polyps", "normal cecum", told)
    assert told.calls == 1
    assert [score.flipped for score in scores] == [True, False]
    alone = [
        score_pair(
            factuals[item],
            counterfactuals[item],
            "polyps",
            "normal cecum",
            polyp_gone(box, label, distances=told.distances[item::2], anatomy=anatomy[item::2]),
        )
        for item, box, label in ((0, {}, "normal cecum"), (1, BOX, "polyps"))
    ]
    assert [score.distance[1] for score in alone] == pytest.approx([0.3, 0.4])
    assert [score.anatomy_drift for score in alone] == pytest.approx([0.25, 1.0])
    for together, one in zip(scores, alone, strict=True):
        for name in one.to_dict():
            assert getattr(together, name) == pytest.approx(getattr(one, name), abs=1e-5), name


def test_a_score_becomes_json_with_four_decimals():
    score = score_pair(picture(), picture(1), "polyps", "normal cecum", polyp_gone())
    record = json.loads(json.dumps(score.to_dict(), allow_nan=False))
    assert record["source_probability"] == [0.84, 0.02]
    assert record["finding_before"] == 0.0625
    assert record["ssim"] == round(score.ssim, 4)
    assert record["flipped"] is True and record["source"] == "polyps"
    assert (record["distance"], record["anatomy_drifts"], record["misses"]) == ([0.5, 0.5], [0.0, 0.0], [])


def test_a_distance_that_is_not_a_number_still_becomes_json():
    assert json.loads(json.dumps(removed(distances=[0.5, math.inf]).to_dict(), allow_nan=False))["distance"] == [
        0.5,
        None,
    ]


def test_the_embedded_judges_are_read_once(monkeypatch):
    from medsteer_core.endophantom.bundle import Bundle

    made = []
    monkeypatch.setattr(Bundle, "judges", lambda self: made.append(polyp_gone()) or made[-1])
    evaluate.embedded_judges.cache_clear()
    try:
        for _ in range(2):
            assert score_pair(picture(), picture(), "polyps", "normal cecum").accepted
        assert len(made) == 1 and made[0].calls == 2
    finally:
        evaluate.embedded_judges.cache_clear()


def test_every_class_has_its_findings_and_every_finding_a_class():
    assert set(FINDINGS_OF) == set(CLASSES)
    assert {finding for findings in FINDINGS_OF.values() for finding in findings} == set(FINDINGS)
    assert all(bool(findings) != name.startswith("normal") for name, findings in FINDINGS_OF.items())


# What does not fit


@pytest.mark.parametrize(
    ("factual", "counterfactual", "words"),
    [
        (picture(), picture(side=32), "factual has shape (3, 64, 64) and the counterfactual (3, 32, 32)"),
        (picture().movedim(0, -1), picture(), "image.movedim(-1, -3)"),
        (picture()[:1], picture()[:1], "(3, height, width)"),
        (picture()[None], picture()[None], "factual has shape (1, 3, 64, 64)"),
        (picture(side=10), picture(side=10), "11 pixels or more"),
        (picture(), picture().index_fill(1, torch.tensor([3]), math.nan), "counterfactual has 192 values that are not"),
        (picture() * 255, picture(), "0..1 was expected"),
        (picture(), picture() * 2 - 1.6, "counterfactual has values from"),
    ],
)
def test_images_that_do_not_fit_are_refused_by_name(factual, counterfactual, words):
    for call in (compare, lambda a, b: score_pair(a, b, "polyps", "normal cecum", polyp_gone())):
        with pytest.raises(MedSteerError) as error:
            call(factual, counterfactual)
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("polyp", "normal cecum", "the source class is 'polyp'; one of these was expected: dyed lifted polyps"),
        ("polyps", "none of these", "the target class is 'none of these'"),
        ("polyps", "polyps", "two different classes"),
    ],
)
def test_classes_that_do_not_fit_are_refused_by_name(source, target, words):
    with pytest.raises(MedSteerError) as error:
        score_pair(picture(), picture(), source, target, polyp_gone())
    assert words in str(error.value)


def test_an_empty_batch_is_refused():
    with pytest.raises(MedSteerError, match="factual has shape"):
        score_pairs(torch.zeros(0, 3, 64, 64), torch.zeros(0, 3, 64, 64), "polyps", "normal cecum", polyp_gone())


# Many pairs


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    [
        (8, 10, (0.4902, 0.9433)),
        (0, 10, (0.0, 0.2775)),
        (10, 10, (0.7225, 1.0)),
        (50, 100, (0.4038, 0.5962)),
        (0, 0, (0.0, 1.0)),
    ],
)
def test_wilson_gives_the_published_intervals(successes, n, expected):
    assert wilson(successes, n) == pytest.approx(expected, abs=5e-5)


def test_wilson_is_wider_at_a_higher_confidence():
    low, high = wilson(8, 10, 0.99)
    assert low < wilson(8, 10)[0] and high > wilson(8, 10)[1]


@pytest.mark.parametrize("arguments", [(3, 2), (-1, 2), (1, 2, 1.0)])
def test_wilson_refuses_what_is_no_share(arguments):
    with pytest.raises(MedSteerError, match="0 <= successes <= n"):
        wilson(*arguments)


GOOD = PairScore(
    source="polyps",
    target="normal cecum",
    factual_label="polyps",
    counterfactual_label="normal cecum",
    source_probability=(0.9, 0.1),
    target_probability=(0.1, 0.9),
    distance=(0.4, 0.6),
    finding_before=0.1,
    finding_after=0.0,
    finding_left=0.0,
    finding_gone=True,
    finding_kept=None,
    kept_overlap=None,
    finding_added=None,
    accepted=True,
    flipped=True,
    misses=(),
    ssim_outside=0.9,
    psnr_outside=30.0,
    mask_fraction=0.2,
    outside_fraction=0.6,
    anatomy_drift=0.3,
    anatomy_drifts=(0.2, 0.4),
    off_target_drift=0.1,
    ssim=0.8,
    changed_fraction=0.3,
    identical=False,
)


def test_a_summary_is_over_accepted_pairs():
    kept = replace(GOOD, flipped=False, finding_after=0.1, finding_left=0.2, ssim_outside=0.7, psnr_outside=20.0)
    foreign = replace(GOOD, accepted=False, ssim_outside=0.0, psnr_outside=0.0, changed_fraction=1.0)
    summary = summarise([GOOD, GOOD, GOOD, kept, foreign])
    assert (summary["n"], summary["accepted"], summary["flips"], summary["flip_rate"]) == (5, 4, 3, 0.75)
    assert summary["flip_rate_interval"] == [round(bound, 4) for bound in wilson(3, 4)]
    assert summary["ssim_outside"] == pytest.approx(0.85)
    assert summary["psnr_outside"] == pytest.approx(27.5)
    assert summary["finding_after"] == pytest.approx(0.025)
    assert summary["finding_left"] == pytest.approx(0.05)
    assert summary["changed_fraction"] == pytest.approx(0.3)


def test_the_bootstrap_interval_holds_the_mean_and_is_the_same_every_time():
    scores = [replace(GOOD, ssim_outside=0.5 + 0.01 * i) for i in range(40)]
    first, second = summarise(scores), summarise(scores)
    low, high = first["ssim_outside_interval"]
    assert first == second
    assert low < first["ssim_outside"] < high
    # standard error of the mean: 0.1154 / sqrt(40)
    assert high - low == pytest.approx(2 * 1.96 * 0.1154 / math.sqrt(40), rel=0.1)


def test_a_summary_has_the_drifts_of_accepted_pairs_with_an_interval():
    scores = [replace(GOOD, anatomy_drift=0.2 + 0.01 * i, off_target_drift=0.05 * (i % 2)) for i in range(40)]
    summary = summarise([*scores, replace(GOOD, accepted=False, anatomy_drift=9.0, off_target_drift=9.0)])
    assert summary["anatomy_drift"] == pytest.approx(0.395)
    low, high = summary["anatomy_drift_interval"]
    assert low < 0.395 < high
    assert high - low == pytest.approx(2 * 1.96 * 0.1154 / math.sqrt(40), rel=0.1)
    assert summary["off_target_drift"] == pytest.approx(0.025)


def test_a_summary_says_how_many_fail_by_distance_and_by_mask():
    far = replace(GOOD, flipped=False, misses=("distance",), distance=(0.4, 1.4))
    both = replace(GOOD, flipped=False, misses=("distance", "mask"), distance=(0.4, 1.4))
    summary = summarise([GOOD, GOOD, far, both])
    assert (summary["over_distance_limit"], summary["over_mask_limit"]) == (0.5, 0.25)
    assert summary["distance"] == pytest.approx(1.0)


DYED = replace(GOOD, source="dyed lifted polyps", target="polyps", finding_kept=True, kept_overlap=0.8)


def test_the_kept_rate_is_among_those_whose_finding_is_gone():
    lost = replace(DYED, finding_kept=False, kept_overlap=0.0)
    stays = replace(DYED, finding_gone=False, flipped=False, misses=("finding left",))
    foreign = replace(DYED, accepted=False, finding_gone=False)
    summary = summarise([DYED, DYED, DYED, lost, stays, foreign])
    assert summary["finding_gone"] == 0.8
    assert summary["finding_gone_interval"] == [round(bound, 4) for bound in wilson(4, 5)]
    assert summary["finding_kept"] == 0.75
    assert summary["finding_kept_interval"] == [round(bound, 4) for bound in wilson(3, 4)]
    assert summary["kept_overlap"] == pytest.approx(0.64)
    assert summary["finding_added"] is None


def test_adding_has_a_rate_of_added_and_none_of_gone_or_kept():
    new = replace(GOOD, source="normal cecum", target="polyps", finding_added=True)
    summary = summarise([new, new, replace(new, finding_added=False, flipped=False, misses=("finding not added",))])
    assert summary["finding_added"] == pytest.approx(0.6667)
    assert summary["finding_added_interval"] == [round(bound, 4) for bound in wilson(2, 3)]
    assert summary["finding_gone"] is None and summary["finding_kept"] is None


@pytest.mark.parametrize(
    ("source", "target", "measure"),
    [
        ("polyps", "normal cecum", "ssim_outside"),
        ("dyed lifted polyps", "polyps", "ssim_outside"),
        ("ulcerative colitis", "normal cecum", "anatomy_drift"),
        ("normal cecum", "ulcerative colitis", "anatomy_drift"),
    ],
)
def test_structure_is_measured_by_anatomy_where_the_finding_is_diffuse(source, target, measure):
    assert summarise([replace(GOOD, source=source, target=target)])["structure"] == measure


def test_pairs_of_several_classes_make_no_summary():
    with pytest.raises(MedSteerError, match="dyed lifted polyps -> polyps; polyps -> normal cecum; one source"):
        summarise([GOOD, DYED])


def test_pairs_without_an_outside_are_counted_out_of_its_mean():
    summary = summarise([GOOD, replace(GOOD, ssim_outside=None, psnr_outside=None)])
    assert (summary["ssim_outside"], summary["ssim_outside_n"], summary["psnr_outside"]) == (0.9, 1, 30.0)


@pytest.mark.parametrize("scores", [[], [replace(GOOD, accepted=False)]])
def test_a_summary_of_no_accepted_pair_has_no_rate(scores):
    summary = summarise(scores)
    assert summary["flip_rate"] is None and summary["ssim_outside"] is None
    assert summary["flip_rate_interval"] == [0.0, 1.0]
    assert summary["ssim_outside_interval"] is None and summary["anatomy_drift_interval"] is None
    assert summary["finding_gone"] is None and summary["finding_gone_interval"] == [0.0, 1.0]
    json.dumps(summary, allow_nan=False)


# The noise ceiling


class Truthful:
    """Judges that know renders by their truth: they are told source, then target, for each 16 anatomies."""

    def __init__(self, source, target):
        self.classes, self.images = (source, target), []

    def __call__(self, images):
        self.images.append(images)
        n = len(images) // 2
        labels = [name for name in self.classes for _ in range(n)]
        return Told(labels, [dict.fromkeys(FINDINGS_OF[name], ((16, 32), (16, 32))) for name in labels])(images)


def test_the_ceiling_is_one_anatomy_as_both_classes_with_other_sensor_noise():
    told = Truthful("polyps", "normal cecum")
    ceiling = evaluate.noise_ceiling("polyps", "normal cecum", n=2, seed=3, size=64, judges=told)
    with_polyp, without = told.images[0].chunk(2)
    anatomy = Anatomy.sample(2, 3)
    noise = [
        (image - render(anatomy, name, 64, noise_seed=None).image).flatten()
        for image, name in ((with_polyp, "polyps"), (without, "normal cecum"))
    ]
    assert all(0.005 < values.std() < 0.011 for values in noise)
    assert abs(torch.corrcoef(torch.stack(noise))[0, 1]) < 0.1
    assert (ceiling["n"], ceiling["accepted"], ceiling["flip_rate"], ceiling["anatomy_drift"]) == (2, 2, 1.0, 0.0)
    assert 0.5 < ceiling["ssim_outside"] < 0.999 and 20 < ceiling["psnr_outside"] < 60


def test_the_ceiling_is_the_same_every_time_and_another_for_another_seed():
    first, again, other = (
        evaluate.noise_ceiling("polyps", "normal cecum", 2, seed, 64, Truthful("polyps", "normal cecum"))
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_a_large_ceiling_is_judged_in_parts():
    told = Truthful("normal cecum", "polyps")
    assert evaluate.noise_ceiling("normal cecum", "polyps", n=18, size=32, judges=told)["n"] == 18
    assert [len(images) for images in told.images] == [32, 4]


@pytest.mark.parametrize(("target", "n", "words"), [("cecum", 2, "the target class"), ("normal cecum", 0, "n = 0")])
def test_a_ceiling_of_nothing_is_refused(target, n, words):
    with pytest.raises(MedSteerError, match=words):
        evaluate.noise_ceiling("polyps", target, n=n)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("An endoscopic image of polyps", "polyps"), ("Dyed lifted polyps", "dyed lifted polyps")],
)
def test_a_prompt_names_its_longest_class(prompt, expected):
    assert evaluate.class_of(prompt) == expected


def test_a_prompt_without_a_class_is_refused():
    with pytest.raises(MedSteerError, match="names no class"):
        evaluate.class_of("a cat")


def test_a_comparison_in_words_names_its_numbers():
    image = picture()
    same = image_pairs.compare_pairs(image[None], image[None])
    assert image_pairs.in_words(same) == "SSIM 1.000, PSNR 100.0 dB, 0.0% of pixels changed"
    two = image_pairs.compare_pairs(torch.stack([image, image]), torch.stack([image, image]))
    assert image_pairs.in_words(two).startswith("mean of 2 pairs: SSIM 1.000")
