"""Plans: what they expand to, and what is said about one with a mistake in it."""

import json
import re

import pytest

from medsteer_core.errors import MedSteerError
from medsteer_core.scale.plan import MOST_TASKS, read_plan
from medsteer_core.scale.tasks import Tasks
from medsteer_core.scale.yaml_file import LARGEST, parse


def workflow() -> dict:
    """Extract, steer, sample, save; the latents are shared by extraction and sampling."""

    def node(class_type, title="", **inputs):
        return {"class_type": class_type, "inputs": inputs, "_meta": {"title": title or class_type}}

    return {
        "1": node("MedSteer_LoadEndoPhantom"),
        "2": node("CLIPTextEncode", "Finding", text="polyps here", clip=["1", 1]),
        "3": node("CLIPTextEncode", "None", text="nothing here", clip=["1", 1]),
        "5": node("EmptyLatentImage", "Size", width=64, height=64, batch_size=1),
        "6": node("MedSteer_ExtractPathologyVector", "Extract", seed=1000, samples=4, steps=4, present=["2", 0],
                  absent=["3", 0], latent_image=["5", 0]),
        "7": node("MedSteer_Steer", "Steer", vector=["6", 0], start_percent=0.0, sites="all"),
        "8": node("MedSteer_CounterfactualSampler", "Sampler", seed=1, steps=4, strengths="1", model=["7", 0],
                  positive=["2", 0], latent_image=["5", 0]),
        "9": node("MedSteer_SaveCounterfactualPairs", "Save", record=["8", 5], folder="x", source_class="a",
                  target_class="b", split="auto", validation_fraction=0.1, test_fraction=0.1),
    }  # fmt: skip


@pytest.fixture
def planned(tmp_path):
    """`planned(text)`: the plan with these lines behind workflow and output; `graph` is another workflow."""
    (tmp_path / "workflow.json").write_text(json.dumps(workflow()))

    def make(text: str, head: str = "workflow: workflow.json\noutput: pairs\n", graph=None):
        if graph is not None:
            (tmp_path / "workflow.json").write_text(json.dumps(graph))
        (tmp_path / "plan.yaml").write_text(head + text, encoding="utf-8")
        return read_plan(tmp_path / "plan.yaml")

    return make


def test_a_plan_is_the_product_of_its_axes_with_the_seeds_innermost(planned):
    plan = planned(
        "pairs:\n  - {present: polyps, absent: normal cecum}\n  - {present: dye, absent: clean}\n"
        'prompts: ["A {concept}", "Photo of {concept}"]\nset: {Extract.steps: [4, 8], start_percent: 0.5}\n'
        "seeds: 1..3\nstrengths: [0.5, 1]\nchunk: 2\n"
    )
    tasks = Tasks(plan)
    assert (len(tasks), plan.groups) == (2 * 2 * 2 * 3, 8)
    assert [task.seed for task in tasks] == [1, 2, 3] * 8
    assert [task.group for task in tasks] == [group for group in range(8) for _ in range(3)]
    assert {task.pairs for task in tasks} == {2 * 2}
    last = tasks[23].workflow
    assert last["2"]["inputs"]["text"] == "Photo of dye" and last["3"]["inputs"]["text"] == "Photo of clean"
    assert last["8"]["inputs"]["strengths"] == "0.5, 1" and last["8"]["inputs"]["seed"] == 3
    assert last["6"]["inputs"]["steps"] == 8 and last["7"]["inputs"]["start_percent"] == 0.5
    assert (last["9"]["inputs"]["source_class"], last["9"]["inputs"]["target_class"]) == ("dye", "clean")


def test_the_factual_label_is_the_concept_that_the_sampler_is_prompted_with(planned):
    graph = workflow()
    graph["8"]["inputs"]["positive"] = ["3", 0]
    tasks = Tasks(planned("seeds: 1\npairs: [{present: polyps, absent: clean}]\n", graph=graph))
    assert tasks[0].workflow["9"]["inputs"]["source_class"] == "clean"
    assert tasks[0].workflow["9"]["inputs"]["target_class"] == "polyps"


def test_more_images_a_task_leave_the_vectors_extraction_as_it_was(planned):
    one = Tasks(planned("seeds: 1\nchunk: 3\n"))[0].workflow
    assert one["6"]["inputs"]["latent_image"] == ["5", 0] and one["5"]["inputs"]["batch_size"] == 1
    own = one["8"]["inputs"]["latent_image"][0]
    assert one[own]["inputs"] == {"width": 64, "height": 64, "batch_size": 3}


def test_a_tasks_id_follows_from_what_it_makes_and_from_nothing_else(planned):
    tasks = Tasks(planned("seeds: 1..50\n"))
    ids = [task.task_id for task in tasks]
    assert len(set(ids)) == 50 and all(re.fullmatch("[0-9a-f]{16}", name) for name in ids)
    renamed = workflow()
    renamed["8"]["_meta"]["title"] = "another title"
    renamed["9"]["inputs"]["folder"], renamed["8"]["inputs"]["seed"] = "elsewhere", 99
    assert [task.task_id for task in Tasks(planned("seeds: [2, 1]\n", graph=renamed))] == [ids[1], ids[0]]
    other = workflow()
    other["8"]["inputs"]["steps"] = 5
    assert Tasks(planned("seeds: 1\n", graph=other))[0].task_id not in ids


def test_the_largest_plan_is_read_without_making_its_tasks(planned):
    tasks = Tasks(planned(f"seeds: 1..{MOST_TASKS}\nsplits: {{}}\n"))
    assert len(tasks) == MOST_TASKS and tasks[MOST_TASKS - 1].seed == MOST_TASKS


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1..3\n", r"line 3: seed: there is no key 'seed' here; did you mean 'seeds'\?"),
        ("seeds: 1\nstrenghts: [1]\n", r"line 4: strenghts: .*did you mean 'strengths'"),
        ("seeds: 1\nlimits: {timout: 3}\n", r"line 4: limits\.timout: .*did you mean 'timeout'"),
        ("seeds: 1\npairs: [{present: a, absnt: b}]\n", r"line 4: pairs\[0\]\.absnt: .*did you mean 'absent'"),
        ("seeds: 1\npairs: [{present: a}]\n", "'absent' is missing"),
        ("seeds: 1\npairs: [{present: a, absent: a}]\n", "both 'a'; two that differ"),
        ("seeds: 1\npairs: []\n", r"line 4: pairs: the list is empty, so nothing would be made"),
        ("seeds: []\n", "nothing would be made"),
        ("seeds: 5..1\n", "line 3: seeds: '5..1' was found; first..last with first <= last"),
        ("seeds: 1..99999999999999999999\n", "first..last"),
        ("seeds: 1..9000000\n", "more than 2,000,000 seeds"),
        ("seeds: -1\n", "a whole number from 0"),
        ("seeds: 1.5\n", "1.5 was found; a whole number"),
        ("seeds: true\n", "True was found; a whole number"),
        ("seeds: [1, 2, 1]\n", "'1' stands twice"),
        ("seeds: 1\nstrengths: [strong]\n", r"line 4: strengths\[0\]: 'strong' was found; a number"),
        ("seeds: 1\nstrengths: [.nan]\n", "nan was found; a number"),
        ("seeds: 1\nchunk: 0\n", "a whole number from 1 to 256"),
        ("seeds: 1\nprompts: [hello]\n", r"lacks \{concept\}"),
        ('seeds: 1\nprompts: ["a {concept}"]\n', "'pairs', which is missing"),
        ("seeds: 1\nsplits: {validation: 0.6, test: 0.6}\n", "add up to 1.2"),
        ("seeds: 1\nlimits: {retries: -1}\n", "a whole number from 0"),
        ("seeds: 1\nset: {Sampler.stps: 4}\n", r"line 4: set\.Sampler\.stps: no input is named 'Sampler\.stps'"),
        ("seeds: 1\nset: {steps: 4}\n", "means 2 inputs"),
        ("seeds: 1\nset: {Sampler.steps: four}\n", "a number such as 4 was expected"),
        ("seeds: 1\nset: {Sampler.model: 4}\n", "is connected to another node"),
        ("seeds: 1\nset: {Sampler.seed: 4}\n", "the plan's own"),
        ("seeds: 1\nset: {Sampler.steps: [4, [5]]}\n", "a number, a text or true/false"),
        ("seeds: 990..1010\n", "line 3: seeds: 1000 is the seed that Extract makes the vector from"),
        ("seeds: 1\nseeds: 2\n", r"line 4: 'seeds' stands twice \(first in line 3\)"),
        ("seeds: &a 1\nchunk: *a\n", "line 3: anchors and aliases"),
        ("seeds: !!python/object/apply:os.system [ls]\n", "line 3: this is no YAML that can be read"),
        ("seeds: [1\n", "this is no YAML that can be read"),
        ("seeds: " + "[" * 2000 + "]" * 2000 + "\n", "nested deeper than 12"),
        ("seeds: 2026-99-99\n", "can't be read"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_key(planned, text, said):
    with pytest.raises(MedSteerError, match=said):
        Tasks(planned(text))


def test_a_vectors_seed_may_be_trained_on(planned):
    assert len(Tasks(planned("seeds: 990..1010\nsplits: {validation: 0, test: 0}\n"))) == 21


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("output: pairs\n", "the key 'workflow' is missing"),
        ("workflow: gone.json\noutput: pairs\n", "line 1: workflow: .*gone.json can't be read"),
        ("workflow: plan.yaml\noutput: pairs\n", "plan.yaml is not JSON"),
        ("workflow: workflow.json\noutput: a/../../b\n", r"line 2: output: .*without '\.\.'"),
        ("workflow: workflow.json\noutput: s3://key:secret@bucket/x\n", "without a password"),
        ('workflow: workflow.json\noutput: "a\\nb"\n', "a text of one line"),
        ("- workflow\n", "keys and values were expected"),
    ],
)
def test_a_wrong_workflow_or_output_is_named(planned, head, said):
    with pytest.raises(MedSteerError, match=said):
        planned("" if head.startswith("-") else "seeds: 1\n", head=head)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda graph: graph.pop("9"), "0 nodes of Save Counterfactual Pairs"),
        (lambda graph: graph["9"]["inputs"].pop("record"), "Connect 'record'"),
        (lambda graph: graph["8"]["inputs"].update(noise=["7", 0]), "leave its 'noise' unconnected"),
        (lambda graph: graph["5"]["inputs"].pop("batch_size"), "'chunk' needs Empty Latent Image"),
        (lambda graph: graph["2"]["inputs"].update(text=["1", 0]), "'pairs' needs a text prompt"),
    ],
)
def test_a_workflow_without_a_place_for_the_plans_values_is_refused(planned, change, said):
    graph = workflow()
    change(graph)
    with pytest.raises(MedSteerError, match=said):
        Tasks(planned("seeds: 1\nchunk: 2\npairs: [{present: a, absent: b}]\n", graph=graph))


def test_a_file_that_is_too_large_or_no_text_is_refused(tmp_path):
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (LARGEST + 1))
    with pytest.raises(MedSteerError, match="larger than"):
        read_plan(large)
    with pytest.raises(MedSteerError, match=r"no UTF-8 text \(byte 7\)"):
        parse(b"seeds: \xff", "plan")
    with pytest.raises(MedSteerError, match="gone.yaml can't be read"):
        read_plan(tmp_path / "gone.yaml")
