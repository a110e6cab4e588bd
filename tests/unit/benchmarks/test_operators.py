"""The operators and schedules benchmarks' pure parts: clean flips, the best row, differences of rates, tables."""

import argparse
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.evidence import _operators, _operators_numbers, _operators_plot, _operators_table, operators, schedules
from benchmarks.evidence._operators_numbers import (
    LEAST_SSIM,
    MOST_DRIFT,
    kept,
    newcombe,
    numbers,
    paired_difference,
    ranking,
)
from benchmarks.evidence._store import Result
from benchmarks.shared.presets import PAIRS
from medsteer_core.errors import MedSteerError
from medsteer_core.extraction.samples_record import SampleRecord
from medsteer_core.scores.scorer import PairScore
from medsteer_core.steering.operators import OPERATORS, make_operator
from medsteer_core.vectors.pathology_vector import PathologyVector, SiteDirections

POLYPS, COLITIS = PAIRS[0], PAIRS[1]


def score(flipped=True, ssim=0.95, drift=0.5, accepted=True, pair=POLYPS) -> PairScore:
    return PairScore(
        pair.source, pair.target, pair.source, pair.target, (0.9, 0.1), (0.1, 0.9), (0.5, 0.5), 0.1, 0.0, 0.0, flipped,
        None, None, None, accepted, flipped, () if flipped else ("label",), ssim, 30.0, 0.1, 0.8, drift, (drift,), 0.01,
        0.9, 0.1, False,
    )  # fmt: skip


def result(*scores: PairScore) -> Result:
    return Result(tuple(range(len(scores))), scores, 1.0)


def row(operator, pair="p", kind="removing", strength=1.0, clean=0.5, ssim=0.95, drift=0.5, flip=0.9, by="lda") -> dict:
    structure = "anatomy_drift" if "diffuse" in kind else "ssim_outside"
    return {
        "operator": operator, "estimator": by, "pair": pair, "kind": kind, "strength": strength, "flip": flip,
        "flip_ci": [0.0, 1.0], "clean_flip": clean, "clean_flip_ci": [0.0, 1.0], "ssim_outside": ssim, "n": 4,
        "anatomy_drift": drift, "structure": structure, "accepted": 4,
    }  # fmt: skip


# Clean flips


@pytest.mark.parametrize(("ssim", "clean"), [(LEAST_SSIM, True), (LEAST_SSIM - 0.001, False), (None, False)])
def test_structure_of_a_focal_pair_is_kept_by_its_ssim_outside(ssim, clean):
    assert kept(score(ssim=ssim, drift=9.0)) is clean


@pytest.mark.parametrize(("drift", "clean"), [(MOST_DRIFT, True), (MOST_DRIFT + 0.001, False), (None, False)])
def test_structure_of_a_diffuse_pair_is_kept_by_its_drift(drift, clean):
    assert kept(score(ssim=0.1, drift=drift, pair=COLITIS)) is clean


def test_a_clean_flip_flipped_and_kept_structure_among_accepted_factuals():
    clean, broken, unflipped = score(), score(ssim=0.5), score(flipped=False)
    found = numbers([result(clean, broken), result(unflipped, clean, score(accepted=False))])
    assert (found["n"], found["accepted"], found["flips"], found["clean"]) == (5, 4, 3, 2)
    assert (found["flip"], found["clean_flip"]) == (0.75, 0.5)
    assert found["clean_flip_ci"] == pytest.approx([0.1500, 0.8500], abs=1e-4)  # Wilson's, of 2 in 4


def test_without_an_accepted_factual_nothing_is_known():
    found = numbers([result(score(accepted=False))])
    assert found["flip"] is None and found["clean_flip"] is None and found["clean_flip_ci"] == [0.0, 1.0]


# The best row


def test_each_row_counts_at_the_strength_that_is_best_for_each_kind():
    rows = [
        row("add", "a", strength=1.0, clean=0.2), row("add", "b", strength=1.0, clean=0.6),
        row("add", "a", strength=2.0, clean=0.9), row("add", "b", strength=2.0, clean=0.1),
        row("add", "c", "adding", 1.0, clean=0.1), row("add", "c", "adding", 2.0, clean=0.3),
    ]  # fmt: skip
    (found,) = ranking(rows)
    # 2 is best for removing (0.5 against 0.4), and not because pair a alone likes it; and for adding
    assert found["strengths"] == {"removing": 2.0, "adding": 2.0}
    assert found["pairs"] == {"a": 0.9, "b": 0.1, "c": 0.3}
    assert found["clean_flip"] == pytest.approx((0.9 + 0.1 + 0.3) / 3, abs=1e-4)


def test_pairs_count_alike_however_many_are_of_a_kind():
    rows = [row("one", name, clean=0.8) for name in "abc"] + [row("one", "d", "adding", clean=0.0)]
    rows += [row("two", name, clean=0.5) for name in "abc"] + [row("two", "d", "adding", clean=0.8)]
    assert [entry["operator"] for entry in ranking(rows)] == ["one", "two"]  # 0.6 and 0.575; by kind it were 0.4, 0.65


def test_ties_go_to_more_structure_outside_and_then_to_less_drift():
    focal = [row("low", ssim=0.91), row("high", ssim=0.97), row("middle", ssim=0.94)]
    assert [entry["operator"] for entry in ranking(focal)] == ["high", "middle", "low"]
    diffuse = [row(name, kind="removing diffuse", drift=drift) for name, drift in (("much", 1.4), ("little", 0.3))]
    assert [entry["operator"] for entry in ranking(diffuse)] == ["little", "much"]


def test_a_row_that_flips_nothing_known_is_last():
    assert [entry["operator"] for entry in ranking([row("unknown", clean=None), row("none", clean=0.0)])][0] == "none"


def test_the_same_operator_with_another_estimator_is_another_row():
    found = ranking([row("add", by="lda", clean=0.1), row("add", by="leace", clean=0.4)])
    assert [(entry["operator"], entry["estimator"]) for entry in found] == [("add", "leace"), ("add", "lda")]


# Differences of rates of the same pairs


@pytest.mark.parametrize(
    ("table", "wanted"),
    [  # Newcombe 1998, Stat. Med. 17, 2635, table II, method 10
        ((36, 12, 2, 0), (0.0569, 0.3404)),
        ((20, 12, 2, 16), (0.0562, 0.3292)),
        ((1, 1, 7, 12), (-0.507, -0.026)),  # Fagerland, Lydersen and Laake 2017, chapter 8, Bentur's data
    ],
)
def test_newcombes_interval_gives_the_published_numbers(table, wanted):
    assert newcombe(*table) == pytest.approx(wanted, abs=6e-4)


def test_the_interval_turns_with_its_sides():
    low, high = newcombe(20, 12, 2, 16)
    assert newcombe(20, 2, 12, 16) == pytest.approx((-high, -low))


def test_answers_that_are_all_alike_leave_wilsons_reach():
    low, high = newcombe(54, 0, 0, 0)
    assert (low, high) == pytest.approx((-0.0664, 0.0664), abs=1e-4)


def test_a_paired_difference_counts_each_pair_of_answers():
    one = [True] * 18 + [False] * 2
    other = [True] * 17 + [False] + [True] + [False]
    found = paired_difference(one, other)
    assert (found["both"], found["only_one"], found["only_other"], found["neither"]) == (17, 1, 1, 1)
    assert found["difference"] == 0 and found["within"] and not found["surely_within"]


@pytest.mark.parametrize(("lost", "within"), [(1, True), (2, False)])
def test_five_points_are_within_five_points(lost, within):
    found = paired_difference([False] * lost + [True] * (20 - lost), [True] * 20)
    assert found["difference"] == -lost / 20 and found["within"] is within


def test_nothing_is_known_of_no_pairs():
    found = paired_difference([], [])
    assert found["difference"] is None and found["within"] is None and found["interval"] == [-1.0, 1.0]


def test_whole_intervals_within_five_points_are_told_apart():
    assert paired_difference([True] * 500, [True] * 500)["surely_within"]
    lopsided = paired_difference([True] * 97 + [False] * 3, [True] * 100)  # from 8 points down to 1 up
    assert lopsided["within"] and not lopsided["surely_within"]


def test_differences_are_pooled_over_pairs():
    rows = [
        {"sampler": "heun", "steps": 15, "difference": paired_difference([True] * 4, [True, True, True, False])},
        {"sampler": "heun", "steps": 15, "difference": paired_difference([False, True], [True, True])},
        {"sampler": "euler", "steps": 30, "difference": paired_difference([False], [True])},
    ]
    found = schedules.pooled(rows)
    heun = found["heun 15"]
    assert (heun["n"], heun["both"], heun["only_one"], heun["only_other"]) == (6, 4, 1, 1)
    assert found["euler 30"]["difference"] == -1 and found["dpmpp_2m 20"]["n"] == 0


# What is run


def test_arms_are_the_combinations_that_mean_something():
    arms = _operators.arms()
    names = [(arm.operator, arm.estimator) for arm in arms]
    assert len(set(names)) == len(names) == len({arm.name for arm in arms}) == 28
    assert {arm.kind for arm in arms} == set(OPERATORS)
    for arm in arms:
        needs_readers = OPERATORS[arm.kind].needs_readers
        assert needs_readers == (arm.estimator in (_operators.LEACE, _operators.SAME_STATE)), arm.name


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.slug)
def test_every_arm_steers_where_ours_does_but_the_published_presets_from_the_start(pair):
    start, rows = (0.35, "positive") if pair.kind == "adding" else (0.45, "all")
    for arm in _operators.arms():
        preset = arm.preset(pair)
        assert preset.lock == "none"
        if arm.published:
            assert preset.start == 0
        else:
            assert (preset.start, preset.rows, preset.samples) == (start, rows, _operators.SAMPLES)
        parameters = dict(preset.parameters) if arm.kind == "ablate" else {**preset.parameters, "strength": 1.0}
        assert make_operator(preset.operator, **parameters).name == arm.kind


def test_operators_that_go_to_a_class_go_to_the_target():
    assert {arm.parameters["toward"] for arm in _operators.arms() if arm.kind in ("add", "set")} == {"absent"}


def test_a_class_is_recorded_once_for_all_pairs():
    needed = _operators.records_needed(PAIRS)
    assert len(needed) == len(set(needed)) == 11  # seven classes, and four of them from other noise as well
    assert ("polyps", 0) in needed and ("normal pylorus", 32) in needed


class Known:
    """Vectors by estimator, whatever the classes."""

    def __init__(self, **vectors: PathologyVector):
        self.vectors = vectors

    def of(self, estimator: str, _present: str, _absent: str) -> PathologyVector:
        return self.vectors[_operators.NAME_OF[estimator]]


def records() -> tuple[SampleRecord, SampleRecord]:
    made = []
    for offset in (1.0, 0.0):
        values = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(3)) + offset * torch.arange(5)
        noise = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(int(7 + offset)))
        made.append(SampleRecord({"a": values + 0.3 * noise}, torch.tensor([2.0, 1.0]), torch.arange(6)))
    return made[0], made[1]


def test_paired_difference_and_leace_write_along_the_mean_difference():
    names = ("mean_difference", "paired_difference", "leace")
    known = Known(**{name: _operators.estimate(name, *records(), {}) for name in names})
    found = _operators.same_direction(known, POLYPS)
    assert set(found) == set(_operators.SAME_AS_PAIRED) and max(found.values()) < 1e-6


def test_an_estimator_with_another_direction_is_not_passed_off_as_the_same():
    same = {"mean_difference": _operators.estimate("mean_difference", *records(), {})}
    other = _operators.estimate("lda", *records(), {})
    with pytest.raises(MedSteerError, match="paired difference differs from mean difference, paired by"):
        _operators.same_direction(Known(**same, paired_difference=other, leace=other), POLYPS)


def test_gaps_count_as_well_as_directions():
    one = _operators.estimate("mean_difference", *records(), {})
    sites = {name: replace(site, gaps=site.gaps * 1.1) for name, site in one.sites.items()}
    assert isinstance(next(iter(sites.values())), SiteDirections)
    other = PathologyVector(sites, one.sigmas)
    with pytest.raises(MedSteerError, match="Run its rows as well"):
        _operators.same_direction(Known(mean_difference=one, paired_difference=other, leace=one), POLYPS)


@pytest.mark.parametrize(("start", "step"), [(0.0, 0), (0.45, 9), (1.0, 19)])
def test_a_late_run_begins_where_steering_does(start, step, monkeypatch):
    levels = [float(20 - place) for place in range(20)] + [0.0]
    fake = SimpleNamespace(window=lambda _model, begin, _end: SimpleNamespace(start_sigma=levels[round(19 * begin)]))
    monkeypatch.setitem(__import__("sys").modules, "medsteer_core.host.patching.levels", fake)
    lab = SimpleNamespace(model=None, schedule=SimpleNamespace(sigmas=torch.tensor(levels)))
    runs, preset = _operators.LateRuns(lab), SimpleNamespace(start=start, end=1.0)
    assert runs.first_step(preset) == step and runs.share(preset) == 1 - step / 20


# Names, options, tables


@pytest.mark.parametrize("module", [operators, schedules])
def test_some_pairs_never_replace_all_of_them(module):
    whole, part = argparse.Namespace(pairs=None), argparse.Namespace(pairs=["polyps -> normal cecum"])
    assert module.name_of(part) == f"{module.name_of(whole)}-part"


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (operators.main, ["--split", "test"], "nothing may be chosen on the test seeds"),
        (operators.main, ["--n", "0"], "--n wants 1 to"),
        (operators.main, ["--pairs", "a -> b"], "no pair a -> b"),
        (schedules.main, ["--n", "0"], "--n wants 1 to"),
        (schedules.main, ["--pairs", "normal cecum -> polyps"], "no removal normal cecum -> polyps"),
    ],
)
def test_options_that_make_no_sense_are_refused(main, words, said, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert said in capsys.readouterr().err


def record(lock=True) -> dict:
    rows = [
        row("add", POLYPS.name, strength=2.0, clean=0.75, ssim=0.9321, by="lda"),
        row("add", POLYPS.name, strength=1.0, clean=0.25, by="lda"),
        row("ablate", POLYPS.name, clean=0.5, by="lda"),
        row("add", COLITIS.name, "removing diffuse", 1.0, clean=0.125, drift=1.234, by="lda"),
        row("ablate", COLITIS.name, "removing diffuse", clean=0.5, by="lda"),
    ]
    ranked = ranking(rows)
    difference = paired_difference([True] * 20, [True] * 19 + [False])
    focal = {"with": row("ablate"), "without": row("ablate"), "difference": difference}
    found = {"lock": "concept map", "strength": 1.0, "pairs": {POLYPS.name: focal}, "difference": difference}
    return {
        "rows": rows, "ranking": ranked, "best": {**ranked[0], "lock": found if lock else None},
        "pairs": [POLYPS.name, COLITIS.name], "left_out": {"this": "that"},
        "same_direction": {POLYPS.name: {"leace": 0.0, "paired difference": 2e-8}},
        "seeds": {"development": [20000, 20003], "used": "development"},
        "clean": {"ssim_outside_at_least": LEAST_SSIM, "anatomy_drift_at_most": MOST_DRIFT},
        "settings": {"n": 4, "steps": 20, "cfg": 4.0, "switch_against": "normal pylorus"},
    }  # fmt: skip


def test_a_pairs_table_has_one_line_for_each_operator_and_estimator_at_its_best_strength():
    head, *lines = _operators_table.pair_lines(record(), POLYPS.name)
    assert all(len(line) == len(head) for line in lines)
    assert [line[:3] for line in lines] == [("ablate", "lda", "1"), ("add", "lda", "2")]  # as they rank
    assert lines[1][5] == "0.750 [0.000, 1.000]" and lines[1][6] == "0.932"


def test_the_ranking_names_the_strength_of_each_kind():
    head, first, second = _operators_table.ranking_lines(record())
    assert head[2:4] == ("strength, removing", "strength, removing diffuse")
    assert first[:5] == ("ablate", "lda", "1", "1", "0.500") and second[:5] == ("add", "lda", "2", "1", "0.438")


def test_the_table_says_what_the_lock_costs_and_what_was_left_out():
    text = _operators_table.table(record())
    assert "with the lock flips are within 5 points (+5.0 [" in text and "left out: this: that" in text
    assert "paired difference 2e-08" in text
    assert "with the lock" not in _operators_table.table(record(lock=False))


@pytest.mark.parametrize(
    ("lost", "said"), [(0, "within 5 points (+0.0"), (1, "its interval reaches further"), (3, "MORE than 5 points off")]
)
def test_verdicts_say_what_is_known(lost, said):
    other = [True] * (20 - lost) + [False] * lost
    assert said in _operators_table.verdict(paired_difference([True] * 20, other))


def test_the_picture_shows_every_pair_and_the_mean():
    whole = _operators_plot.plot(record())
    assert whole.ndim == 3 and whole.shape[0] == 3 and 0 <= float(whole.min()) < float(whole.max()) <= 1
    grid = _operators_plot.pair_grid(record()["ranking"], record()["rows"], POLYPS.name)
    assert grid == {("add", "lda"): (0.75, "0.75\n(0.90)"), ("ablate", "lda"): (0.5, "0.50\n(0.90)")}


def test_the_schedules_table_has_a_line_for_each_schedule():
    own = {**row("x", POLYPS.name), "flip": 1.0}
    rows = [
        {"pair": POLYPS.name, "sampler": "euler", "steps": 20, "recorded": None, "own": own, "difference": None},
        {"pair": POLYPS.name, "sampler": "heun", "steps": 15, "recorded": own, "own": own,
         "difference": paired_difference([True] * 19 + [False], [True] * 20)},
    ]  # fmt: skip
    text = schedules.table({
        "rows": rows, "pooled": schedules.pooled(rows), "recorded": {"sampler": "euler", "steps": 20},
        "settings": {"n": 4, "cfg": 4.0, "presets": {POLYPS.name: {}}},
        "seeds": {"development": [20000, 20003], "used": "development"},
    })  # fmt: skip
    line = next(line for line in text.splitlines() if line.startswith("heun 15"))
    assert "-5.0 [" in line and " yes " in line and line.endswith("0.950      0.950")
    assert "heun 15" in text.split("all pairs")[1]


def test_factual_images_that_differ_are_not_compared():
    way = schedules.OTHERS[-1]
    schedules.check_same(torch.zeros(2, 4), torch.zeros(2, 4) + 1e-6, way)
    with pytest.raises(MedSteerError, match="dpmpp_2s_ancestral 20: the factual images of two runs differ by 0.1"):
        schedules.check_same(torch.zeros(2, 4), torch.full((2, 4), 0.1), way)


def test_a_way_costs_what_its_evaluations_cost():
    assert [way.cost for way in (schedules.RECORDED, *schedules.OTHERS)] == [1.0, 1.5, 1.5, 1.0, 2.0]


def test_mean_known_leaves_out_what_is_unknown():
    assert _operators_numbers.mean_known([1.0, None, 0.5]) == 0.75 and _operators_numbers.mean_known([None]) is None
