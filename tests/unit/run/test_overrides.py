"""`--set NAME=VALUE`: which input a name means, and what its value becomes."""

import json

import pytest

from medsteer_core.run.calibrated import with_calibration
from medsteer_core.run.overrides import (
    OverrideError,
    applied,
    changes_for,
    read_workflow,
    refuse_fractions,
    with_recipe,
)
from medsteer_core.run.workflow import WorkflowError
from medsteer_core.steering.recipes import RECIPES


def node(kind, title, **inputs):
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}


WORKFLOW = {
    "1": node("CLIPTextEncode", "Finding", text="polyps", clip=["9", 1]),
    "2": node("CLIPTextEncode", "a=b. c", text="x=y"),
    "3": node("Extract", "Extract", seed=1000, steps=20, cfg=4, keep=True),
    "4": node("KSampler", "Sample", seed=5, steps=20, cfg=4.5, view={"a": [1]}, model=["3", 0]),
    "5": {"class_type": "Extract", "inputs": {"operator.strength": 2}},
    "9": {"class_type": "Load", "inputs": {}},
}


def changed(*settings, workflow=WORKFLOW):
    return {(c.node_id, c.input): c.new for c in changes_for(workflow, settings)}


@pytest.mark.parametrize(
    "setting, where",
    [
        ("Sample.steps=7", ("4", "steps")),
        ("KSampler.steps=7", ("4", "steps")),
        ("#4.steps=7", ("4", "steps")),
        ("seed=7", ("4", "seed")),  # the sampler's, not the extraction's
        ("Extract.seed=7", ("3", "seed")),
        ("operator.strength=7", ("5", "operator.strength")),
        ("Extract.operator.strength=7", ("5", "operator.strength")),
    ],
)
def test_a_name_means_one_input(setting, where):
    assert changed(setting) == {where: 7}


def test_titles_and_values_may_hold_an_equals_sign():
    assert changed("a=b. c.text=u=v") == {("2", "text"): "u=v"}


@pytest.mark.parametrize(
    "setting, candidates",
    [("steps=7", "'#3.steps' (Extract), '#4.steps' (Sample)"), ("CLIPTextEncode.text=a", "'#1.text' (Finding), '#2")],
)
def test_a_name_with_several_meanings_lists_them(setting, candidates):
    with pytest.raises(OverrideError) as caught:
        changed(setting)
    assert "means 2 inputs" in str(caught.value) and candidates in str(caught.value)


def test_a_seed_of_two_samplers_is_ambiguous():
    with pytest.raises(OverrideError, match="'#4.seed' .Sample., '#6.seed' .Second"):
        changed("seed=7", workflow={**WORKFLOW, "6": node("KSampler", "Second", seed=1)})


def test_an_unknown_name_lists_what_can_be_set():
    with pytest.raises(OverrideError, match="'Finding.text'.*'Sample.cfg'"):
        changed("sed=7")
    with pytest.raises(OverrideError) as caught:
        changed("Sample.sed=7")
    assert str(caught.value).endswith("set: '#4.seed', '#4.steps', '#4.cfg', '#4.view'.")


def test_a_title_goes_before_a_class():
    workflow = {"1": node("KSampler", "Other", steps=1), "2": node("X", "KSampler", steps=2)}
    assert changed("KSampler.steps=7", workflow=workflow) == {("2", "steps"): 7}


@pytest.mark.parametrize(
    "setting, value",
    [
        ("Sample.cfg=3", 3.0),
        ("Extract.cfg=3.5", 3.5),  # API files write the float 4.0 as 4
        ("Extract.steps=8", 8),
        ("Extract.keep=FALSE", False),
        ("Finding.text=", ""),
        ("Finding.text=12", "12"),
        ('Sample.view={"b": 2}', {"b": 2}),
    ],
)
def test_a_value_takes_the_type_of_what_stands_there(setting, value):
    (new,) = changed(setting).values()
    assert new == value and type(new) is type(value)


@pytest.mark.parametrize(
    "setting", ["Sample.steps=x", "Sample.cfg=nan", "Sample.cfg=inf", "Extract.keep=1", "Sample.view=x", "#4.steps"]
)
def test_a_value_of_another_type_is_refused(setting):
    with pytest.raises(OverrideError, match="was expected"):
        changed(setting)


def test_a_linked_input_and_one_set_twice_are_refused():
    with pytest.raises(OverrideError, match=r"comes from Load \(#9\)"):
        changed("Finding.clip=3")
    with pytest.raises(OverrideError, match="set twice"):
        changed("seed=1", "#4.seed=2")


def test_a_fraction_for_a_whole_number_is_refused_and_for_a_number_not():
    kinds = {"input": {"required": {"steps": ["INT", {}], "cfg": ["FLOAT", {}]}}}
    refuse_fractions(WORKFLOW, changes_for(WORKFLOW, ["Extract.cfg=2.5"]), lambda name: kinds)
    with pytest.raises(OverrideError, match="steps is set to 2.5; a whole number"):
        refuse_fractions(WORKFLOW, changes_for(WORKFLOW, ["Extract.steps=2.5"]), lambda name: kinds)


def test_the_given_workflow_stays_as_it_was():
    before = json.dumps(WORKFLOW)
    assert applied(WORKFLOW, changes_for(WORKFLOW, ["seed=7"]))["4"]["inputs"]["seed"] == 7
    assert json.dumps(WORKFLOW) == before


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"nodes": [], "links": []}', "as the canvas saves it.*Export .API"),
        ("{}", "no workflow in API format"),
        ('{"1": {"class_type": "A"}}', "no workflow in API format"),
        ("[1]", "no workflow"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_file_that_is_no_api_workflow_is_refused(tmp_path, content, message):
    (tmp_path / "w.json").write_text(content)
    with pytest.raises(WorkflowError, match=message):
        read_workflow(tmp_path / "w.json")


def test_a_byte_order_mark_is_no_part_of_a_workflow(tmp_path):
    (tmp_path / "w.json").write_text("\ufeff" + json.dumps(WORKFLOW), encoding="utf-8")
    assert read_workflow(tmp_path / "w.json") == WORKFLOW


@pytest.mark.parametrize(
    "name, meant", [("seeed", "seed"), ("Sample.step", "Sample.steps"), ("KSample.cfg", "Sample.cfg")]
)
def test_a_name_that_is_none_is_told_with_the_nearest(name, meant):
    with pytest.raises(OverrideError, match=rf"no input is named '{name}'\. Did you mean '{meant}'\? Those that"):
        changes_for(WORKFLOW, [f"{name}=7"])


def test_a_recipe_sets_the_inputs_of_every_steer_and_sampler_and_leaves_the_rest():
    workflow = {
        "1": {
            "class_type": "MedSteer_Steer",
            "inputs": {"operator": "set", "operator.toward": "absent", "sites": "0-3"},
        },
        "2": {"class_type": "MedSteer_CounterfactualSampler", "inputs": {"seed": 5, "lock": "concept map"}},
        "3": {"class_type": "SaveImage", "inputs": {"filename_prefix": "a"}},
    }
    made = with_recipe(workflow, "add")
    assert made["1"]["inputs"] == {**RECIPES["add"].steer, "sites": "0-3", "recipe": "add"}
    assert made["2"]["inputs"] == {**RECIPES["add"].sampler, "seed": 5, "recipe": "add"}
    assert made["3"] == workflow["3"] and workflow["1"]["inputs"]["operator"] == "set"
    assert with_recipe(workflow, None) == workflow


def test_a_recipe_that_fits_nothing_is_refused():
    steer = {"1": {"class_type": "MedSteer_Steer", "inputs": {"start_percent": ["2", 0]}}, "2": WORKFLOW["4"]}
    for workflow, name, said in (
        (steer, "cure", "there is no recipe 'cure'; one of remove focal"),
        (steer, "add", "start_percent is linked, so that no recipe can set it"),
        ({"2": WORKFLOW["4"]}, "add", "none of Steer, Counterfactual Sampler and"),
    ):
        with pytest.raises(OverrideError, match=said):
            with_recipe(workflow, name)


# Calibration


def pair_workflow(decoded=True):
    made = {
        "1": {"class_type": "MedSteer_LoadEndoPhantom", "inputs": {}},
        "2": {"class_type": "MedSteer_CounterfactualSampler",
              "inputs": {"model": ["1", 0], "seed": 5, "strengths": "0.5, 1", "lock": "none"}},
    }  # fmt: skip
    if decoded:
        made["3"] = {"class_type": "VAEDecode", "inputs": {"samples": ["2", 1], "vae": ["1", 2]}}
    return made


def test_a_sampler_becomes_a_search_for_the_least_strength():
    workflow = pair_workflow()
    made = with_calibration(workflow, "polyps -> normal cecum")
    assert made["2"] == {
        "class_type": "MedSteer_CalibrateStrength",
        "inputs": {"model": ["1", 0], "seed": 5, "lock": "none", "judge": "EndoPhantom", "passes": 5, "most": 2.0,
                   "source_class": "polyps", "target_class": "normal cecum", "vae": ["1", 2]},
    }  # fmt: skip
    assert made["3"] == workflow["3"] and workflow == pair_workflow()
    assert with_calibration(workflow, None) is workflow
    assert applied(made, changes_for(made, ["seed=7", "passes=3"]))["2"]["inputs"]["passes"] == 3
    assert with_recipe(made, "add")["2"]["inputs"]["recipe"] == "add"


@pytest.mark.parametrize(
    ("workflow", "classes", "said"),
    [
        (pair_workflow(), "polyps", "'SOURCE -> TARGET' was expected"),
        (pair_workflow(), "polyps -> ", "'SOURCE -> TARGET' was expected"),
        (pair_workflow(decoded=False), "a -> b", "decoded by no VAE Decode"),
        ({"1": {"class_type": "KSampler", "inputs": {}}}, "a -> b", "no Counterfactual Sampler"),
    ],
)
def test_a_workflow_that_can_not_be_calibrated_is_refused(workflow, classes, said):
    with pytest.raises(OverrideError, match=said):
        with_calibration(workflow, classes)
