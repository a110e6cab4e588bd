"""Judges from files: timm's and ONNX' own numbers, scores with less than EndoPhantom's judges know, and bad files."""

import json
import math
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from medsteer_core.endophantom.phantom import CLASSES as KVASIR_CLASSES
from medsteer_core.errors import MedSteerError
from medsteer_core.judges.files import classes_of, load_judge
from medsteer_core.judges.judge import Answers, Terms
from medsteer_core.judges.preprocessing import Preprocessing
from medsteer_core.scores import scorer as evaluate
from medsteer_core.scores.scorer import score_pair, score_pairs, summarise, wilson

LABELS = ["normal-cecum", "polyps", "ulcerative-colitis"]
CARD = {
    "labels": LABELS,
    "input_size": [32, 32],
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.25, 0.3],
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "activation": "softmax",
}
MARKER = {
    "labels": ["polyp"],
    "findings_of": {"normal-cecum": [], "polyps": ["polyp"], "ulcerative-colitis": None},
    "threshold": 0.5,
    "input_size": [64, 64],
    "mean": [0.0, 0.0, 0.0],
    "std": [1.0, 1.0, 1.0],
    "interpolation": "bilinear",
    "activation": "sigmoid",
}
PLAIN = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "interpolation": "bilinear"}
SIDE = 64
BOX = (slice(16, 32), slice(16, 32))


def noise(n=3, side=48, seed=0):
    """Images of which a PNG holds the very values."""
    levels = torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(seed))
    return levels.float() / 255


def write(path, card, **changes):
    path.write_text(json.dumps({k: v for k, v in {**card, **changes}.items() if v is not ...}), encoding="utf-8")


def timm_folder(folder, architecture="test_resnet", **changes):
    """A judge of random timm weights in ``folder``, and the model."""
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    torch.manual_seed(1)
    model = timm.create_model(architecture, pretrained=False, num_classes=len(LABELS)).eval()
    save_file(model.state_dict(), folder / "classifier.safetensors")
    write(folder / "judge.json", CARD, architecture=architecture, **changes)
    return model


def graph(nodes, weights, output, batch="n", side=SIDE, inputs=("images",)):
    """The bytes of an ONNX graph from images to ``scores``."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    values = [numpy_helper.from_array(numpy.asarray(value, numpy.float32), name) for name, value in weights.items()]
    made = helper.make_graph(
        [helper.make_node(kind, ins, [out], **options) for kind, ins, out, options in nodes],
        "judge",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 3, side, side]) for name in inputs],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, output)],
        values,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def by_blue(labels=3, batch="n", **options):
    """A classifier that calls an image polyps when its mean blue is above 0.225, else normal cecum."""
    weights = numpy.zeros((3, labels))
    weights[2, 1] = 200
    bias = numpy.array([0.0, -45.0] + [-20.0] * (labels - 2))
    nodes = [
        ("GlobalAveragePool", ["images"], "pooled", {}),
        ("Flatten", ["pooled"], "flat", {}),
        ("Gemm", ["flat", "w", "b"], "scores", {}),
    ]
    return graph(nodes, {"w": weights, "b": bias}, [batch, labels], batch, **options)


def marks_blue(**options):
    """A segmenter that marks the pixels whose blue is above a half."""
    kernel = numpy.array([0.0, 0.0, 40.0]).reshape(1, 3, 1, 1)
    return graph(
        [("Conv", ["images", "w", "b"], "scores", {})], {"w": kernel, "b": [-20.0]}, ["n", 1, SIDE, SIDE], **options
    )


def blue_folder(folder, segmenter=True, **changes):
    """A judge whose every answer is known: blue is polyp."""
    pytest.importorskip("onnxruntime")
    folder.mkdir(exist_ok=True)
    (folder / "classifier.onnx").write_bytes(by_blue())
    write(folder / "judge.json", CARD, input_size=[SIDE, SIDE], **PLAIN)
    if segmenter:
        (folder / "segmenter.onnx").write_bytes(marks_blue())
        write(folder / "segmenter.json", MARKER, **changes)
    return folder


def picture(blue=BOX, seed=0):
    """A reddish picture (3, 64, 64) whose ``blue`` part is a polyp to `blue_folder`."""
    image = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 0.1
    image += torch.tensor([0.6, 0.4, 0.15]).view(3, 1, 1)
    if blue is not None:
        image[2][blue] = 1.0
    return image


# Preprocessing


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize(
    ("size", "crop_pct", "interpolation"),
    [
        ((64, 64), 1.0, "bicubic"),
        ((96, 64), 0.875, "bilinear"),
        ((60, 60), 0.95, "lanczos"),
        ((48, 80), 0.9, "nearest"),
    ],
)
def test_preprocessing_is_timms_transform_to_the_last_bit(size, crop_pct, interpolation, crop_mode):
    data = pytest.importorskip("timm.data")
    mine = Preprocessing(size, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), interpolation, crop_pct, crop_mode)
    options = {"interpolation": interpolation, "mean": mine.mean, "std": mine.std, "crop_pct": crop_pct}
    theirs = data.create_transform((3, *size), is_training=False, crop_mode=crop_mode, **options)
    draw = numpy.random.default_rng(0)
    for shape in ((64, 64), (57, 91), (120, 50), (16, 200), size):
        levels = draw.integers(0, 256, (*shape, 3), dtype=numpy.uint8)
        image = torch.from_numpy(levels).permute(2, 0, 1)[None].float() / 255
        assert torch.equal(mine(image)[0], theirs(Image.fromarray(levels)))


def test_preprocessing_of_a_models_own_configuration_is_timms():
    timm = pytest.importorskip("timm")
    config = timm.data.resolve_data_config({}, model=timm.create_model("test_vit", pretrained=False))
    theirs = timm.data.create_transform(**config)
    size = config.pop("input_size")[1:]
    mine = Preprocessing(size, **config)
    image = noise(1, 200)
    picture = Image.fromarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy())
    assert torch.equal(mine(image)[0], theirs(picture))


def test_values_between_two_levels_are_what_a_png_would_hold():
    mine = Preprocessing((16, 16), (0.0,) * 3, (1.0,) * 3)
    for level in (99.6, 100.4):
        assert torch.equal(mine(torch.full((1, 3, 16, 16), level / 255)), torch.full((1, 3, 16, 16), 100 / 255))


# The networks' own numbers


@pytest.mark.parametrize("architecture", ["test_resnet", "test_convnext", "test_vit"])
def test_a_timm_classifier_from_a_file_gives_the_models_probabilities(tmp_path, architecture):
    pytest.importorskip("timm")
    size = [160, 160] if architecture == "test_vit" else [32, 32]
    model = timm_folder(tmp_path, architecture, input_size=size)
    judge, images = load_judge(tmp_path), noise()
    with torch.no_grad():
        expected = model(judge.classifier.card.preprocessing(images)).softmax(1)
    assert torch.equal(judge(images).probabilities, expected)
    assert judge.terms.classes == tuple(LABELS)


def test_loading_a_judge_leaves_the_random_state_alone(tmp_path):
    timm_folder(tmp_path)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    load_judge(tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())


def test_many_images_are_judged_as_each_alone(tmp_path):
    judge = load_judge(blue_folder(tmp_path))
    images = torch.stack([picture(BOX if i % 3 else None, i) for i in range(20)])
    together = judge(images)
    for i in (0, 7, 19):
        alone = judge(images[i : i + 1])
        assert torch.allclose(together.probabilities[i], alone.probabilities[0], atol=1e-6)
        assert torch.equal(together.masks[i], alone.masks[0])


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_an_exported_onnx_classifier_gives_the_models_probabilities(tmp_path, activation):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(2)
    layers = [torch.nn.Conv2d(3, 8, 5, 4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 7 * 7, 3)]
    model = torch.nn.Sequential(*layers, *([torch.nn.Softmax(1)] if activation == "none" else [])).eval()
    path = tmp_path / "mine.onnx"
    names = {"input_names": ["pixels"], "output_names": ["scores"], "dynamic_axes": {"pixels": {0: "n"}}}
    with pytest.warns(DeprecationWarning):
        torch.onnx.export(model, torch.zeros(1, 3, 32, 32), str(path), dynamo=False, **names)
    write(tmp_path / "mine.json", CARD, activation=activation, input="pixels", output="scores")
    judge, images = load_judge(path), noise()
    with torch.no_grad():
        values = model(judge.classifier.card.preprocessing(images))
    expected = {"softmax": values.softmax(1), "sigmoid": values.sigmoid(), "none": values}[activation]
    assert torch.allclose(judge(images).probabilities, expected, atol=1e-6)


def test_an_onnx_graph_of_a_fixed_batch_judges_any_number_of_images(tmp_path):
    blue_folder(tmp_path)
    images = torch.stack([picture(BOX if i % 2 else None, i) for i in range(5)])
    expected = load_judge(tmp_path)(images).probabilities
    (tmp_path / "classifier.onnx").write_bytes(by_blue(batch=2))
    assert torch.allclose(load_judge(tmp_path)(images).probabilities, expected, atol=1e-6)


def test_the_masks_of_an_onnx_segmenter_are_where_its_finding_is(tmp_path):
    judge = load_judge(blue_folder(tmp_path))
    masks = judge(picture()[None]).masks
    expected = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.bool)
    expected[0, 0, BOX[0], BOX[1]] = True
    assert torch.equal(masks, expected)
    large = torch.nn.functional.interpolate(picture()[None], size=(128, 192), mode="nearest")
    wanted = torch.nn.functional.interpolate(expected.float(), size=(128, 192), mode="nearest") > 0.5
    found = judge(large).masks
    assert found.shape == (1, 1, 128, 192)
    assert (found & wanted).sum() / (found | wanted).sum() > 0.9


def test_the_background_of_a_segmenter_is_no_finding(tmp_path):
    blue_folder(tmp_path)
    kernel = numpy.array([[0.0, 0.0, -40.0], [0.0, 0.0, 40.0]]).reshape(2, 3, 1, 1)
    made = graph(
        [("Conv", ["images", "w", "b"], "scores", {})], {"w": kernel, "b": [20.0, -20.0]}, ["n", 2, SIDE, SIDE]
    )
    (tmp_path / "segmenter.onnx").write_bytes(made)
    write(tmp_path / "segmenter.json", MARKER, labels=["rest", "polyp"], background="rest", activation="softmax")
    judge = load_judge(tmp_path)
    assert judge.terms.findings == ("polyp",)
    assert judge(picture()[None]).masks.sum() == 16 * 16
    assert score_pair(picture(), picture(None), "polyps", "normal cecum", judge).finding_left == 0.0


@pytest.mark.parametrize(("head", "architecture"), [("unet", "test_resnet"), ("linear", "test_convnext")])
def test_a_segmenter_on_a_timm_encoder_gives_the_modules_masks(tmp_path, head, architecture):
    pytest.importorskip("timm")
    from safetensors.torch import save_file

    from medsteer_core.judges.timm_network import Segmenter

    blue_folder(tmp_path, segmenter=False)
    torch.manual_seed(3)
    model = Segmenter(architecture, 1, (64, 64), head, 16).eval()
    save_file(model.state_dict(), tmp_path / "segmenter.safetensors")
    write(tmp_path / "segmenter.json", MARKER, architecture=architecture, head=head, head_width=16)
    judge, images = load_judge(tmp_path), noise(2, 64)
    with torch.no_grad():
        soft = model(images).sigmoid()
    expected = torch.nn.functional.interpolate(soft, size=(64, 64), mode="bilinear", align_corners=False) > 0.5
    assert 0.02 < expected.float().mean() < 0.98
    assert torch.equal(judge(images).masks, expected)


def test_a_unet_on_a_timm_encoder_learns_where_a_finding_is():
    pytest.importorskip("timm")
    from medsteer_core.judges.timm_network import Segmenter

    torch.manual_seed(0)
    model = Segmenter("test_resnet", 1, (64, 64), "unet", 16)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    corners = torch.randint(0, 44, (8, 2), generator=torch.Generator().manual_seed(1)).tolist()
    boxes = [(slice(y, y + 20), slice(x, x + 20)) for y, x in corners]
    images = torch.stack([picture(box, i) for i, box in enumerate(boxes)])
    truth = (images[:, 2:] > 0.5).float()
    for _ in range(25):
        soft = torch.nn.functional.interpolate(model(images), size=(64, 64), mode="bilinear")
        loss = torch.nn.functional.binary_cross_entropy_with_logits(soft, truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = soft.detach() > 0
    assert (found * truth).sum() * 2 / (found.sum() + truth.sum()) > 0.8


# Scores of a judge that knows less


def test_without_a_segmenter_the_label_decides_and_the_score_says_what_was_not_judged(tmp_path):
    judge = load_judge(blue_folder(tmp_path, segmenter=False))
    score = score_pair(picture(), picture(None), "polyps", "normal cecum", judge)
    assert (score.factual_label, score.counterfactual_label) == ("polyps", "normal-cecum")
    assert score.accepted and score.flipped and score.misses == ()
    unknown = ("distance", "finding_before", "finding_after", "finding_left", "finding_gone", "finding_kept")
    unknown += ("kept_overlap", "finding_added", "ssim_outside", "psnr_outside", "mask_fraction", "outside_fraction")
    unknown += ("anatomy_drift", "anatomy_drifts", "removes", "structure")
    assert [name for name in unknown if getattr(score, name) is not None] == []
    assert [words.split(":")[0] for words in score.not_judged] == [
        "findings and the outside of them",
        "distance",
        "anatomy",
    ]
    assert "no segmenter" in score.not_judged[0]
    assert 0 < score.ssim < 1 and not score.identical


def test_a_label_that_stays_is_no_flip(tmp_path):
    judge = load_judge(blue_folder(tmp_path, segmenter=False))
    score = score_pair(picture(), picture(seed=1), "polyps", "normal cecum", judge)
    assert score.accepted and not score.flipped and score.misses == ("label",)


def test_with_a_segmenter_a_finding_that_is_left_is_no_flip(tmp_path):
    judge = load_judge(blue_folder(tmp_path))
    gone = score_pair(picture(), picture(None), "polyps", "normal cecum", judge)
    assert gone.flipped and gone.finding_gone and gone.finding_before == pytest.approx(256 / SIDE**2)
    # sixteen blue pixels: too few for the classifier, enough for the segmenter
    left = score_pair(picture(), picture((slice(0, 4), slice(0, 4))), "polyps", "normal cecum", judge)
    assert left.counterfactual_label == "normal-cecum"
    assert left.finding_left == pytest.approx(16 / SIDE**2)
    assert left.misses == ("finding left",) and not left.flipped
    assert [words.split(":")[0] for words in gone.not_judged] == ["distance", "anatomy"]
    assert gone.removes is True and gone.structure == "ssim_outside"


def test_a_finding_that_should_come_must_be_found(tmp_path):
    found = load_judge(blue_folder(tmp_path / "found"))
    score = score_pair(picture(None), picture(), "normal cecum", "polyps", found)
    assert score.finding_added is True and score.flipped and score.removes is False
    # blue enough for the classifier, nowhere blue enough for the segmenter
    haze = picture(None)
    haze[2] += 0.2
    score = score_pair(picture(None), haze, "normal cecum", "polyps", found)
    assert score.counterfactual_label == "polyps" and score.finding_added is False
    assert score.misses == ("finding not added",) and not score.flipped


def test_the_limits_of_a_finding_are_the_files(tmp_path):
    judge = load_judge(blue_folder(tmp_path, left_limit=0.01, found_limit=0.2))
    small = picture((slice(0, 4), slice(0, 4)))
    assert score_pair(picture(), small, "polyps", "normal cecum", judge).flipped
    added = score_pair(picture(None), picture(), "normal cecum", "polyps", judge)
    assert added.misses == ("finding not added",)


def test_the_outside_is_clear_of_the_segmenters_masks(tmp_path):
    judge = load_judge(blue_folder(tmp_path))
    score = score_pair(picture(), picture(None), "polyps", "normal cecum", judge)
    assert score.ssim_outside == pytest.approx(1.0, abs=1e-6) and score.psnr_outside == 100.0
    assert score.ssim < 0.99
    # the box grown by two of the segmenter's pixels and by half of SSIM's window
    assert score.outside_fraction == pytest.approx(1 - (16 + 2 * 2 + 2 * 5) ** 2 / SIDE**2)
    damaged = picture(None)
    damaged[0, 48:56, 48:56] = 0.0
    assert score_pair(picture(), damaged, "polyps", "normal cecum", judge).ssim_outside < 0.99


def test_a_class_that_the_segmenter_does_not_mark_is_not_judged_by_it(tmp_path):
    judge = load_judge(blue_folder(tmp_path))
    score = score_pair(picture(None), picture(None, 1), "normal cecum", "ulcerative colitis", judge)
    assert score.finding_left is None and score.ssim_outside is None and score.finding_added is None
    assert "does not mark what 'ulcerative-colitis' shows" in score.not_judged[0]
    assert score.misses == ("label",)


def test_a_diffuse_finding_leaves_no_measure_of_structure(tmp_path):
    judge = load_judge(blue_folder(tmp_path, diffuse=["polyp"]))
    assert score_pair(picture(), picture(None), "polyps", "normal cecum", judge).structure is None


def test_the_summary_has_the_rates_and_their_denominators_and_says_what_was_not_judged(tmp_path):
    judge = load_judge(blue_folder(tmp_path))
    factuals = torch.stack([picture(seed=i) for i in range(5)] + [picture(None)])
    after = [None, None, None, (slice(0, 4), slice(0, 4)), BOX, None]
    counterfactuals = torch.stack([picture(blue, 10 + i) for i, blue in enumerate(after)])
    summary = summarise(score_pairs(factuals, counterfactuals, "polyps", "normal cecum", judge))
    # the last factual is no polyp
    assert (summary["n"], summary["accepted"], summary["flips"], summary["flip_rate"]) == (6, 5, 3, 0.6)
    assert summary["flip_rate_interval"] == [round(bound, 4) for bound in wilson(3, 5)]
    assert summary["finding_gone"] == 0.6 and summary["finding_added"] is None
    assert summary["judge"] == judge.identity and len(summary["not_judged"]) == 2
    assert summary["distance"] is None and summary["over_distance_limit"] is None
    assert summary["over_mask_limit"] == 0.0 and summary["anatomy_drift"] is None
    json.dumps(summary, allow_nan=False)


def test_the_summary_without_a_segmenter_has_no_rate_of_findings(tmp_path):
    judge = load_judge(blue_folder(tmp_path, segmenter=False))
    summary = summarise(score_pairs(picture()[None], picture(None)[None], "polyps", "normal cecum", judge))
    assert summary["flip_rate"] == 1.0
    unknown = ("finding_gone", "finding_left", "ssim_outside", "over_mask_limit", "structure", "mask_fraction")
    assert [summary[name] for name in unknown] == [None] * len(unknown)
    assert len(summary["not_judged"]) == 3


def test_a_null_pair_is_no_flip(tmp_path):
    judge = load_judge(blue_folder(tmp_path))
    score = score_pair(picture(), picture(), "polyps", "normal cecum", judge)
    assert score.identical and not score.flipped and set(score.misses) == {"label", "finding left"}


def test_pairs_of_several_judges_make_no_summary(tmp_path):
    with_, without = load_judge(blue_folder(tmp_path / "a")), load_judge(blue_folder(tmp_path / "b", segmenter=False))
    scores = [score_pair(picture(), picture(None), "polyps", "normal cecum", judge) for judge in (with_, without)]
    with pytest.raises(MedSteerError, match="one judge was expected"):
        summarise(scores)
    with pytest.raises(MedSteerError, match="EndoPhantom; sha256"):
        summarise([scores[0], replace(scores[0], judge=None)])


def test_a_score_names_its_judge_in_json(tmp_path):
    judge = load_judge(blue_folder(tmp_path))
    record = score_pair(picture(), picture(None), "polyps", "normal cecum", judge).to_dict()
    assert re.fullmatch("sha256:[0-9a-f]{64}", record["judge"]) and record["judge"] == judge.identity
    assert record["not_judged"][0].startswith("distance")
    json.dumps(record, allow_nan=False)


def test_classes_are_named_as_the_judge_or_the_prompt_has_them(tmp_path):
    judge = load_judge(blue_folder(tmp_path))
    score = score_pair(picture(), picture(None), "Polyps", "normal_cecum", judge)
    assert (score.source, score.target) == ("polyps", "normal-cecum")
    assert evaluate.class_of("An endoscopic image of normal cecum", judge.terms) == "normal-cecum"
    with pytest.raises(
        MedSteerError, match="the target class is 'normal pylorus'; one of these .*: normal-cecum, polyps"
    ):
        score_pair(picture(), picture(None), "polyps", "normal pylorus", judge)


def test_none_of_these_can_be_answered_and_not_asked_for(tmp_path):
    blue_folder(tmp_path, segmenter=False)
    write(tmp_path / "judge.json", CARD, input_size=[SIDE, SIDE], none_of_these="ulcerative-colitis", **PLAIN)
    judge = load_judge(tmp_path)
    assert judge.terms.labels == tuple(LABELS) and judge.terms.classes == ("normal-cecum", "polyps")
    with pytest.raises(MedSteerError, match="target class is 'ulcerative-colitis'"):
        score_pair(picture(), picture(None), "polyps", "ulcerative-colitis", judge)


def test_endophantoms_judges_are_a_judge_too_and_their_scores_say_nothing_new():
    judge = evaluate.embedded_judges()
    assert re.fullmatch("EndoPhantom sha256:[0-9a-f]{64}", judge.identity)
    assert judge.terms.findings_of is evaluate.FINDINGS_OF
    record = score_pair(picture(), picture(), "polyps", "normal cecum", judge).to_dict()
    assert not {"judge", "not_judged", "removes", "structure"} & set(record)
    assert "judge" not in summarise([score_pair(picture(), picture(), "polyps", "normal cecum", judge)])


# Identity


def test_the_identity_is_of_what_the_files_say_and_not_of_where_they_are(tmp_path):
    here, there = (load_judge(blue_folder(tmp_path / name)).identity for name in ("here", "there"))
    assert here == there
    others = {here, load_judge(blue_folder(tmp_path / "bare", segmenter=False)).identity}
    others.add(load_judge(blue_folder(tmp_path / "limit", left_limit=0.02)).identity)
    changed = blue_folder(tmp_path / "weights")
    (changed / "classifier.onnx").write_bytes(by_blue(batch=1))
    others.add(load_judge(changed).identity)
    write(changed / "judge.json", CARD, input_size=[SIDE, SIDE], **{**PLAIN, "interpolation": "box"})
    others.add(load_judge(changed).identity)
    assert len(others) == 5


# Files that do not fit


def refused(call, *words):
    """The error of ``call``: one line that has ``words``."""
    with pytest.raises(MedSteerError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label": ["a"]}, ("key 'label'", "Was 'labels' meant?")),
        ({"mean": ...}, ("lacks mean",)),
        ({"labels": ["a", "a", "b"]}, ("says labels", "different names")),
        ({"labels": ["polyps"]}, ("says labels", "two classes or more")),
        ({"labels": "polyps"}, ("says labels",)),
        ({"input_size": [32]}, ("says input_size: [32]", "[height, width]")),
        ({"input_size": [32.0, 32]}, ("says input_size",)),
        ({"input_size": [True, 32]}, ("says input_size",)),
        ({"mean": [0.5, 0.5]}, ("says mean", "three numbers")),
        ({"std": [0.0, 1, 1]}, ("says std", "above 0")),
        ({"std": [math.nan, 1, 1]}, ("says std",)),
        ({"interpolation": "cubic"}, ("says interpolation", "bicubic")),
        ({"crop_pct": 87.5}, ("says crop_pct", "0.1 to 1")),
        ({"crop_mode": "middle"}, ("says crop_mode", "squash")),
        ({"activation": "relu"}, ("says activation", "softmax")),
        ({"none_of_these": "other"}, ("says none_of_these", "one of the labels")),
        ({"architecture": 3}, ("says architecture", "text")),
        ({"architecture": "convnext_hug"}, ("has no model 'convnext_hug'",)),
        ({"architecture": "hf-hub:someone/model"}, ("has no model 'hf-hub:someone/model'",)),
        ({"architecture": "local-dir:/tmp"}, ("has no model",)),
        ({"architecture": ...}, ("lacks architecture",)),
        ({"input": "images"}, ("input or output, which are for .onnx",)),
        ({"labels": ["a", "b"]}, ("classifier.safetensors", "with 2 labels", "'fc.", "(3,", "(2,")),
        ({"architecture": "test_convnext"}, ("does not fit test_convnext", "missing", "unexpected")),
    ],
)
def test_a_judges_json_that_does_not_fit_is_refused_by_name(tmp_path, changes, words):
    timm_folder(tmp_path)
    write(tmp_path / "judge.json", {**CARD, "architecture": "test_resnet"}, **changes)
    refused(lambda: load_judge(tmp_path), str(tmp_path), *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"findings_of": {"polyps": ["polyp"]}}, ("says findings_of", "classes: normal-cecum, polyps")),
        ({"findings_of": {**MARKER["findings_of"], "polyps": ["tumour"]}}, ("says findings_of", "tumour")),
        ({"findings_of": ["polyp"]}, ("says findings_of",)),
        ({"threshold": 1}, ("says threshold", "between 0 and 1")),
        ({"threshold": ...}, ("lacks threshold",)),
        ({"crop_pct": 0.9}, ("key 'crop_pct'",)),
        ({"activation": "softmax"}, ("says activation", "always 1")),
        ({"background": "rest"}, ("says background",)),
        ({"background": "polyp"}, ("says labels", "beside the background")),
        ({"diffuse": ["colitis"]}, ("says diffuse",)),
        ({"labels": ["polyp", "dye"]}, ("segmenter.onnx", "names 2 labels")),
        ({"input_size": [32, 32]}, ("segmenter.onnx", "(batch, 3, 32, 32)")),
        ({"architecture": "test_resnet"}, ("says architecture, which is for .safetensors",)),
        ({"input": "pixels"}, ('says input: "pixels"', "has images")),
        ({"output": "logits"}, ('says output: "logits"', "has scores")),
        ({"head": "fpn"}, ("says head", "unet")),
        ({"head_width": 12}, ("says head_width",)),
    ],
)
def test_a_segmenters_json_that_does_not_fit_is_refused_by_name(tmp_path, changes, words):
    blue_folder(tmp_path, **changes)
    refused(lambda: load_judge(tmp_path), str(tmp_path), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not readable JSON"),
        ("[1]", "JSON list"),
        ('{"labels": [], "labels": []}', "'labels' twice"),
        (None, "There"),
    ],
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path, text, words):
    blue_folder(tmp_path)
    (tmp_path / "judge.json").unlink()
    if text is not None:
        (tmp_path / "judge.json").write_text(text)
    refused(lambda: load_judge(tmp_path), "judge.json", words)


class Trap:
    """A pickle that would make a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_in_a_safetensors_name_is_refused_and_not_run(tmp_path):
    timm_folder(tmp_path)
    sprung = tmp_path / "sprung"
    (tmp_path / "classifier.safetensors").write_bytes(pickle.dumps(Trap(sprung)))
    refused(lambda: load_judge(tmp_path), "classifier.safetensors", "a zip archive or a pickle")
    assert not sprung.exists()


def test_damaged_weights_are_refused_by_name(tmp_path):
    model = timm_folder(tmp_path)
    from safetensors.torch import save_file

    path = tmp_path / "classifier.safetensors"
    whole = path.read_bytes()
    for data, words in ((whole[:-100], "damaged"), (b"", "empty")):
        path.write_bytes(data)
        refused(lambda: load_judge(tmp_path), str(path), "not a readable safetensors file", words)
    state = model.state_dict()
    name = next(name for name in state if name.endswith("weight"))
    for changed, words in (
        ({k: v for k, v in state.items() if k != name}, ("1 missing", name)),
        ({**state, "extra": torch.zeros(1)}, ("1 unexpected", "extra")),
        ({**state, name: state[name][..., :1].contiguous()}, (name, "was expected")),
        ({**state, name: state[name].int()}, (name, "torch.int32")),
        ({**state, name: state[name] * math.nan}, (name, "not finite")),
    ):
        save_file(changed, path)
        refused(lambda: load_judge(tmp_path), str(path), *words)


def test_onnx_files_that_do_not_fit_are_refused_by_name(tmp_path):
    folder = blue_folder(tmp_path)
    path = folder / "classifier.onnx"
    whole = path.read_bytes()
    for data, words in (
        (whole[: len(whole) // 2], ("not a readable ONNX file",)),
        (b"", ("not a readable ONNX file",)),
        (by_blue(labels=4), ("names 3 labels", "(1, 4)")),
        (by_blue(side=32), ("(batch, 3, 64, 64)",)),
        (by_blue(inputs=("images", "more")), ("inputs images, more", '"input": ...')),
        (marks_blue(), ("(1, 1, 64, 64)",)),
    ):
        path.write_bytes(data)
        refused(lambda: load_judge(folder), str(path), *words)


def test_an_onnx_file_whose_weights_lie_elsewhere_is_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    folder = blue_folder(tmp_path)
    path = folder / "classifier.onnx"
    options = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    onnx.save(onnx.load_from_string(path.read_bytes()), str(path), **options)
    refused(lambda: load_judge(folder), str(path), "weights in another file", "external_data=False")


def test_probabilities_that_are_none_are_refused(tmp_path):
    folder = blue_folder(tmp_path)
    write(folder / "judge.json", CARD, input_size=[SIDE, SIDE], **{**PLAIN, "activation": "none"})
    refused(lambda: load_judge(folder), "classifier.onnx", "probabilities were expected", "activation")


def test_a_folder_must_hold_one_classifier_and_no_half_of_a_segmenter(tmp_path):
    refused(lambda: load_judge(tmp_path / "none"), "There is no", "none")
    refused(lambda: load_judge(tmp_path), "no classifier.safetensors and no classifier.onnx")
    folder = blue_folder(tmp_path / "judge")
    (folder / "classifier.safetensors").touch()
    refused(lambda: load_judge(folder), "classifier.safetensors and classifier.onnx; one of them")
    (folder / "classifier.safetensors").unlink()
    (folder / "segmenter.onnx").rename(tmp_path / "elsewhere.onnx")
    refused(lambda: load_judge(folder), "segmenter.json", "no segmenter.onnx beside it")
    (folder / "segmenter.json").rename(tmp_path / "elsewhere.json")
    assert load_judge(folder).segmenter is None
    assert load_judge(folder, tmp_path / "elsewhere.onnx").terms.findings == ("polyp",)
    both = blue_folder(tmp_path / "both")
    refused(lambda: load_judge(both, tmp_path / "elsewhere.onnx"), "both given as segmenter")
    (tmp_path / "judge.pt").touch()
    refused(lambda: load_judge(tmp_path / "judge.pt"), "judge.pt", ".safetensors or .onnx")


def test_images_that_are_none_are_refused(tmp_path):
    judge = load_judge(blue_folder(tmp_path))
    refused(lambda: judge(picture()), "(3, 64, 64)")
    refused(lambda: judge(torch.zeros(0, 3, 8, 8)), "(0, 3, 8, 8)")


def test_a_bare_function_that_answers_a_part_is_said_to_leave_out_the_rest():
    """Without terms it speaks in EndoPhantom's, and what it does not answer must not pass in silence."""
    probabilities = torch.zeros(2, 9)
    probabilities[0, KVASIR_CLASSES.index("polyps")] = 1
    probabilities[1, KVASIR_CLASSES.index("normal cecum")] = 1
    images = torch.rand(2, 1, 3, 32, 32)
    (score,) = score_pairs(*images, "polyps", "normal cecum", lambda _images: Answers(probabilities))
    assert score.flipped and len(score.not_judged) >= 2
    assert score.judge == "a judge without a name"


def test_a_judge_of_its_own_terms_needs_an_identity():
    class Nameless:
        terms = Terms(("a", "b"), ("a", "b"))
        identity = ""

        def __call__(self, images):
            return Answers(torch.eye(2))

    with pytest.raises(MedSteerError, match="no identity"):
        score_pairs(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32), "a", "b", Nameless())


def test_a_judges_classes_are_known_without_its_weights(tmp_path):
    write(tmp_path / "judge.json", CARD)
    (tmp_path / "classifier.safetensors").write_bytes(b"")
    assert classes_of(tmp_path) == tuple(LABELS)
    (tmp_path / "judge.json").write_text("{", encoding="utf-8")
    with pytest.raises(MedSteerError, match="judge.json"):
        classes_of(tmp_path)
