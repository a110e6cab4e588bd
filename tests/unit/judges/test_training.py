"""Training a judge: a real run on a small folder of renders, and the split, the resuming and the errors around it."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from medsteer_core.endophantom.phantom import Anatomy, render
from medsteer_core.errors import MedSteerError
from medsteer_core.judges import training as judge_training
from medsteer_core.judges.data import Listed, augmented, listed, pixels, read, split
from medsteer_core.judges.files import load_judge
from medsteer_core.judges.preprocessing import Preprocessing
from medsteer_core.pictures.difference import png
from medsteer_core.scores.scorer import score_pairs, summarise

CLASSES = ("dyed lifted polyps", "normal cecum", "ulcerative colitis")
SIDE = 48


@pytest.fixture(scope="module")
def renders(tmp_path_factory):
    """A folder of 40 anatomies as each class, as PNG files."""
    pytest.importorskip("timm")
    folder = tmp_path_factory.mktemp("renders")
    for name in CLASSES:
        inside = folder / name.replace(" ", "-")
        inside.mkdir()
        for i, image in enumerate(render(Anatomy.sample(40, 0), name, SIDE).image):
            (inside / f"case{i:03d}_1.png").write_bytes(png(image))
    return folder


def command(data, output, **changes):
    options = {
        "model": "test_resnet",
        "size": SIDE,
        "epochs": 7,
        "batch": 6,
        "rate": 3e-3,
        "workers": 0,
        "device": "cpu",
    }
    options |= changes
    words = [str(data), "--output", str(output)]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return [*words] + ([] if "weights" in changes or "pretrained" in changes else ["--no-pretrained"])


def run(data, output, **changes):
    return judge_training.run(judge_training.parser().parse_args(command(data, output, **changes)))


@pytest.fixture(scope="module")
def trained(renders, tmp_path_factory):
    """The folder of a judge trained on the renders, its metrics, and the weights that training ended with."""
    output, fitted, fit = tmp_path_factory.mktemp("judges") / "renders", [], judge_training.fit
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(judge_training, "fit", lambda *given: fitted.append(fit(*given)) or fitted[-1])
        metrics = run(renders, output)
    assert torch.equal(before, torch.random.get_rng_state())
    return output, metrics, fitted[0].state


def test_a_trained_judge_is_right_about_held_out_images(trained):
    folder, metrics, _ = trained
    # six held-out images of each class; guessing is right in a third
    assert metrics["images"] == {"train": 84, "validation": 18, "test": 18}
    assert metrics["accuracy"] >= 0.7
    assert metrics["accuracy_interval"][0] > 1 / 3
    assert sorted(path.name for path in folder.iterdir()) == ["classifier.safetensors", "judge.json", "metrics.json"]


def test_the_metrics_are_the_written_judges_own(renders, trained):
    folder, metrics, _ = trained
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    judge = load_judge(folder)
    assert metrics["judge"] == judge.identity and metrics["labels"] == judge.terms.labels
    truth = [judge.terms.labels.index(Path(name).parts[0]) for name in metrics["test_files"]]
    answers = [judge(pixels(renders / name)[None]).probabilities.argmax(1).item() for name in metrics["test_files"]]
    confusion = [[0] * 3 for _ in range(3)]
    for right, said in zip(truth, answers, strict=True):
        confusion[right][said] += 1
    assert metrics["confusion"] == confusion
    hits = [confusion[i][i] for i in range(3)]
    assert metrics["accuracy"] == pytest.approx(sum(hits) / 18)
    assert list(metrics["recall"].values()) == pytest.approx([hit / 6 for hit in hits])
    assert metrics["mean_recall"] == pytest.approx(sum(hits) / 18)


def test_the_written_judge_gives_the_trained_networks_probabilities(trained):
    timm = pytest.importorskip("timm")
    folder, _, state = trained
    network = timm.create_model("test_resnet", pretrained=False, num_classes=3)
    network.load_state_dict(state)
    config = timm.data.resolve_data_config({}, model=network) | {"input_size": (3, SIDE, SIDE), "crop_pct": 1.0}
    prepare = timm.data.create_transform(**config)
    images = render(Anatomy.sample(4, 77), "normal cecum", SIDE).image
    pictures = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    with torch.no_grad():
        expected = network.eval()(torch.stack([prepare(picture) for picture in pictures])).softmax(1)
    assert torch.allclose(load_judge(folder)(images).probabilities, expected, atol=1e-6)


def test_a_trained_judge_sees_true_pairs_flip_and_null_pairs_stay(trained):
    judge = load_judge(trained[0])
    anatomy = Anatomy.sample(16, 99)
    factual = render(anatomy, "dyed lifted polyps", SIDE).image
    counterfactual = render(anatomy, "normal cecum", SIDE, noise_seed=1).image
    summary = summarise(score_pairs(factual, counterfactual, "dyed lifted polyps", "normal cecum", judge))
    assert summary["accepted"] >= 8 and summary["flip_rate"] >= 0.9
    assert summary["not_judged"][0] == "findings and the outside of them: the judge has no segmenter"
    null = summarise(score_pairs(factual, factual, "dyed lifted polyps", "normal cecum", judge))
    assert (null["accepted"], null["flips"], null["identical"]) == (summary["accepted"], 0, null["accepted"])


def test_a_run_that_was_stopped_goes_on_to_the_same_judge(renders, tmp_path, monkeypatch, capsys):
    short = {"epochs": 3, "patience": 3}
    run(renders, tmp_path / "whole", **short)
    true_save, saved = judge_training.fit.__globals__["_save"], []

    def save_and_stop(path, value):
        true_save(path, value)
        saved.append(value["epoch"])
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setitem(judge_training.fit.__globals__, "_save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(renders, tmp_path / "stopped", **short)
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == ["resume.pt"]
    with pytest.raises(MedSteerError, match="resume.pt' is of a run with another rate"):
        run(renders, tmp_path / "stopped", **short, rate=1e-3)
    capsys.readouterr()
    run(renders, tmp_path / "stopped", **short)
    assert "resumed after epoch 2 of 3" in capsys.readouterr().out
    weights = [(tmp_path / name / "classifier.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "stopped" / "resume.pt").exists()


def test_training_stops_when_validation_gets_no_better(renders, tmp_path, capsys):
    metrics = run(renders, tmp_path / "judge", rate=1e-12, epochs=6, patience=1)
    assert len(metrics["history"]) < 6
    assert metrics["best_epoch"] == len(metrics["history"]) - 1
    assert "stopped" in capsys.readouterr().out


def test_training_begins_with_given_weights_but_for_the_last_layer(renders, tmp_path):
    import timm
    from safetensors.torch import load_file, save_file

    torch.manual_seed(8)
    state = timm.create_model("test_convnext", pretrained=False, num_classes=10).state_dict()
    save_file(state, tmp_path / "begun.safetensors")
    short = {"model": "test_convnext", "epochs": 1, "rate": 1e-9}
    metrics = run(renders, tmp_path / "judge", weights=tmp_path / "begun.safetensors", **short)
    made = load_file(tmp_path / "judge" / "classifier.safetensors")
    assert metrics["begun_with"].startswith("begun.safetensors sha256:")
    assert made["head.fc.weight"].shape == (3, 64)
    assert all(torch.allclose(made[name], state[name], atol=1e-6) for name in state if not name.startswith("head.fc"))
    with pytest.raises(MedSteerError, match="begun.safetensors' does not fit test_resnet"):
        run(renders, tmp_path / "other", weights=tmp_path / "begun.safetensors", model="test_resnet")


def test_a_folder_of_images_that_are_no_class_becomes_none_of_these(renders, tmp_path):
    run(renders, tmp_path / "judge", epochs=1, none_of_these="ulcerative-colitis")
    assert load_judge(tmp_path / "judge").terms.classes == ("dyed-lifted-polyps", "normal-cecum")


# The split


def folder_of(tmp_path, names):
    """A folder with files of these names, each of other bytes; class to names."""
    for label, files in names.items():
        (tmp_path / label).mkdir()
        for name in files:
            Image.new("RGB", (8, 8), (len(label), sum(name.encode()) % 256, len(name))).save(tmp_path / label / name)
    return listed(tmp_path)


def sides(images, parts, label=None):
    return {
        part: {images.files[i].name for i in indices if label in (None, images.labels[images.classes[i]])}
        for part, indices in parts.parts.items()
    }


def test_frames_of_one_group_lie_on_one_side(tmp_path):
    frames = [f"case{case}_frame_{i}.png" for case in "abcdefghijklmnopqrst" for i in (1, 2)]
    images = folder_of(tmp_path, {"one": frames, "two": frames})
    parts = split(images, (0.2, 0.2), seed=0)
    assert parts.by == "group"
    cases = {part: {name[4] for name in names} for part, names in sides(images, parts).items()}
    assert not cases["train"] & cases["test"] and not cases["train"] & cases["validation"]
    assert not cases["validation"] & cases["test"]
    # a patient in two class folders is on one side too, and each class has its share
    for label in ("one", "two"):
        assert {part: len(names) for part, names in sides(images, parts, label).items()} == {
            "train": 24,
            "validation": 8,
            "test": 8,
        }


def test_every_image_is_in_one_part_and_a_seed_gives_one_split(tmp_path):
    images = folder_of(tmp_path, {"one": [f"{i}.png" for i in range(30)], "two": [f"x{i}.png" for i in range(60)]})
    first, again, other = (split(images, (0.1, 0.2), seed) for seed in (0, 0, 1))
    assert first == again != other
    assert first.by == "file"
    assert sorted(i for part in first.parts.values() for i in part) == list(range(90))
    assert [len(first.parts[part]) for part in ("validation", "test")] == [9, 18]
    assert {part: len(names) for part, names in sides(images, first, "one").items()}["test"] == 6


def test_equal_files_lie_on_one_side(tmp_path):
    images = folder_of(tmp_path, {"one": [f"{i}.png" for i in range(20)], "two": [f"{i}.png" for i in range(20)]})
    for path in images.files[1:8]:
        path.write_bytes(images.files[0].read_bytes())
    parts = split(images, (0.4, 0.4), seed=0)
    assert sum(bool(set(range(8)) & set(part)) for part in parts.parts.values()) == 1


def test_a_pattern_names_the_groups(tmp_path):
    names = [f"{i}-patient{i % 5}.png" for i in range(30)]
    images = folder_of(tmp_path, {"one": names, "two": names})
    parts = split(images, (0.2, 0.2), 0, r"-(patient\d)")
    patients = [{name.split("-")[1] for name in found} for found in sides(images, parts).values()]
    assert parts.by == "group" and [len(some) for some in patients] == [3, 1, 1]
    for pattern, words in (
        ("(", "no regular"),
        ("patient", "no parentheses"),
        ("(q)", "finds no group"),
        ("(pa)", "few"),
    ):
        with pytest.raises(MedSteerError, match=words):
            split(images, (0.2, 0.2), 0, pattern)


# Pictures


def test_augmented_views_differ_and_stay_pictures():
    preprocessing = Preprocessing((32, 24), (0.5,) * 3, (0.25,) * 3)
    picture = Image.fromarray(
        (render(Anatomy.sample(1, 0), "polyps", 48).image[0] * 255).byte().permute(1, 2, 0).numpy()
    )
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    views = [augmented(preprocessing)(picture) for _ in range(8)]
    assert all(view.shape == (3, 32, 24) and view.abs().max() <= 2 for view in views)
    assert all((views[0] - view).abs().mean() > 0.05 for view in views[1:])


def test_a_damaged_image_is_refused_by_name(tmp_path):
    path = tmp_path / "cut.png"
    path.write_bytes(png(torch.rand(3, 64, 64))[:500])
    with pytest.raises(MedSteerError, match="cut.png' is not a readable image"):
        read(path)


# What does not fit


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "convnext_hug"}, "has no model 'convnext_hug'"),
        ({"model": "hf-hub:someone/model"}, "has no model"),
        ({"epochs": 0}, "--epochs is 0"),
        ({"test": 0.6}, "--test is 0.6"),
        ({"size": 4}, "--size is 4"),
        ({"none_of_these": "other"}, "--none-of-these is 'other'; one of dyed-lifted-polyps"),
        ({"weights": "missing.safetensors"}, "missing.safetensors' cannot be read"),
        ({"device": "abacus"}, "--device is 'abacus'"),
    ],
)
def test_a_command_that_does_not_fit_is_refused_before_anything_is_written(renders, tmp_path, capsys, changes, words):
    assert judge_training.main(command(renders, tmp_path / "judge", **changes)) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "judge").exists()


def test_a_folder_without_classes_and_a_finished_judge_are_refused(renders, trained, tmp_path):
    (tmp_path / "one").mkdir()
    for data, words in ((tmp_path / "none", "is no folder"), (tmp_path, "one' has 0 images")):
        with pytest.raises(MedSteerError, match=words):
            run(data, tmp_path / "judge")
    with pytest.raises(MedSteerError, match="holds a finished judge"):
        run(renders, trained[0])


def test_without_downloads_the_error_says_how_to_go_on(renders, tmp_path, monkeypatch):
    import timm

    def offline(name, pretrained=False, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    words = [word for word in command(renders, tmp_path / "judge") if word != "--no-pretrained"]
    with pytest.raises(MedSteerError, match="no route to host.*--weights.*--no-pretrained"):
        judge_training.run(judge_training.parser().parse_args(words))


def test_what_is_listed_is_sorted_and_named_by_folder(tmp_path):
    images = folder_of(tmp_path, {"b": ["2.png", "1.jpg", "3.png"], "a": ["1.png", "2.png", "3.PNG"]})
    (tmp_path / "a" / "notes.txt").write_text("no image")
    assert images == listed(tmp_path) and isinstance(images, Listed)
    assert images.labels == ("a", "b") and images.classes == (0, 0, 0, 1, 1, 1)
    assert [path.name for path in images.files] == ["1.png", "2.png", "3.PNG", "1.jpg", "2.png", "3.png"]
