"""Evaluations of pairs and controls: numbers by hand, with judges that say what the test tells them."""

import json
from dataclasses import replace

import pytest
import torch

from medsteer_core.dataset.records import COUNTERFACTUAL, RANDOM, REPROMPT, STRENGTH_ZERO
from medsteer_core.errors import MedSteerError
from medsteer_core.evaluation import report as evaluation
from medsteer_core.evaluation import table as evaluation_table
from medsteer_core.evaluation.plot import WIDTH, evaluation_picture
from medsteer_core.evaluation.report import evaluate_batches, report, scored
from medsteer_core.evaluation.table import flip_rate
from medsteer_core.judges.judge import Answers, Terms
from medsteer_core.scores.pair import PairScore
from medsteer_core.scores.scorer import score_pairs, summarise, wilson

SIDE = 64
SOURCE, TARGET = "polyps", "normal cecum"
TERMS = Terms(labels=(SOURCE, TARGET, "ulcer"), classes=(SOURCE, TARGET, "ulcer"))


class ByRed:
    """A judge without a segmenter that reads an image's mean red as the probability of polyps, its mean green as that
    of normal cecum; the rest is ulcer."""

    terms, identity = TERMS, "by red"

    def __call__(self, images):
        red, green = images[:, 0].mean((1, 2)), images[:, 1].mean((1, 2))
        return Answers(torch.stack([red, green, 1 - red - green], dim=1))


@pytest.fixture(autouse=True)
def no_lpips(monkeypatch):
    monkeypatch.setattr(evaluation, "load_lpips", lambda: (None, "LPIPS was not measured: by the test"))


def flat(red, green):
    """A picture (3, 64, 64) of one colour."""
    return torch.tensor([red, green, 0.0]).view(3, 1, 1).expand(3, SIDE, SIDE).clone()


POLYP, CECUM, ULCER = flat(0.7, 0.2), flat(0.1, 0.75), flat(0.1, 0.1)


def batches(**arms):
    """The report of four factual images, one of them an ulcer, and of the arms' four images each."""
    names = {"steered": COUNTERFACTUAL, "zero": STRENGTH_ZERO, "drawn": RANDOM, "prompt": REPROMPT}
    factuals = torch.stack([POLYP, POLYP, POLYP, ULCER])
    return evaluate_batches(
        factuals, {names[key]: torch.stack(images) for key, images in arms.items()}, SOURCE, TARGET, ByRed()
    )


def arm(found, name):
    return next(one for one in found["arms"] if one["arm"] == name)


def test_the_flip_rate_counts_only_factuals_that_the_judge_calls_the_source_class():
    found = arm(batches(steered=[CECUM, CECUM, POLYP, CECUM]), COUNTERFACTUAL)
    assert (found["n"], found["accepted"], found["flips"]) == (4, 3, 2)  # the ulcer's cecum does not count
    assert found["flip_rate"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["flip_rate_interval"] == pytest.approx(wilson(2, 3), abs=1e-4)


def test_score_change_and_drift_are_what_the_judge_says_by_hand():
    found = batches(steered=[CECUM, CECUM, POLYP, CECUM])
    own = arm(found, COUNTERFACTUAL)
    # 0.2 -> 0.75 twice and not at all; the ulcer's probability 0.1 -> 0.15 twice
    assert own["target_change"] == pytest.approx(2 * 0.55 / 3, abs=1e-4) and own["target_change_n"] == 3
    assert own["off_target_drift"] == pytest.approx(2 * 0.05 / 3, abs=1e-4)
    low, high = own["target_change_interval"]
    assert 0 <= low < own["target_change"] < high <= 0.5501
    assert [pair["target_change"] for pair in found["pairs"]] == pytest.approx([0.55, 0.55, 0.0, 0.65], abs=1e-4)


def test_an_arms_record_is_the_scorers_own_summary():
    images = torch.stack([CECUM, CECUM, POLYP, CECUM])
    found = arm(batches(steered=list(images)), COUNTERFACTUAL)
    factuals = torch.stack([POLYP, POLYP, POLYP, ULCER])
    wanted = summarise(score_pairs(factuals, images, SOURCE, TARGET, ByRed()))
    assert {name: found[name] for name in wanted} == wanted


def test_the_null_test_passes_only_when_every_pair_of_strength_0_is_identical():
    same = [POLYP, POLYP, POLYP, ULCER]
    nothing = {"passed": None, "pairs": 0, "identical": 0, "largest_difference": None}
    assert batches(steered=same)["null_test"] == nothing
    found = batches(steered=same, zero=same)
    assert found["null_test"] == {"passed": True, "pairs": 4, "identical": 4, "largest_difference": 0.0}
    assert arm(found, STRENGTH_ZERO)["verdict"] == "as expected"
    off = ULCER.clone()
    off[0, 0, 0] += 1e-6  # in a pair that flip rates do not count
    found = batches(steered=same, zero=[POLYP, POLYP, POLYP, off])
    null = found["null_test"]
    assert (null["passed"], null["identical"]) == (False, 3)
    assert null["largest_difference"] == pytest.approx(1e-6, rel=0.1)
    assert arm(found, STRENGTH_ZERO)["verdict"] == "not as expected"
    assert "up to 0.00025 of 255 levels. That is rounding" in evaluation_table.null_test(found)
    assert "rounding" not in evaluation_table.null_test(batches(steered=same, zero=[CECUM, *same[1:]]))


def pair(name, flipped=True, kept=0.9, before=0.1, after=0.9):
    """A scored pair of the embedded judge's kind."""
    known = {
        "source": SOURCE, "target": TARGET, "factual_label": SOURCE, "counterfactual_label": TARGET,
        "source_probability": (0.9, 0.1), "target_probability": (before, after), "accepted": True, "flipped": flipped,
        "misses": () if flipped else ("label",), "ssim_outside": kept, "psnr_outside": 30.0, "off_target_drift": 0.0,
        "ssim": kept, "changed_fraction": 0.1, "identical": False,
    }  # fmt: skip
    rest = dict.fromkeys(PairScore.__dataclass_fields__)
    return evaluation.Scored(name, "1", PairScore(**{**rest, **known, "not_judged": ()}), None, "segmenter")


@pytest.mark.parametrize(
    ("flips", "verdict"), [(0, "as expected"), (10, "undecided"), (20, "undecided")], ids=lambda value: str(value)
)
def test_a_random_direction_is_as_expected_when_its_interval_lies_below(flips, verdict):
    steered = [pair(COUNTERFACTUAL, item < 16) for item in range(20)]  # 0.58 to 0.92
    drawn = [pair(RANDOM, item < flips) for item in range(20)]  # 0 to 0.16, 0.30 to 0.70, 0.84 to 1
    found = report([*steered, *drawn], ByRed())
    assert arm(found, RANDOM)["verdict"] == verdict
    if flips == 20:
        fewer = [pair(COUNTERFACTUAL, item < 4) for item in range(20)]
        assert arm(report([*fewer, *drawn], ByRed()), RANDOM)["verdict"] == "not as expected"


def test_a_re_prompt_is_as_expected_when_it_keeps_less():
    steered, worse, better = (
        [pair(name, kept=kept + 0.001 * item) for item in range(6)]
        for name, kept in ((COUNTERFACTUAL, 0.9), (REPROMPT, 0.3), (REPROMPT, 0.95))
    )
    assert arm(report([*steered, *worse], ByRed()), REPROMPT)["verdict"] == "as expected"
    assert arm(report([*steered, *better], ByRed()), REPROMPT)["verdict"] == "not as expected"
    assert arm(report(worse, ByRed()), REPROMPT)["verdict"] == "undecided"  # nothing to compare with


def test_of_a_drift_less_is_kept_more():
    def drifting(name, amount):
        made = pair(name)
        values = {"source": "ulcerative colitis", "target": TARGET, "anatomy_drift": amount}
        return replace(made, score=replace(made.score, **values))

    pairs = [drifting(COUNTERFACTUAL, 0.2), drifting(COUNTERFACTUAL, 0.3), drifting(REPROMPT, 2.0)]
    found = report(pairs, ByRed())
    assert found["structure"] == "anatomy_drift" and arm(found, COUNTERFACTUAL)["kept"] == pytest.approx(0.25)
    assert arm(found, REPROMPT)["verdict"] == "as expected"


# Masks


def test_outside_is_of_the_given_mask_where_the_judge_marks_nothing():
    factual, changed = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.3, None
    changed = factual.clone()
    changed[:, 20:30, 20:30] = 0.1
    mask = torch.zeros(SIDE, SIDE)
    mask[20:30, 20:30] = 0.3
    judge = ByRed()
    plain = scored(factual, changed, SOURCE, TARGET, judge)
    assert plain.score.ssim_outside is None and plain.mask_source == "none"
    assert "findings and the outside of them: the judge has no segmenter" in plain.score.not_judged
    given = scored(factual, changed, SOURCE, TARGET, judge, mask=mask, mask_source="concept map")
    assert given.score.ssim_outside == pytest.approx(1.0) and given.score.psnr_outside == 100.0
    assert given.score.mask_fraction == pytest.approx(100 / SIDE**2) and given.mask_source == "concept map"
    assert "findings: the judge has no segmenter" in given.score.not_judged
    assert given.score.structure == "ssim_outside"
    # 0.3 is of a concept map's finding, and not of a mask that somebody drew: then the change is outside
    drawn = scored(factual, changed, SOURCE, TARGET, judge, mask=mask, mask_source="user")
    assert drawn.score.mask_fraction == 0 and drawn.score.ssim_outside < 0.99


def test_psnr_outside_a_mask_by_hand():
    factual = torch.full((3, SIDE, SIDE), 0.5)
    changed = factual + 0.1
    mask = torch.zeros(SIDE, SIDE)
    mask[:8, :8] = 1
    found = scored(factual, changed, SOURCE, TARGET, ByRed(), mask=mask)
    assert found.score.psnr_outside == pytest.approx(20.0, abs=1e-3)  # -10 log10(0.1 ** 2)
    assert found.score.outside_fraction == pytest.approx(1 - 13**2 / SIDE**2)  # half of SSIM's window is kept clear of


def test_a_judges_own_segmenter_comes_before_a_given_mask():
    findings = {SOURCE: ("polyp",), TARGET: (), "ulcer": ()}

    class Marking(ByRed):
        terms = replace(TERMS, findings=("polyp",), findings_of=findings)

        def __call__(self, images):
            masks = torch.zeros(len(images), 1, SIDE, SIDE)
            masks[:, :, :16, :16] = 1
            return replace(super().__call__(images), masks=masks)

    everything = torch.ones(SIDE, SIDE)
    with_mask = scored(POLYP, CECUM, SOURCE, TARGET, Marking(), mask=everything)
    without = scored(POLYP, CECUM, SOURCE, TARGET, Marking())
    assert with_mask == without and without.mask_source == "segmenter"
    assert without.score.mask_fraction == pytest.approx(16**2 / SIDE**2)


def test_a_report_says_where_masks_came_from():
    pairs = [pair(COUNTERFACTUAL), replace(pair(COUNTERFACTUAL), mask_source="concept map")]
    found = report(pairs, ByRed())
    assert found["mask_source"] == "concept map + segmenter"
    assert "Outside: of the concept map and the segmenter's masks." in evaluation_table.text(found)


# What is refused


def test_counts_that_do_not_fit_are_refused_by_the_inputs_name():
    with pytest.raises(MedSteerError, match="random_direction has 3 images and factual 4; one for each"):
        batches(drawn=[POLYP] * 3)
    with pytest.raises(MedSteerError, match=r"mask has shape \(2, 64, 64\); \(1 or 1, height, width\)"):
        evaluate_batches(
            POLYP[None], {COUNTERFACTUAL: CECUM[None]}, SOURCE, TARGET, ByRed(), mask=torch.zeros(2, SIDE, SIDE)
        )


def test_no_pairs_several_classes_and_unknown_masks_are_refused():
    with pytest.raises(MedSteerError, match="There are no pairs"):
        report([], ByRed())
    with pytest.raises(MedSteerError, match="one source and target"):
        other = pair(COUNTERFACTUAL)
        report([other, replace(other, score=replace(other.score, source="ulcer"))], ByRed())
    with pytest.raises(MedSteerError, match="mask_source is 'guess'"):
        scored(POLYP, CECUM, SOURCE, TARGET, ByRed(), mask=torch.zeros(8, 8), mask_source="guess")
    with pytest.raises(MedSteerError, match="masks have shape"):
        score_pairs(POLYP[None], CECUM[None], SOURCE, TARGET, ByRed(), torch.zeros(1, 8, 8))


# Table and picture


def test_the_table_gives_denominators_the_null_test_and_what_was_not_measured():
    found = batches(steered=[CECUM, CECUM, POLYP, CECUM], zero=[POLYP, POLYP, POLYP, ULCER])
    words = evaluation_table.text(found)
    assert "2/3 = 67% (21% to 94%)" in words and "+0.37" in words
    assert "counterfactual: 3 of 4 pairs counted, whose factual the judge calls 'polyps'" in words
    assert "Null test: passed, 4 of 4 pairs of strength 0 are identical." in words
    assert "LPIPS was not measured" in words and "the judge has no segmenter" in words
    cells = evaluation_table.rows(found)
    assert len({len(row) for row in cells}) == 1 and "LPIPS" not in cells[0]
    lines = [line for line in evaluation_table.markdown(found).splitlines() if line.startswith("|")]
    assert len(lines) == 4 and lines[2].startswith("| counterfactual | 2/3 = 67%")


def test_reports_are_json_and_the_csv_has_every_pair():
    found = batches(steered=[CECUM] * 4, drawn=[POLYP] * 4)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    rows = evaluation_table.pairs_csv([found]).splitlines()
    assert len(rows) == 9 and rows[1].startswith("polyps,normal cecum,counterfactual,1,1,1,")


def test_the_picture_has_a_row_for_each_arm_and_at_most_six_reports():
    one = batches(steered=[CECUM] * 4)
    two = batches(steered=[CECUM] * 4, zero=[POLYP, POLYP, POLYP, ULCER])
    heights = [evaluation_picture([found]).shape[1] for found in (one, two)]
    assert heights[1] - heights[0] == 84 and evaluation_picture([one]).shape[2] == WIDTH
    many = evaluation_picture([one] * 7)
    assert many.shape[1] == 6 * heights[0] + 40


def test_nothing_accepted_is_said_and_drawn():
    found = evaluate_batches(ULCER[None], {COUNTERFACTUAL: CECUM[None]}, SOURCE, TARGET, ByRed())
    assert found["arms"][0]["flip_rate"] is None
    assert "none of 1 counted" in evaluation_table.text(found)
    assert evaluation_picture([found]).shape[2] == WIDTH


@pytest.mark.parametrize(
    ("accepted", "leads"), [(1, "only 1 of 50 pairs counted: 1/1"), (24, "only 24 of 50"), (25, "25/25")]
)
def test_a_rate_of_few_pairs_leads_with_how_few_they_are(accepted, leads):
    low, high = wilson(accepted, accepted)
    arm = {"arm": "counterfactual", "n": 50, "accepted": accepted, "flips": accepted, "flip_rate": 1.0,
           "flip_rate_interval": (low, high)}  # fmt: skip
    assert flip_rate(arm).startswith(leads)
