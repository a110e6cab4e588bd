"""The demo's report: what is read from a workflow, and how it is written."""

import json

import pytest

from medsteer_core.run import demo
from medsteer_core.run.workflow import Progress, WorkflowError

SAMPLER = {"seed": 11, "steps": 20, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "model": ["1", 0]}
STEER = {
    "model": ["1", 0],
    "operator": "suppress",
    "operator.strength": 2.0,
    "operator.keep_norm": True,
    "sites": "all",
}
EXTRACT = {"seed": 7, "samples": 8, "model": ["1", 0], "present": ["2", 0], "absent": ["3", 0]}
WORKFLOW = {
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "polyps"}, "_meta": {"title": "Present"}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "normal cecum"}, "_meta": {"title": "Absent"}},
    "4": {"class_type": "MedSteer_ExtractPathologyVector", "inputs": EXTRACT},
    "5": {"class_type": "MedSteer_Steer", "inputs": STEER},
    "6": {"class_type": "KSampler", "inputs": SAMPLER},
    "7": {"class_type": "KSampler", "inputs": dict(SAMPLER)},
}


def test_the_report_tells_prompts_seed_operator_and_strength():
    facts = demo.workflow_facts(WORKFLOW)
    assert facts["prompts"] == {"Present": "polyps", "Absent": "normal cecum"}
    assert (facts["seed"], facts["operator"], facts["strength"]) == (11, "suppress", 2.0)
    assert facts["steering"]["operator.keep_norm"] is True and "model" not in facts["steering"]
    assert facts["extraction"] == {"seed": 7, "samples": 8}


def test_the_pair_is_scored_between_the_classes_of_the_extractions_prompts():
    assert [demo.extraction_prompt(WORKFLOW, role) for role in ("present", "absent")] == ["polyps", "normal cecum"]
    without = {**WORKFLOW, "4": {"class_type": "MedSteer_ExtractPathologyVector", "inputs": {"seed": 7}}}
    with pytest.raises(WorkflowError, match="no prompt at 'present'"):
        demo.extraction_prompt(without, "present")


def test_another_seed_goes_to_every_sampler_and_not_to_the_extraction():
    changed = demo.with_seed(WORKFLOW, 99)
    assert [changed[i]["inputs"]["seed"] for i in ("6", "7", "4")] == [99, 99, 7]
    assert WORKFLOW["6"]["inputs"]["seed"] == 11
    assert demo.with_seed(WORKFLOW, None) is WORKFLOW


def test_a_file_that_is_no_api_workflow_is_refused(tmp_path):
    path = tmp_path / "w.json"
    path.write_text('{"nodes": [], "links": []}')
    with pytest.raises(WorkflowError, match="API format"):
        demo.read_workflow(path)
    path.write_text("{")
    with pytest.raises(WorkflowError, match="not JSON"):
        demo.read_workflow(path)
    path.write_text(json.dumps(WORKFLOW))
    assert demo.read_workflow(path) == WORKFLOW


def test_a_file_is_written_whole_and_leaves_nothing_beside_it(tmp_path):
    demo.write_whole(tmp_path / "report.json", b"old")
    demo.write_whole(tmp_path / "report.json", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("report.json", b"new")]


def test_the_table_has_a_line_for_each_number():
    report = {"prompts": {"Present": "polyps"}, "seed": 3, "operator": "suppress", "strength": 2.0}
    report["scores"] = {"ssim": 0.51236, "source_probability": [0.9, 0.1], "psnr": None}
    report["scores"] |= {"misses": ["label", "mask"], "anatomy_drifts": [0.1, 0.2, 0.3]}
    report["seconds"] = {"nodes": {"Sample": 1.5, "Paint": 0.001}, "total": 2.0}
    assert demo.table(report).splitlines() == [
        "  prompts.Present            polyps",
        "  seed                       3",
        "  operator                   suppress",
        "  strength                   2.000",
        "  scores.ssim                0.512",
        "  scores.source_probability  0.900 -> 0.100",
        "  scores.psnr                None",
        "  scores.misses              label, mask",
        "  seconds.nodes.Sample       1.500",
        "  seconds.total              2.000",
    ]


def test_a_pair_that_did_not_flip_is_never_reported_as_a_success():
    good = {"source": "polyps", "factual_label": "polyps", "counterfactual_label": "normal cecum"}
    good |= {"accepted": True, "flipped": True, "misses": []}
    assert demo.verdict(good).endswith("the pair is flipped.")
    missed = demo.verdict({**good, "flipped": False, "misses": ["finding left", "distance"]})
    assert missed.startswith("WARNING") and "not flipped (finding left, distance)" in missed


def test_a_factual_that_is_not_accepted_is_never_reported_as_a_success():
    other = {"source": "polyps", "factual_label": "normal cecum", "counterfactual_label": "normal cecum"}
    other |= {"accepted": False, "flipped": True, "misses": []}
    assert "WARNING" in demo.verdict(other) and "not of polyps" in demo.verdict(other)
    assert "unlike any render" in demo.verdict({**other, "factual_label": "polyps"})


def test_a_terminal_sees_one_line_and_a_log_one_for_each_node(capsys):
    steps = [Progress("Sample", value, 4, value / 8, 1.0) for value in (1, 2)] + [Progress("Save", 1, 1, 1.0, 2.0)]
    for terminal, lines in ((True, 0), (False, 2)):
        line = demo.ProgressLine(terminal)
        for step in steps:
            line(step)
        assert capsys.readouterr().out.count("\n") == lines
    line = demo.ProgressLine(False)
    line(steps[0])
    assert capsys.readouterr().out == " 12%  Sample 1/4  1.0 s\n"
