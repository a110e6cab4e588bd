"""What the benchmarks read from the example workflow, and how they count."""

import json

import pytest

from benchmarks.evidence import classes, pair
from benchmarks.shared import command as _shared
from medsteer_core.errors import MedSteerError
from medsteer_core.run.demo import WORKFLOW

EXAMPLE = json.loads(WORKFLOW.read_text())


def test_the_pair_benchmark_measures_the_shipped_defaults():
    shipped = pair.Shipped.of(EXAMPLE)
    assert shipped.prompt("present") == "An endoscopic image of polyps"
    assert shipped.prompt("negative") == ""
    steer = next(n["inputs"] for n in EXAMPLE.values() if n["class_type"] == "MedSteer_Steer")
    nodes = shipped.workflow(seed=2000, count=3)
    steered = [n["inputs"] for n in nodes.values() if n["class_type"] == "MedSteer_Steer"]
    assert steered == [steer, {**steer, "operator.strength": 0.0}]


def test_every_method_starts_from_the_same_noise_and_settings():
    nodes = pair.Shipped.of(EXAMPLE).workflow(seed=2000, count=3).values()
    kinds = {"KSampler": 2, "MedSteer_CounterfactualSampler": 2}
    assert {kind: sum(n["class_type"] == kind for n in nodes) for kind in kinds} == kinds
    samplers = [n["inputs"] for n in nodes if n["class_type"] in kinds]
    for name in ("seed", "steps", "cfg", "sampler_name", "scheduler", "latent_image", "negative"):
        assert len({json.dumps(inputs[name]) for inputs in samplers}) == 1, name
    assert sorted(json.dumps(inputs["positive"]) for inputs in samplers).count('["2", 0]') == 3


def test_a_workflow_without_steer_is_refused():
    without = {i: n for i, n in EXAMPLE.items() if n["class_type"] != "MedSteer_Steer"}
    with pytest.raises(MedSteerError, match="0 nodes MedSteer_Steer"):
        pair.Shipped.of(without)


@pytest.mark.parametrize("first", [1000, 998, 1031])
def test_seeds_that_extraction_may_have_used_are_refused(first):
    with pytest.raises(MedSteerError, match="noise that the vector never saw"):
        pair.fresh_seeds(first, 5, {"seed": 1000, "samples": 16})


def test_fresh_seeds_count_up():
    assert pair.fresh_seeds(2000, 3, {"seed": 1000, "samples": 16}) == [2000, 2001, 2002]


def test_classes_are_counted_with_their_interval_and_the_rest_named():
    row = classes.judged("polyps", ["polyps"] * 8 + ["normal cecum"] * 2)
    assert (row["n"], row["right"], row["share"]) == (10, 8, 0.8)
    assert row["interval"] == pytest.approx([0.490, 0.943], abs=1e-3)
    assert row["others"] == {"normal cecum": 2}


def test_tables_are_aligned():
    assert _shared.aligned([("a", "bb"), ("ccc", "d")]) == ["a    bb", "---  --", "ccc  d"]
