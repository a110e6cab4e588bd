"""A judge for real images, read from files: a classifier, and a segmenter where there is one.

Weights are `.safetensors` of a timm model or an `.onnx` graph, with a JSON of labels and preprocessing beside them
(`judge_json`). `load_judge` takes a folder (classifier.safetensors or classifier.onnx with judge.json, and the same for
segmenter with segmenter.json) or one weights file with a JSON of its name. Nothing is downloaded, unpickled or run.

    judge = load_judge("models/medsteer/judges/kvasir")
    score_pair(factual, counterfactual, "polyps", "normal cecum", judge)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import MedSteerError
from .card import Card, SegmenterCard, read_classifier, read_segmenter
from .held_out import doubt_of
from .judge import Answers, Terms

SUFFIXES = (".safetensors", ".onnx")
# Edges of a mask are uncertain by this many pixels of what the segmenter sees.
_EDGE = 2
_AT_ONCE = 16


@dataclass(frozen=True)
class FileNetwork:
    """A network with its card: images in, probabilities out."""

    card: Card
    file: str
    sha256: str
    run: Callable[[Tensor], Tensor]
    device: str

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Probabilities ``(n, labels, ...)`` of images ``(n, 3, H, W)`` in 0..1, on the CPU."""
        values = self.run(self.card.preprocessing(images).to(self.device)).float().cpu()
        if values.ndim < 2 or values.shape[:2] != (len(images), len(self.card.labels)):
            raise MedSteerError(
                f"'{self.file}' gives an output of shape {tuple(values.shape)} for {len(images)} images; "
                f"({len(images)}, {len(self.card.labels)}, ...) was expected: '{self.card.path}' names "
                f"{len(self.card.labels)} labels."
            )
        values = _ACTIVATIONS[self.card.activation](values)
        # the negation catches what is not a number too
        if not ((values >= -1e-3) & (values <= 1 + 1e-3)).all():
            raise MedSteerError(
                f"'{self.file}' gives values from {values.min():.4g} to {values.max():.4g} after the activation "
                f"'{self.card.activation}'; probabilities were expected. Check activation in '{self.card.path}'."
            )
        return values.clamp(0, 1)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda values: values.softmax(1),
    "sigmoid": torch.sigmoid,
    "none": lambda values: values,
}


@dataclass(frozen=True)
class FileJudge:
    """A `Judge` from files. It knows no distance and no anatomy, and without a segmenter no findings."""

    classifier: FileNetwork
    segmenter: FileNetwork | None
    terms: Terms
    identity: str
    doubt: str = ""  # where held-out images do not tell it from guessing

    def __call__(self, images: Tensor) -> Answers:
        """What it says of images ``(n, 3, H, W)`` in 0..1; masks ``(n, findings, H, W)`` are at the images' size."""
        if images.ndim != 4 or images.shape[1] != 3 or not len(images):
            raise MedSteerError(
                f"the judge got images of shape {tuple(images.shape)}; (n, 3, height, width) was expected."
            )
        parts = images.split(_AT_ONCE)
        probabilities = torch.cat([_flat(self.classifier, part) for part in parts])
        return Answers(probabilities, self.segmenter and torch.cat([_masks(self.segmenter, part) for part in parts]))


def load_judge(
    path: str | os.PathLike[str], segmenter: str | os.PathLike[str] | None = None, device: str = "cpu"
) -> FileJudge:
    """The judge in a folder or of a weights file; ``segmenter`` is a weights file for a judge whose folder has none.

    ``device`` is where it runs; images and answers are on the CPU. MedSteerError names the file that does not fit.
    """
    path = Path(path)
    weights, sheet, found = _in_folder(path) if path.is_dir() else (*_pair(path), None)
    if segmenter is not None and found is not None:
        raise MedSteerError(f"'{found[0]}' and '{segmenter}' are both given as segmenter; one was expected.")
    found = found or (_pair(Path(segmenter)) if segmenter is not None else None)
    card = read_classifier(sheet)
    network = _network(weights, card, device)
    marker = None if found is None else _network(found[0], read_segmenter(found[1], card.named), device)
    terms, identity = _terms(card, marker and marker.card), _identity(network, marker)
    judge = FileJudge(network, marker, terms, identity, doubt_of(path) if path.is_dir() else "")
    judge(torch.full((1, 3, 64, 64), 0.5))  # outputs that do not fit show now, not at the first pair
    return judge


def classes_of(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The classes that a judge's JSON names, without a look at its weights. MedSteerError for a JSON that is none."""
    path = Path(path)
    return read_classifier(path / "judge.json" if path.is_dir() else path.with_suffix(".json")).named


def _flat(network: FileNetwork, images: Tensor) -> Tensor:
    probabilities = network(images)
    if probabilities.ndim != 2:
        raise MedSteerError(
            f"'{network.file}' gives an output of shape {tuple(probabilities.shape)}; a classifier's (n, labels) was "
            "expected."
        )
    return probabilities


def _masks(network: FileNetwork, images: Tensor) -> Tensor:
    """Masks ``(n, findings, H, W)`` bool, without the background's."""
    soft, card = network(images), network.card
    if soft.ndim != 4:
        raise MedSteerError(
            f"'{network.file}' gives an output of shape {tuple(soft.shape)}; a segmenter's (n, labels, height, width) "
            "was expected."
        )
    full = F.interpolate(soft, size=images.shape[-2:], mode="bilinear", align_corners=False)
    return full[:, [card.labels.index(name) for name in card.named]] > card.threshold


def _terms(card: Card, of: SegmenterCard | None) -> Terms:
    if of is None:
        return Terms(card.labels, card.named)
    limits = {"left_limit": of.left_limit, "found_limit": of.found_limit}
    margin = _EDGE / min(of.preprocessing.input_size)
    return Terms(card.labels, card.named, of.named, of.findings_of, of.diffuse, mask_margin=margin, **limits)


def _network(weights: Path, card: Card, device: str) -> FileNetwork:
    try:
        data = weights.read_bytes()
    except OSError as error:
        raise MedSteerError(f"'{weights}' cannot be read ({error.strerror}). Check the file.") from error
    onnx, segments = weights.suffix == ".onnx", isinstance(card, SegmenterCard)
    if onnx and card.architecture is not None:
        raise MedSteerError(
            f"'{card.path}' says architecture, which is for .safetensors; '{weights}' is a whole graph."
        )
    if not onnx and (card.input or card.output):
        raise MedSteerError(f"'{card.path}' says input or output, which are for .onnx; '{weights}' has neither.")
    if onnx:
        from .onnx_network import network_from as make
    else:
        from . import timm_network as timm_judge

        make = timm_judge.segmenter_from if segments else timm_judge.classifier_from
    # the bytes that are hashed are those that are used
    digest = hashlib.sha256(data).hexdigest()
    return FileNetwork(card, str(weights), digest, make(data, str(weights), card, device), "cpu" if onnx else device)


def _identity(*networks: FileNetwork | None) -> str:
    """A hash of all weights and of what their JSON says."""
    parts = [[one.sha256, {**asdict(one.card), "path": None}] for one in networks if one is not None]
    return f"sha256:{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()}"


def _in_folder(folder: Path) -> tuple[Path, Path, tuple[Path, Path] | None]:
    """The classifier's weights and JSON in a folder, and the segmenter's, if it has one."""
    weights = _only_weights(folder, "classifier")
    if weights is None:
        raise MedSteerError(
            f"'{folder}' has no classifier.safetensors and no classifier.onnx; a judge's folder has one."
        )
    marker, sheet = _only_weights(folder, "segmenter"), folder / "segmenter.json"
    if marker is None and sheet.exists():
        raise MedSteerError(
            f"'{sheet}' has no segmenter.safetensors and no segmenter.onnx beside it; one was expected."
        )
    return weights, folder / "judge.json", marker and (marker, sheet)


def _only_weights(folder: Path, stem: str) -> Path | None:
    found = [folder / (stem + suffix) for suffix in SUFFIXES if (folder / (stem + suffix)).exists()]
    if len(found) > 1:
        raise MedSteerError(f"'{folder}' has {' and '.join(path.name for path in found)}; one of them was expected.")
    return found[0] if found else None


def _pair(path: Path) -> tuple[Path, Path]:
    """A weights file and its JSON."""
    if not path.exists():
        raise MedSteerError(f"There is no '{path}'; a judge's folder or weights file was expected.")
    if path.suffix not in SUFFIXES:
        raise MedSteerError(
            f"'{path}' is no judge; a folder or a file that ends in {' or '.join(SUFFIXES)} was expected."
        )
    return path, path.with_suffix(".json")
