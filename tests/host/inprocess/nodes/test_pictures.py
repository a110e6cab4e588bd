"""The nodes that draw, in ComfyUI: their outputs, their previews, and what they refuse."""

import json
import shutil
from pathlib import Path

import folder_paths
import pytest
import tiny
import torch
from comfy_extras.nodes_image_compare import ImageCompare
from medsteer_pack.medsteer_core.errors import MedSteerError
from medsteer_pack.medsteer_core.host.folders import judges as judge_folder
from medsteer_pack.medsteer_core.host.folders import vectors as vector_folder
from medsteer_pack.medsteer_core.host.sampling import extraction
from medsteer_pack.medsteer_core.pictures.summary import describe
from medsteer_pack.nodes.evaluate import EvaluatePairs
from medsteer_pack.nodes.export import SaveCounterfactualPairs
from medsteer_pack.nodes.pictures import CounterfactualPanel, InspectVector, StrengthSweep

PRESENT, ABSENT, NEGATIVE = tiny.cond(1), tiny.cond(2), tiny.cond(3, tokens=2)
GENERATOR = torch.Generator().manual_seed(0)
FACTUAL = torch.rand(2, 32, 32, 3, generator=GENERATOR)
STEERED = torch.rand(4, 32, 32, 3, generator=GENERATOR)


def run(node, **inputs):
    made = node.PREPARE_CLASS_CLONE(None)
    made.hidden = None
    return made.execute(**inputs)


def shown(output):
    """The one picture that stands in ComfyUI's temporary folder for the node's preview."""
    told = output.ui if isinstance(output.ui, dict) else output.ui.as_dict()
    (entry,) = told["images"]
    return entry["type"], entry["filename"]


@pytest.mark.parametrize("noise", ["paired", "same state"])
def test_inspect_draws_an_extracted_vector_and_describes_it(pixart, noise):
    request = tiny.request(pixart, PRESENT, ABSENT, NEGATIVE, noise=noise, samples=4)
    vector = extraction.extract(pixart, request)
    output = run(InspectVector, vector=vector)
    picture, summary = output.result
    assert picture.shape == (1, 1096, 1060, 3) and summary == describe(vector)
    assert shown(output)[0] == "temp"


def test_the_panel_takes_the_samplers_concept_map_and_gives_the_numbers_of_all_pairs():
    output = run(CounterfactualPanel, factual=FACTUAL, counterfactual=STEERED[:2], concept_map=torch.rand(2, 32, 32))
    panel, metrics, verdict = output.result
    assert panel.shape[-1] == 3 and len(json.loads(metrics)["pairs"]) == 2 and shown(output)
    assert verdict.startswith("No judge is chosen. SSIM of the whole image") and output.ui["medsteer_note"] == (
        verdict,
    )


def test_the_panel_says_by_its_judge_and_mask_whether_it_worked():
    given = {"factual": FACTUAL, "counterfactual": STEERED[:2], "judge": "EndoPhantom"}
    noise = run(CounterfactualPanel, **given).result[2]
    assert noise.startswith("2 of 2 factual images are unlike anything that the judge was trained on")
    black = torch.zeros(1, 64, 64)
    assert "SSIM outside the mask" in run(CounterfactualPanel, **given, mask=black).result[2]
    with pytest.raises(MedSteerError, match="mask has shape"):
        run(CounterfactualPanel, **given, mask=torch.zeros(3, 64, 64))
    assert "There is no judge 'nobody'" in CounterfactualPanel.validate_inputs(judge="nobody")


def test_the_sweep_scores_with_the_embedded_judge_as_its_defaults_say():
    defaults = {entry.id: entry.default for entry in StrengthSweep.define_schema().inputs if hasattr(entry, "default")}
    output = run(StrengthSweep, **{**defaults, "factual": FACTUAL, "counterfactual": STEERED[:2]})
    _, scores, table = output.result
    record = json.loads(scores)
    assert (record["judge"], record["source"], record["target"]) == ("EndoPhantom", "polyps", "normal cecum")
    assert len(record["pairs"]) == 2 and len(table.splitlines()) == 3


def sweep(judge, target="normal cecum"):
    return run(
        StrengthSweep, factual=FACTUAL, counterfactual=STEERED, strengths="0.5, 1", judge=judge,
        source_class="polyps", target_class=target,
    )  # fmt: skip


def test_the_sweep_without_a_judge_measures_pixels():
    record = json.loads(sweep("none").result[1])
    assert [(p["image"], p["strength"]) for p in record["pairs"]] == [(1, 0.5), (1, 1.0), (2, 0.5), (2, 1.0)]


def test_a_class_that_the_judge_lacks_is_an_error_that_lists_its_classes():
    with pytest.raises(MedSteerError, match="target class is 'ulcers'.*normal pylorus"):
        sweep("EndoPhantom", "ulcers")


def test_judges_are_listed_from_the_models_folder_and_others_are_refused():
    vector_folder.register_folder()
    judges = Path(folder_paths.get_folder_paths("medsteer")[0]) / "judges"
    for name in ("kvasir/judge.json", "flat.onnx", "flat.json", "lonely.onnx"):
        (judges / name).parent.mkdir(parents=True, exist_ok=True)
        (judges / name).write_text("{}")
    assert judge_folder.names() == ["EndoPhantom", "none", "flat.onnx", "kvasir"]
    before = judge_folder.state("flat.onnx")
    (judges / "flat.json").write_text("{ }")
    assert judge_folder.state("flat.onnx") != before and judge_folder.state("none") == ""
    assert StrengthSweep.validate_inputs("kvasir") is True and StrengthSweep.validate_inputs(None) is True
    assert "no judge '../kvasir'" in StrengthSweep.validate_inputs("../kvasir")
    with pytest.raises(MedSteerError, match="kvasir"):
        sweep("kvasir")
    shutil.rmtree(judges)


def test_cores_compare_images_takes_a_pair_of_ours():
    output = ImageCompare.execute(image_a=FACTUAL, image_b=STEERED[:2])
    assert len(output.ui["a_images"]) == len(output.ui["b_images"]) == 2


@pytest.mark.parametrize("node", [StrengthSweep, EvaluatePairs, SaveCounterfactualPairs])
def test_a_class_that_the_judge_does_not_know_is_refused_when_run_is_pressed(node):
    more = {"folder": "pairs"} if node is SaveCounterfactualPairs else {}
    classes = {"source_class": "polyps", "target_class": "normal cecum"}
    assert node.validate_inputs(judge="EndoPhantom", **classes, **more) is True
    said = node.validate_inputs(judge="EndoPhantom", **{**classes, "target_class": "Barrett"}, **more)
    assert said.startswith("judge 'EndoPhantom': the target class is 'Barrett'; one of these was expected: dyed")
    assert node.validate_inputs(judge=None, **{**classes, "target_class": "Barrett"}, **more) is True  # linked
    assert node.validate_inputs(judge="EndoPhantom", **dict.fromkeys(classes), **more) is True


def test_whatever_can_be_told_of_widgets_is_told_when_run_is_pressed():
    assert "one number or two" in StrengthSweep.validate_inputs(judge="none", strengths="1,5")
    save = {"folder": "pairs", "judge": "none", "source_class": "a", "target_class": "b", "split": "auto"}
    assert SaveCounterfactualPairs.validate_inputs(**save, validation_fraction=0.5, test_fraction=0.5) is True
    said = SaveCounterfactualPairs.validate_inputs(**save, validation_fraction=0.6, test_fraction=0.5)
    assert "at most 1 together" in said
