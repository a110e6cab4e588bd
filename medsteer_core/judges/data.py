"""Images in one folder a class: listed, split so that one patient or sequence lies on one side, read and augmented."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import MedSteerError
from ..files.picture_file import read_picture
from .preprocessing import Preprocessing

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
PARTS = ("train", "validation", "test")
# What a frame's number at the end of a name may look like: "case3_0012", "case3-frame-12".
_NUMBER = re.compile(r"[\s._-]*(?:frame|img|image)?[\s._-]*\(?\d+\)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Listed:
    """Image ``files`` with the index of each one's class in ``labels``, sorted by name."""

    labels: tuple[str, ...]
    files: tuple[Path, ...]
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Split:
    """The indices of `Listed.files` in each of `PARTS`; ``by`` is "group" or "file"."""

    parts: dict[str, tuple[int, ...]]
    by: str


def listed(folder: Path) -> Listed:
    """The images under each class folder of ``folder``. MedSteerError where that is no such folder."""
    if not folder.is_dir():
        raise MedSteerError(f"'{folder}' is no folder; one with a folder of images for each class was expected.")
    labels = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    files, classes = [], []
    for number, label in enumerate(labels):
        inside = sorted(path for path in (folder / label).rglob("*") if path.suffix.lower() in SUFFIXES)
        if len(inside) < len(PARTS):
            raise MedSteerError(f"'{folder / label}' has {len(inside)} images; {len(PARTS)} or more were expected.")
        files += inside
        classes += [number] * len(inside)
    if len(labels) < 2:
        raise MedSteerError(f"'{folder}' has {len(labels)} class folders; two or more were expected.")
    return Listed(tuple(labels), tuple(files), tuple(classes))


def split(images: Listed, held_out: Sequence[float], seed: int, pattern: str | None = None) -> Split:
    """Training, validation and test images, with each class's share of the last two as ``held_out`` says.

    Images of one group lie on one side. ``pattern`` is a regular expression whose first parentheses catch the group in
    a file's name; without one, a group is the names that differ in their last number. Where that gives a class too few
    groups, images are split one by one, equal files together.
    """
    names = _groups(images, pattern)
    parts = _assigned(images.classes, names, held_out, seed)
    if parts is not None:
        # a number at the end that leaves every name a group of its own tells nothing
        return Split(parts, "group" if len(set(names)) < len(names) else "file")
    if pattern is not None:
        raise MedSteerError(f"'{pattern}' gives some class too few groups to split. Choose another, or leave it out.")
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in images.files]
    parts = _assigned(images.classes, hashes, held_out, seed)
    if parts is None:
        raise MedSteerError("Some class has too few different images to split. Add images.")
    return Split(parts, "file")


def _groups(images: Listed, pattern: str | None) -> list[str]:
    if pattern is None:
        return [_NUMBER.sub("", path.stem) for path in images.files]
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise MedSteerError(f"'{pattern}' is no regular expression ({error}).") from error
    if compiled.groups < 1:
        raise MedSteerError(f"'{pattern}' has no parentheses; around what names the group some were expected.")
    found = [compiled.search(path.name) for path in images.files]
    for path, match in zip(images.files, found, strict=True):
        if match is None or match[1] is None:
            raise MedSteerError(f"'{pattern}' finds no group in the name '{path.name}'. Make it fit all names.")
    return [match[1] for match in found]


def _assigned(
    classes: Sequence[int], groups: Sequence[str], held_out: Sequence[float], seed: int
) -> dict[str, tuple[int, ...]] | None:
    """Indices of each part, whole groups; None where some class would be without images in a part."""
    members: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    names = sorted(members)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    counts = Counter(classes)
    room = {part: {c: max(1, round(share * n)) for c, n in counts.items()} for part, share in _shares(held_out)}
    parts: dict[str, list[int]] = {part: [] for part in PARTS}
    for name in (names[i] for i in order):
        has = Counter(classes[i] for i in members[name])
        fits = (part for part in room if all(n <= room[part][c] for c, n in has.items()))
        part = next(fits, PARTS[0])
        parts[part] += members[name]
        if part in room:
            for c, n in has.items():
                room[part][c] -= n
    whole = all({classes[i] for i in indices} == set(counts) for indices in parts.values())
    return {part: tuple(sorted(indices)) for part, indices in parts.items()} if whole else None


def _shares(held_out: Sequence[float]) -> list[tuple[str, float]]:
    return list(zip(PARTS[1:], held_out, strict=True))


class Pictures(Dataset):
    """Images and classes; ``prepare`` makes the network's input of an RGB picture."""

    def __init__(self, images: Listed, indices: Sequence[int], prepare: Callable[[Image.Image], Tensor]):
        self.files = [images.files[i] for i in indices]
        self.classes = [images.classes[i] for i in indices]
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.prepare(read(self.files[index])), self.classes[index]


def read(path: Path) -> Image.Image:
    """An image as RGB (`files.picture_file`). MedSteerError for a file that is none, or is cut short."""
    return read_picture(path)


def pixels(path: Path) -> Tensor:
    """An image's pixels ``(3, H, W)`` in 0..1."""
    return torch.from_numpy(numpy.array(read(path))).permute(2, 0, 1).float() / 255


def augmented(preprocessing: Preprocessing) -> Callable[[Image.Image], Tensor]:
    """Random views for training.

    A scope rolls freely and looks from near and far, so pictures are turned, mirrored and cropped. Its light varies,
    but dye and inflammation are told by colour: brightness and contrast vary more than hue. A part is blanked at times,
    since a corner's overlay (a scope's position, text) can give a class away.
    """
    try:
        from torchvision import transforms
    except ModuleNotFoundError as error:
        raise MedSteerError("torchvision is not installed; training needs it. Install it: pip install timm") from error
    mode, size = transforms.InterpolationMode(preprocessing.interpolation), preprocessing.input_size
    views = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, (0.6, 1.0), (0.8, 1.25), interpolation=mode),
            transforms.RandomHorizontalFlip(),
            _turned,
            transforms.RandomApply([transforms.RandomRotation(15, transforms.InterpolationMode.BILINEAR)], 0.5),
            transforms.ColorJitter(0.2, 0.2, 0.15, 0.015),
            transforms.RandomApply([transforms.GaussianBlur(5, (0.1, 1.5))], 0.15),
        ]
    )
    blanked = transforms.RandomErasing(0.25, (0.02, 0.1))
    return _Views(views, preprocessing, blanked)


@dataclass(frozen=True)
class _Views:
    views: Callable[[Image.Image], Image.Image]
    preprocessing: Preprocessing
    blanked: Callable[[Tensor], Tensor]

    def __call__(self, picture: Image.Image) -> Tensor:
        return self.blanked(self.preprocessing.normalised(self.views(picture)))


def _turned(picture: Image.Image) -> Image.Image:
    """Turned by 0 to 3 quarters; a picture that is not square is resized back to its size."""
    # torch's draw, not torchvision's RandomChoice: that one takes Python's, which a run that goes on does not restore
    turned = picture.rotate(90 * int(torch.randint(4, ())), expand=True)
    return turned if turned.size == picture.size else turned.resize(picture.size, Image.Resampling.BICUBIC)
