"""What provenance and summary say of unseen samples."""

import json
from dataclasses import replace

import pytest
import torch

from medsteer_core.extraction import sample_report
from medsteer_core.extraction.sample_estimators import estimate
from medsteer_core.extraction.sample_report import (
    AUROC,
    KEY,
    MOST_PROJECTIONS,
    PROJECTIONS,
    STABILITY,
    Projections,
    describe_separability,
    recorded,
    recorded_projections,
    separability_facts,
)
from medsteer_core.extraction.samples_record import SampleRecord
from medsteer_core.pictures.summary import describe
from medsteer_core.vectors.pathology_vector import PathologyVector

FACTS = {"noise": "paired", "samples": 24, "prompts": {}}


def records(gaps=(9.0, 0.0), count=24, channels=16, steps=2):
    """Sites s0, s1, ... whose classes are these gaps apart along the first channel, in unit noise."""
    generator = torch.Generator().manual_seed(0)
    sides = []
    for sign in (0.5, -0.5):
        sites = {}
        for index, gap in enumerate(gaps):
            sites[f"s{index}"] = torch.randn(count, steps, channels, generator=generator)
            sites[f"s{index}"][..., 0] += sign * gap
        sides.append(SampleRecord(sites, torch.arange(steps, 0, -1).float(), torch.arange(count)))
    return sides


def vector(report=None, **facts) -> PathologyVector:
    made = estimate("mean_difference", *records(), {**FACTS, **facts})
    return made if report is None else replace(made, provenance={**made.provenance, KEY: report})


def facts(estimator="mean_difference", names=("s0", "s1")):
    return separability_facts(*records(), estimator, names)


@pytest.mark.parametrize("estimator", ["mean_difference", "paired_difference", "principal_component", "lda", "leace"])
def test_a_site_with_a_gap_separates_unseen_samples_and_one_without_does_not(estimator):
    found = facts(estimator)
    assert found[AUROC]["s0"] == [1.0, 1.0] and found[STABILITY]["s0"][0] > 0.9
    assert all(abs(value - 0.5) < 0.25 for value in found[AUROC]["s1"]) and found[STABILITY]["s1"][0] < 0.6
    assert found["samples"] == 24 and found["folds"] == 5 and found["splits"] == 8


def test_the_facts_are_short_json_of_the_named_sites():
    found = facts(names=("s1",))
    assert json.loads(json.dumps(found)) == found and list(found[AUROC]) == list(found[STABILITY]) == ["s1"]
    values = [*found[AUROC]["s1"], *found[STABILITY]["s1"]]
    assert [round(value, 3) for value in values] == values


@pytest.mark.parametrize(("estimator", "wanted"), [("mean_difference", 15), ("lda", 5)])
def test_of_many_samples_as_many_are_looked_at_as_the_time_allows(monkeypatch, estimator, wanted):
    """Two sites of 16 channels at 2 levels are 64 numbers a sample."""
    monkeypatch.setattr(sample_report, "MOST_NUMBERS_OF_MEANS", 64 * 15)
    monkeypatch.setattr(sample_report, "MOST_NUMBERS", 64 * 5)
    found = facts(estimator)
    assert found["samples"] == wanted
    first = [SampleRecord({n: v[:wanted] for n, v in r.sites.items()}, r.sigmas, r.samples[:wanted]) for r in records()]
    assert separability_facts(*first, estimator, ("s0", "s1")) == found
    monkeypatch.setattr(sample_report, "MOST_NUMBERS", 1)
    assert facts("lda")["samples"] == 4


def test_the_summary_gives_the_mean_the_best_site_and_the_stability():
    report = {AUROC: {"s1": [0.5, 0.6], "s0": [1.0, 0.9]}, STABILITY: {"s0": [0.9, 0.9], "s1": [0.2, 0.4]}}
    lines = describe(vector(report)).splitlines()
    assert "separability at unseen samples: AUROC 0.750 on average, best 0.950 at s0" in lines
    assert "stability: |cos| 0.600 between the directions of two halves of the samples, on average" in lines


def test_the_summary_says_why_there_is_no_report():
    assert describe_separability(vector({"left_out": "too much."})) == ["no separability report: too much."]
    (line,) = describe_separability(vector(samples=3))
    assert line == "no separability report: 3 samples a prompt, and 4 or more are needed"


def test_an_older_vector_is_described_without_it():
    assert describe_separability(vector()) == [] and "separability" not in describe(vector())
    assert describe_separability(vector(samples=3, noise="same state")) == []
    assert describe_separability(PathologyVector(vector().sites, vector().sigmas, {})) == []


def test_the_summary_names_the_estimator_that_is_not_the_papers():
    assert "estimator" not in describe(vector())
    assert "estimator: principal component" in describe(estimate("principal_component", *records(), FACTS))


@pytest.mark.parametrize(
    "values",
    [None, [], {"s0": [1.0, 1.0]}, {"s0": [1.0, 1.0], "s1": [1.0]}, {"s0": [1.0, 1.0], "s1": [1.0, "a"]},
     {"s0": [1.0, 1.0], "s1": [1.0, 1.5]}, {"s0": [1.0, 1.0], "s1": 1.0}],
)  # fmt: skip
def test_a_report_that_does_not_fit_its_vector_counts_as_none(values):
    assert recorded(vector({AUROC: values, STABILITY: values}), AUROC) == {}
    assert describe_separability(vector({AUROC: values, STABILITY: values})) == []


def test_a_measure_is_given_in_the_vectors_order():
    report = {AUROC: {"s1": [0.5, 0.6], "s0": [1.0, 0.9], "gone": [0.1]}}
    assert list(recorded(vector(report), AUROC).items()) == [("s0", [1.0, 0.9]), ("s1", [0.5, 0.6])]
    assert recorded(vector(report), STABILITY) == {} and recorded(vector("none"), AUROC) == {}


def test_the_facts_keep_projections_of_unseen_samples_at_the_best_site():
    found = separability_facts(*records((0.0, 9.0), 80), "mean_difference", ("s0", "s1"))[PROJECTIONS]
    assert found["site"] == "s1" and len(found["present"]) == len(found["absent"]) == MOST_PROJECTIONS
    assert sum(found["present"]) / 64 == pytest.approx(4.5, abs=0.4)
    assert sum(found["absent"]) / 64 == pytest.approx(-4.5, abs=0.4)
    assert all(float(f"{value:.3g}") == value for value in found["present"])


def test_of_sites_that_separate_alike_the_steadiest_is_shown():
    found = separability_facts(*records((9.0, 40.0)), "mean_difference", ("s0", "s1"))
    assert found[AUROC]["s0"] == found[AUROC]["s1"] == [1.0, 1.0] and found[PROJECTIONS]["site"] == "s1"


SOUND = {"site": "s1", "step": 1, "present": [1.0, 2.0], "absent": [-1.0]}


def test_recorded_projections_are_those_of_the_vector():
    assert recorded_projections(vector({PROJECTIONS: SOUND})) == Projections("s1", 1, (1.0, 2.0), (-1.0,))
    assert recorded_projections(vector(facts())) is not None and recorded_projections(vector()) is None


@pytest.mark.parametrize(
    "wrong",
    [{"site": "gone"}, {"site": ["s1"]}, {"step": 2}, {"step": -1}, {"step": 0.5}, {"present": []}, {"absent": ["a"]},
     {"present": None}, {"absent": [1.0] * (MOST_PROJECTIONS + 1)}],
)  # fmt: skip
def test_projections_that_do_not_fit_their_vector_count_as_none(wrong):
    assert recorded_projections(vector({PROJECTIONS: {**SOUND, **wrong}})) is None
