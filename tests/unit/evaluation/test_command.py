"""`python -m medsteer_core.evaluation` on dataset folders: its numbers, files and exit statuses."""

import io
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from medsteer_core.dataset.pair_dataset import PairDataset
from medsteer_core.dataset.records import COUNTERFACTUAL, RANDOM, STRENGTH_ZERO, finish, short_hash
from medsteer_core.endophantom.phantom import Anatomy, render
from medsteer_core.evaluation import command as evaluation_command
from medsteer_core.evaluation import report as evaluation
from medsteer_core.evaluation.command import main
from medsteer_core.evaluation.report import evaluate_batches
from medsteer_core.scores.scorer import embedded_judges

SOURCE, TARGET = "polyps", "normal cecum"
NO_LPIPS = (None, "LPIPS was not measured: by the test")


@pytest.fixture(autouse=True)
def no_lpips(monkeypatch):
    for module in (evaluation, evaluation_command):
        monkeypatch.setattr(module, "load_lpips", lambda: NO_LPIPS)


def in_8_bits(images):
    return (images * 255).round().byte()


@pytest.fixture(scope="module")
def pictures():
    """Three anatomies as polyps and as normal cecum, (3, 3, 64, 64) bytes each."""
    anatomy = Anatomy.sample(3, 0)
    return {name: in_8_bits(render(anatomy, name, 64, noise_seed=0).image) for name in (SOURCE, TARGET)}


def png(image):
    data = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy() if image.ndim == 3 else image.numpy()).save(data, "PNG")
    return data.getvalue()


def add(folder, number, factual, counterfactual, arm=COUNTERFACTUAL, target=TARGET, mask=None, **known):
    """A pair in the folder; its id."""
    made = {"seed": number, "steering": [], "model": {"weights": "ab" * 32}}
    noise = short_hash({"seed": number})
    record = finish(
        {"group_id": noise, "noise_id": noise, "made": made}, source=SOURCE, target=target, split="train", arm=arm,
        has_mask=mask is not None, **known,
    )  # fmt: skip
    PairDataset(folder).add(record, png(factual), png(counterfactual), None if mask is None else png(mask))
    return record["pair_id"]


@pytest.fixture
def folder(tmp_path, pictures):
    """Three pairs with a null test and a control for each."""
    for number in range(3):
        factual, other = pictures[SOURCE][number], pictures[TARGET][number]
        add(tmp_path / "pairs", number, factual, other)
        add(tmp_path / "pairs", number, factual, factual, STRENGTH_ZERO)
        add(tmp_path / "pairs", number, factual, factual.bitwise_or(torch.ones_like(factual)), RANDOM)
    return tmp_path / "pairs"


def found_in(folder):
    return json.loads((folder.with_name(f"{folder.name}-evaluation") / "report.json").read_text())


def test_the_commands_numbers_are_the_nodes(folder, pictures, capsys):
    assert main([str(folder)]) == 0
    (group,) = found_in(folder)["groups"]
    floats = {name: images.float() / 255 for name, images in pictures.items()}
    noisy = pictures[SOURCE].bitwise_or(torch.ones_like(pictures[SOURCE])).float() / 255
    arms = {COUNTERFACTUAL: floats[TARGET], STRENGTH_ZERO: floats[SOURCE], RANDOM: noisy}
    wanted = json.loads(json.dumps(evaluate_batches(floats[SOURCE], arms, SOURCE, TARGET, embedded_judges())))

    def numbers(report):  # but for the pairs' names and order
        pairs = [{name: value for name, value in pair.items() if name != "pair"} for pair in report["pairs"]]
        return sorted(pairs, key=json.dumps)

    assert numbers(group) == numbers(wanted)
    for own, other in zip(group["arms"], wanted["arms"], strict=True):
        same = {name for name in own if not isinstance(own[name], (float, list))}
        assert {name: own[name] for name in same} == {name: other[name] for name in same}
        assert own["flip_rate_interval"] == other["flip_rate_interval"]
        assert own["ssim_outside"] == pytest.approx(other["ssim_outside"], abs=2e-4)
    assert group["null_test"] == {"passed": True, "pairs": 3, "identical": 3, "largest_difference": 0.0}
    assert "3/3 = 100% (44% to 100%)" in capsys.readouterr().out


def test_it_writes_a_report_a_table_the_pairs_and_a_plot_beside_the_folder(folder):
    before = sorted(folder.rglob("*"))
    main([str(folder), "--quiet"])
    assert sorted(folder.rglob("*")) == before  # a loader of the dataset would take the plot for an image
    output = folder.with_name("pairs-evaluation")
    assert sorted(path.name for path in output.iterdir()) == ["pairs.csv", "plot.png", "report.json", "table.md"]
    assert len((output / "pairs.csv").read_text().splitlines()) == 10
    assert (output / "table.md").read_text().startswith("## polyps -> normal cecum\n")
    assert Image.open(output / "plot.png").width == 1060


def test_pairs_are_grouped_by_their_intended_labels(folder, pictures, tmp_path):
    add(folder, 7, pictures[SOURCE][0], pictures[TARGET][0], target="ulcerative colitis")
    assert main([str(folder), "--output", str(tmp_path / "out")]) == 0
    groups = json.loads((tmp_path / "out" / "report.json").read_text())["groups"]
    assert [(group["target"], len(group["pairs"])) for group in groups] == [(TARGET, 9), ("ulcerative colitis", 1)]


def test_a_failed_null_test_is_exit_status_1(folder, pictures, capsys):
    add(folder, 8, pictures[SOURCE][0], pictures[SOURCE][1], STRENGTH_ZERO)
    assert main([str(folder)]) == 1
    assert "Null test: FAILED, 3 of 4 pairs of strength 0 are identical; pixels" in capsys.readouterr().out


def test_pairs_that_cannot_be_read_or_judged_are_named_and_are_exit_status_1(folder, pictures, capsys):
    unknown = add(folder, 8, pictures[SOURCE][0], pictures[TARGET][0], target="adenoma")
    cut = add(folder, 9, pictures[SOURCE][0], pictures[TARGET][0])
    (image,) = folder.rglob(f"{cut}_factual.png")
    image.write_bytes(image.read_bytes()[:200])
    gone = add(folder, 10, pictures[SOURCE][0], pictures[TARGET][0])
    next(folder.rglob(f"{gone}_counterfactual.png")).unlink()
    assert main([str(folder)]) == 1
    problems = {problem["pair"]: problem["why"] for problem in found_in(folder)["problems"]}
    assert set(problems) == {unknown, cut, gone}
    assert "target class is 'adenoma'" in problems[unknown] and "not a readable image" in problems[cut]
    assert f"not evaluated: {cut}" in capsys.readouterr().err
    assert len(found_in(folder)["groups"][0]["pairs"]) == 9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere has no pairs; a folder that Save Counterfactual Pairs wrote"),
        (["pairs", "--judge", "nobody"], "There is no judge 'nobody'; EndoPhantom, a judge's folder or"),
        (["pairs", "--split", "test"], "None is in the split 'test'"),
    ],
)
def test_what_cannot_be_evaluated_is_exit_status_2_and_writes_nothing(folder, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(folder.parent)
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and words in told and told.count("\n") == 1
    assert [path.name for path in folder.parent.iterdir()] == ["pairs"]


def test_the_masks_of_the_folder_count_for_a_judge_without_a_segmenter(tmp_path, folder, pictures):
    onnx_judge(tmp_path / "judge")
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[:16] = 255
    factual = pictures[SOURCE][0]
    changed = factual.clone()
    changed[:, :16] = 0
    add(tmp_path / "masked", 1, factual, changed, mask=mask, mask_source="concept map")
    assert main([str(tmp_path / "masked"), "--judge", str(tmp_path / "judge")]) == 0
    (group,) = found_in(tmp_path / "masked")["groups"]
    assert group["mask_source"] == "concept map" and group["judge"].startswith("sha256:")
    (pair,) = group["pairs"]
    assert pair["psnr_outside"] == 100.0 and pair["ssim_outside"] == 1.0 and pair["ssim"] < 0.9


def onnx_judge(folder):
    """A classifier of polyps, normal cecum and ulcer by the mean of each channel."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    made = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["scores"]),
        ],
        "judge",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 32, 32])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 3])],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    folder.mkdir()
    (folder / "classifier.onnx").write_bytes(model.SerializeToString())
    card = {
        "labels": [SOURCE, TARGET, "ulcer"], "input_size": [32, 32], "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0],
        "interpolation": "bilinear", "crop_pct": 1.0, "activation": "softmax",
    }  # fmt: skip
    (folder / "judge.json").write_text(json.dumps(card))


def test_images_are_held_a_pair_at_a_time(tmp_path, monkeypatch):
    """10,000 pairs of a few megabytes must not be in memory together."""
    side, alive = 256, []
    for number in range(6):
        image = torch.full((3, side, side), 10 * number, dtype=torch.uint8)
        add(tmp_path / "pairs", number, image, image)

    import weakref

    read = evaluation_command._pixels

    def counted(*arguments):
        pixels = read(*arguments)
        alive.append(weakref.ref(pixels))
        assert sum(one() is not None for one in alive) <= 3
        return pixels

    monkeypatch.setattr(evaluation_command, "_pixels", counted)
    assert main([str(tmp_path / "pairs"), "--quiet"]) == 0
    assert len(alive) == 12 and all(one() is None for one in alive)


def test_the_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "medsteer_core.evaluation", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "Exit status 0" in done.stdout
    assert "--judge" in done.stdout and "--output" in done.stdout
