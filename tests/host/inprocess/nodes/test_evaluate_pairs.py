"""Evaluate Pairs and Random Direction in ComfyUI: their outputs, previews, judges from files, and what they refuse."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import folder_paths
import pytest
import tiny
import torch
from medsteer_pack.medsteer_core.endophantom.phantom import Anatomy, render
from medsteer_pack.medsteer_core.errors import MedSteerError
from medsteer_pack.medsteer_core.evaluation import report as evaluation
from medsteer_pack.medsteer_core.host.folders import vectors as vector_folder
from medsteer_pack.nodes.evaluate import EvaluatePairs, RandomDirection

SIDE = 64
CLASSES = {"source_class": "polyps", "target_class": "normal cecum"}
LABELS = ["polyps", "normal-cecum", "ulcer"]
PLAIN = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "input_size": [SIDE, SIDE], "interpolation": "bilinear"}


@pytest.fixture(autouse=True)
def no_lpips(monkeypatch):
    monkeypatch.setattr(evaluation, "load_lpips", lambda: (None, "LPIPS was not measured: by the test"))


@pytest.fixture(scope="module")
def pictures():
    """Two anatomies as polyps and as normal cecum, ComfyUI's images (2, 64, 64, 3)."""
    anatomy = Anatomy.sample(2, 0)
    return [render(anatomy, name, SIDE, noise_seed=0).image.movedim(1, -1) for name in CLASSES.values()]


@pytest.fixture
def judges():
    """The judges' folder."""
    vector_folder.register_folder()
    folder = Path(folder_paths.get_folder_paths("medsteer")[0]) / "judges"
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder)


def run(node, prompt=None, **inputs):
    made = node.PREPARE_CLASS_CLONE(None)
    made.hidden = SimpleNamespace(prompt=prompt, extra_pnginfo=None, unique_id="9")
    return made.execute(**inputs)


def evaluated(pictures, judge="EndoPhantom", prompt=None, **more):
    """The report, and the node's whole output."""
    factual, other = pictures
    output = run(EvaluatePairs, prompt, factual=factual, counterfactual=other, judge=judge, **CLASSES, **more)
    return json.loads(output.result[0]), output


def test_it_reports_every_arm_and_shows_the_plot_and_a_note(pictures):
    factual, other = pictures
    report, output = evaluated(
        pictures, strength_0=factual, random_direction=(factual + 0.01).clamp(0, 1), reprompted=other.flip(0)
    )
    assert [arm["arm"] for arm in report["arms"]] == ["counterfactual", "strength 0", "random direction", "re-prompt"]
    assert [arm["flips"] for arm in report["arms"]][:3] == [2, 0, 0]
    assert report["null_test"] == {"passed": True, "pairs": 2, "identical": 2, "largest_difference": 0.0}
    assert (report["source"], report["mask_source"], len(report["pairs"])) == ("polyps", "segmenter", 8)
    assert report["judge"].startswith("EndoPhantom sha256:")
    _, table, plot = output.result
    assert "2/2 = 100%" in table and plot.shape[0] == 1 and plot.shape[2:] == (1060, 3)
    assert output.ui["images"][0]["type"] == "temp" and output.ui["text"] == (table,)
    assert output.ui["medsteer_note"][0].endswith("Null test: passed, 2 of 2 pairs of strength 0 are identical.")


def test_a_masks_source_is_read_from_the_graph(pictures, judges):
    onnx_judge(judges / "flat")

    def source(slot, **sampler):
        nodes = {
            "3": {"class_type": "MedSteer_CounterfactualSampler", "inputs": {"lock": "none", **sampler}},
            "9": {"class_type": "MedSteer_EvaluatePairs", "inputs": {"mask": ["3", slot]}},
        }
        return evaluated(pictures, "flat", nodes, mask=torch.zeros(1, 8, 8))[0]["mask_source"]

    assert source(2) == "concept map"
    assert source(3) == source(3, lock="concept map", mask=["1", 0]) == "user"
    assert source(3, lock="concept map") == "concept map"
    assert evaluated(pictures, "flat", mask=torch.zeros(2, 8, 8))[0]["mask_source"] == "user"
    assert evaluated(pictures, "flat")[0]["mask_source"] == "none"


def test_an_onnx_classifier_with_a_segmenter_judges(pictures, judges):
    onnx_judge(judges / "flat", segmenter=True)
    factual, other = torch.zeros(1, SIDE, SIDE, 3), torch.zeros(1, SIDE, SIDE, 3)
    factual[..., 0] = 0.9  # of red it says polyps
    factual[:, :16, :16, 2] = 1.0  # where it is blue is a polyp
    other[..., 1] = 0.9
    report, _ = evaluated((factual, other), "flat")
    (pair,) = report["pairs"]
    assert pair["flipped"] and pair["finding_gone"] and pair["finding_before"] == pytest.approx(1 / 16, abs=0.01)
    before, after = (torch.tensor(v).softmax(0)[1] for v in ([0.9, 0, 1 / 16], [0, 0.9, 0.0]))
    assert pair["target_change"] == pytest.approx(float(after - before), abs=2e-3)
    assert report["mask_source"] == "segmenter" and report["judge"].startswith("sha256:")
    assert any("distance" in note for note in report["notes"])


def test_a_timm_classifier_judges_and_nothing_it_lacks_is_made_up(pictures, judges):
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    folder = judges / "timm"
    folder.mkdir()
    torch.manual_seed(1)
    model = timm.create_model("test_resnet", pretrained=False, num_classes=3).eval()
    save_file(model.state_dict(), folder / "classifier.safetensors")
    card = {"labels": LABELS, "architecture": "test_resnet", "crop_pct": 1.0, "activation": "softmax", **PLAIN}
    (folder / "judge.json").write_text(json.dumps(card))
    report, _ = evaluated(pictures, "timm")
    # 8 bits, as the judge sees them
    first = (pictures[0][0].movedim(-1, 0) * 255).clamp(0, 255).byte().float() / 255
    with torch.no_grad():
        wanted = float(model(first[None]).softmax(1)[0, 1])
    assert report["pairs"][0]["target_probability"][0] == pytest.approx(wanted, abs=5e-3)
    assert report["pairs"][0]["ssim_outside"] is None and report["structure"] == "ssim"
    assert any("no segmenter" in note for note in report["notes"])


def onnx_judge(folder, segmenter=False):
    """A classifier by the mean of each channel, and a segmenter that marks blue."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    import numpy
    from onnx import TensorProto, helper, numpy_helper

    def write(name, nodes, output, weights=()):
        graph = helper.make_graph(
            nodes, name,
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, SIDE, SIDE])],
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, output)],
            list(weights),
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())

    folder.mkdir()
    pooled = [helper.make_node("GlobalAveragePool", ["images"], ["p"]), helper.make_node("Flatten", ["p"], ["scores"])]
    write("classifier", pooled, ["n", 3])
    card = {"labels": LABELS, "crop_pct": 1.0, "activation": "softmax", **PLAIN}
    (folder / "judge.json").write_text(json.dumps(card))
    if segmenter:
        kernel = numpy_helper.from_array(numpy.array([0, 0, 40.0], numpy.float32).reshape(1, 3, 1, 1), "w")
        bias = numpy_helper.from_array(numpy.array([-20.0], numpy.float32), "b")
        conv = [helper.make_node("Conv", ["images", "w", "b"], ["scores"])]
        write("segmenter", conv, ["n", 1, SIDE, SIDE], [kernel, bias])
        shows = {"polyps": ["polyp"], "normal-cecum": [], "ulcer": []}
        marker = {"labels": ["polyp"], "findings_of": shows, "activation": "sigmoid", "threshold": 0.5, **PLAIN}
        (folder / "segmenter.json").write_text(json.dumps(marker))


def test_what_does_not_fit_is_refused(pictures, judges):
    factual, _ = pictures
    assert "none" not in next(entry for entry in EvaluatePairs.define_schema().inputs if entry.id == "judge").options
    assert "a judge was expected" in EvaluatePairs.validate_inputs("none")
    assert "no judge 'x'" in EvaluatePairs.validate_inputs("x") and EvaluatePairs.validate_inputs(None) is True
    with pytest.raises(MedSteerError, match="a judge was expected"):
        evaluated(pictures, "none")
    with pytest.raises(MedSteerError, match="strength_0 has 1 images and factual 2"):
        evaluated(pictures, strength_0=factual[:1])
    with pytest.raises(MedSteerError, match="equal shapes were expected"):
        evaluated(pictures, reprompted=torch.rand(2, 32, 32, 3))


def test_random_direction_makes_a_vector_that_steer_takes_and_reports_it(pixart):
    vector = tiny.vector(pixart)
    output = run(RandomDirection, vector=vector, seed=3)
    control, report = output.result
    assert "isotropic, rank 1" in report and output.ui.as_dict()["text"] == (report,)
    names = {"positive": tiny.cond(1), "negative": tiny.cond(2)}
    plain, steered, drawn = (
        tiny.run(model, *names.values())
        for model in (
            pixart,
            tiny.steered(pixart, vector, operator="add"),
            tiny.steered(pixart, control, operator="add"),
        )
    )
    assert not torch.equal(plain, drawn) and not torch.equal(steered, drawn)
    with pytest.raises(MedSteerError, match="class"):
        tiny.steered(pixart, control, operator="set")
