"""Train a judge for real images: a timm classifier on a folder of images for each class.

    python -m medsteer_core.judge_training DATA --model convnext_large.fb_in22k_ft_in1k --output JUDGE

writes classifier.safetensors, judge.json and metrics.json, which `judge_files.load_judge` reads. A run that was stopped
goes on where it was. The numbers in metrics.json are of the written files, on images that had no part in training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import nn

from ..errors import MedSteerError, needs
from ..intervals import wilson
from .data import PARTS, Listed, Pictures, Split, augmented, listed, pixels, split
from .files import FileJudge, load_judge
from .fit import Fitted, Recipe, fit
from .held_out import about
from .preprocessing import CROP_MODES, Preprocessing
from .timm_network import config_of, load_strictly, new_classifier, tensors_of, timm_package


def main(words: list[str] | None = None) -> int:
    chosen = parser().parse_args(words)
    try:
        metrics = run(chosen)
    except MedSteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    low, high = metrics["accuracy_interval"]
    print(f"accuracy {metrics['accuracy']:.4f} [{low:.4f}, {high:.4f}] on {metrics['images']['test']} held-out images")
    for name, recall in metrics["recall"].items():
        print(f"  recall of {name}: {recall:.4f}")
    if doubt := about(metrics):
        print(f"WARNING: {doubt}")
    return 0


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="python -m medsteer_core.judge_training", description=__doc__.split("\n")[0])
    usual, flag = Recipe(), argparse.BooleanOptionalAction
    out.add_argument("data", type=Path, help="a folder with a folder of images for each class")
    out.add_argument("--model", required=True, help="a name of timm's, such as convnext_large.fb_in22k_ft_in1k")
    out.add_argument("--output", type=Path, required=True, help="the judge's folder")
    out.add_argument("--pretrained", action=flag, default=True, help="begin with timm's weights, which timm downloads")
    out.add_argument("--weights", type=Path, help="begin with this .safetensors of the model; downloads nothing")
    out.add_argument("--size", type=int, help="side of the network's input in pixels (default: the model's own)")
    out.add_argument("--crop-mode", choices=CROP_MODES, default="squash", help="how a picture becomes a square")
    out.add_argument("--none-of-these", help="the class folder of images that are of no class")
    out.add_argument("--group", help=r"regular expression of a patient in file names, such as '^(case\d+)'")
    out.add_argument("--validation", type=float, default=0.15, help="share of images that choose the epoch")
    out.add_argument("--test", type=float, default=0.15, help="share of images that the metrics are measured on")
    out.add_argument("--epochs", type=int, default=usual.epochs)
    out.add_argument("--batch", type=int, default=usual.batch)
    out.add_argument("--rate", type=float, default=usual.rate, help="peak learning rate of AdamW")
    out.add_argument("--weight-decay", type=float, default=usual.weight_decay)
    out.add_argument("--patience", type=int, default=usual.patience, help="epochs without a better validation")
    out.add_argument("--seed", type=int, default=usual.seed, help="seed of the split, of new weights and of the order")
    out.add_argument("--workers", type=int, default=usual.workers, help="processes that read images")
    out.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return out


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    """Train as the command line says, write the judge's folder, and return what is in metrics.json."""
    _check(chosen)
    with needs("torchmetrics"):
        import torchmetrics  # noqa: F401
    images = listed(chosen.data)
    if chosen.none_of_these not in (None, *images.labels):
        raise MedSteerError(
            f"--none-of-these is '{chosen.none_of_these}'; one of {', '.join(images.labels)} was expected."
        )
    parts = split(images, (chosen.validation, chosen.test), chosen.seed, chosen.group)
    counts = ", ".join(f"{len(parts.parts[part])} {part}" for part in PARTS)
    print(f"{len(images.files)} images of {len(images.labels)} classes, split by {parts.by}: {counts}", flush=True)
    if parts.by == "file":
        print(
            "file names tell no groups: frames of one patient may be in training and test alike (--group)", flush=True
        )
    preprocessing = _preprocessing(chosen)
    network = _network(chosen, len(images.labels), preprocessing.input_size)
    recipe = Recipe(**{name: getattr(chosen, name) for name in asdict(Recipe()) if hasattr(chosen, name)})
    chosen.output.mkdir(parents=True, exist_ok=True)
    train = Pictures(images, parts.parts["train"], augmented(preprocessing))
    validation = Pictures(images, parts.parts["validation"], preprocessing.of_picture)
    checkpoint = chosen.output / "resume.pt"
    told = _told(chosen, recipe, images, parts)
    fitted = fit(network, train, validation, recipe, checkpoint, told, lambda line: print(line, flush=True))
    metrics = _written(chosen, images, parts, preprocessing, recipe, fitted)
    checkpoint.unlink(missing_ok=True)
    return metrics


def _check(chosen: argparse.Namespace) -> None:
    """The command line's numbers, before anything is read."""
    if (chosen.output / "judge.json").exists():
        raise MedSteerError(f"'{chosen.output}' holds a finished judge. Choose another --output, or delete it.")
    for name in ("epochs", "batch", "patience"):
        if getattr(chosen, name) < 1:
            raise MedSteerError(f"--{name} is {getattr(chosen, name)}; 1 or more was expected.")
    if chosen.size is not None and chosen.size < 8:
        raise MedSteerError(f"--size is {chosen.size}; 8 pixels or more were expected.")
    try:
        torch.zeros(1, device=chosen.device)
    except (RuntimeError, AssertionError) as error:
        raise MedSteerError(
            f"--device is '{chosen.device}', which torch cannot use here; cpu or cuda was expected."
        ) from error
    for name in ("validation", "test"):
        if not 0 < getattr(chosen, name) < 0.5:
            raise MedSteerError(f"--{name} is {getattr(chosen, name)}; a share above 0 and below 0.5 was expected.")


def _told(chosen: argparse.Namespace, recipe: Recipe, images: Listed, parts: Split) -> dict[str, Any]:
    """The settings that a run which goes on must share with the one that was stopped."""
    settings = {name: value for name, value in asdict(recipe).items() if name not in ("workers", "device")}
    names = [[path.relative_to(chosen.data).as_posix() for path in images.files], sorted(parts.parts.items())]
    data = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    return {**settings, "model": chosen.model, "size": chosen.size, "crop_mode": chosen.crop_mode, "data": data}


def _preprocessing(chosen: argparse.Namespace) -> Preprocessing:
    """What the model's weights were trained with, but of the whole picture: a finding may lie at its edge."""
    config = config_of(chosen.model)
    size = (chosen.size, chosen.size) if chosen.size else tuple(config.input_size[1:])
    return Preprocessing(size, tuple(config.mean), tuple(config.std), config.interpolation, 1.0, chosen.crop_mode)


def _network(chosen: argparse.Namespace, labels: int, size: tuple[int, int]) -> nn.Module:
    """The model with new weights of its last layer, and of all others where none are given."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.seed)
        if chosen.weights is None and chosen.pretrained:
            return _downloaded(chosen.model, labels, size)
        network = new_classifier(chosen.model, labels, size)
    if chosen.weights is not None:
        _begin_with(network, chosen.weights, chosen.model)
    return network


def _downloaded(model: str, labels: int, size: tuple[int, int]) -> nn.Module:
    options = {"img_size": size} if config_of(model).fixed_input_size else {}
    try:
        return timm_package().create_model(model, pretrained=True, num_classes=labels, **options)
    except Exception as error:  # the hub's errors have no common base
        words = " ".join(str(error).split())
        raise MedSteerError(
            f"timm got no weights of '{model}' ({words:.160}). Give a downloaded file with --weights, or begin without "
            "any with --no-pretrained."
        ) from error


def _begin_with(network: nn.Module, path: Path, model: str) -> None:
    """Fill all but the last layer, whose labels are others."""
    try:
        given = tensors_of(path.read_bytes(), str(path))
    except OSError as error:
        raise MedSteerError(f"'{path}' cannot be read ({error.strerror}). Check --weights.") from error
    last = network.pretrained_cfg["classifier"]
    last = tuple(f"{name}." for name in ([last] if isinstance(last, str) else last))
    own = {name: tensor for name, tensor in network.state_dict().items() if name.startswith(last)}
    load_strictly(network, {k: v for k, v in given.items() if not k.startswith(last)} | own, str(path), model)


def _written(
    chosen: argparse.Namespace,
    images: Listed,
    parts: Split,
    preprocessing: Preprocessing,
    recipe: Recipe,
    fitted: Fitted,
) -> dict[str, Any]:
    """Write the judge's files, each whole, and measure them; judge.json comes last and makes the folder a judge."""
    staged = chosen.output / ".unfinished"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    (staged / "classifier.safetensors").write_bytes(to_bytes({k: v.contiguous() for k, v in fitted.state.items()}))
    _write(staged / "judge.json", _card(chosen, images, preprocessing))
    judge = load_judge(staged, device=chosen.device)
    metrics = {
        **_measured(judge, images, parts.parts["test"]),
        **_split_record(chosen, images, parts),
        "judge": judge.identity,
        "model": chosen.model,
        "begun_with": _begun_with(chosen),
        "recipe": {name: value for name, value in asdict(recipe).items() if name != "workers"},
        "best_epoch": fitted.best,
        "history": fitted.history,
        "versions": {"torch": torch.__version__, "timm": timm_package().__version__},
    }
    _write(staged / "metrics.json", metrics)
    for name in ("classifier.safetensors", "metrics.json", "judge.json"):
        os.replace(staged / name, chosen.output / name)
    staged.rmdir()
    return metrics


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _split_record(chosen: argparse.Namespace, images: Listed, parts: Split) -> dict[str, Any]:
    """How the images were split: enough to know, and to repeat, which of them were held out."""
    counts = {part: Counter(images.labels[images.classes[i]] for i in parts.parts[part]) for part in PARTS}
    return {
        "labels": images.labels,
        "images": {part: len(parts.parts[part]) for part in PARTS},
        "class_images": {part: dict(sorted(of.items())) for part, of in counts.items()},
        "split_by": parts.by,
        "split_seed": chosen.seed,
        "shares": {"validation": chosen.validation, "test": chosen.test},
        "test_files": [images.files[i].relative_to(chosen.data).as_posix() for i in parts.parts["test"]],
    }


def _begun_with(chosen: argparse.Namespace) -> str:
    if chosen.weights is not None:
        return f"{chosen.weights.name} sha256:{hashlib.sha256(chosen.weights.read_bytes()).hexdigest()}"
    return "timm's weights" if chosen.pretrained else "new weights"


def _card(chosen: argparse.Namespace, images: Listed, preprocessing: Preprocessing) -> dict[str, Any]:
    """The contents of judge.json."""
    none = {"none_of_these": chosen.none_of_these} if chosen.none_of_these else {}
    return {
        "description": f"{chosen.model}, trained with medsteer_core.judge_training; see metrics.json",
        "architecture": chosen.model,
        "labels": images.labels,
        **none,
        **asdict(preprocessing),
        "activation": "softmax",
    }


def _measured(judge: FileJudge, images: Listed, indices: Sequence[int]) -> dict[str, Any]:
    """Accuracy, recall of each class with Wilson's intervals, and the confusion matrix (rows: truth) of ``indices``."""
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

    scores = torch.cat([judge.classifier(pixels(images.files[i])[None]) for i in indices])
    truth, n = torch.tensor([images.classes[i] for i in indices]), len(images.labels)
    confusion = multiclass_confusion_matrix(scores, truth, num_classes=n)
    hits, counts = confusion.diagonal().tolist(), confusion.sum(1).tolist()
    return {
        "accuracy": multiclass_accuracy(scores, truth, num_classes=n, average="micro").item(),
        "accuracy_interval": wilson(sum(hits), len(indices)),
        "mean_recall": multiclass_accuracy(scores, truth, num_classes=n, average="macro").item(),
        "recall": {name: hit / of for name, hit, of in zip(images.labels, hits, counts, strict=True)},
        "recall_interval": {name: wilson(*pair) for name, *pair in zip(images.labels, hits, counts, strict=True)},
        "confusion": confusion.tolist(),
    }


if __name__ == "__main__":
    sys.exit(main())
