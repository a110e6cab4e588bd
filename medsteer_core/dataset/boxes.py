"""The finding's boxes: from masks, and as files in the forms of COCO and YOLO.

A box is ``{"label", "box": [x, y, width, height], "area"}`` in pixels, from the upper left corner; the area is the
number of marked pixels. Files of boxes are for training, so they hold no controls.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import needs
from .records import COUNTERFACTUAL, SIDES, SPLITS, Lines

# Marked specks smaller than this share of the picture are no finding: 8 pixels of 128 x 128.
LEAST_SHARE = 0.0005


def boxes_of(mask: Tensor, label: str) -> list[dict[str, Any]]:
    """The boxes of a mask ``(H, W)`` bool: one for each connected part (diagonal neighbours connect), left to right."""
    with needs("scipy"):
        from scipy import ndimage

    parts, _ = ndimage.label(mask.cpu().numpy(), structure=[[1] * 3] * 3)
    boxes = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(parts), start=1):
        area = int((parts[rows, columns] == number).sum())
        if area >= LEAST_SHARE * mask.numel():
            box = [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]
            boxes.append({"label": label, "box": [int(number) for number in box], "area": area})
    return sorted(boxes, key=lambda one: one["box"])


def labels_of(lines: Lines) -> list[str]:
    """The labels that boxes have, in all splits: their places are COCO's categories and YOLO's classes."""
    return sorted({box["label"] for line in lines for _, boxes in _images(line) for box in boxes})


def coco_of(lines: Lines, split: str) -> Iterator[bytes]:
    """A split's images and boxes in COCO's form, in parts: ids are counted from 1, files named from the dataset's root.

    Images without boxes stand in it too; a detector learns from them what is no finding.
    """
    labels = labels_of(lines)
    categories = [{"id": number, "name": label} for number, label in enumerate(labels, start=1)]
    about = {"description": "Synthetic endoscopy pairs of MedSteer. Research only."}
    yield f'{{"info": {json.dumps(about)}, "categories": {json.dumps(categories)}, "images": ['.encode()
    found: list[tuple[int, dict[str, Any]]] = []
    number = 0
    for line in lines:
        for name, boxes in _images(line) if line["split"] == split else ():
            number += 1
            image = {"id": number, "file_name": name, "width": line["width"], "height": line["height"]}
            yield _listed(number, {**image, "pair_id": line["pair_id"]})
            found += [(number, box) for box in boxes]
    yield b'], "annotations": ['
    for place, (image_id, box) in enumerate(found, start=1):
        category = labels.index(box["label"]) + 1
        about = {"id": place, "image_id": image_id, "category_id": category, "bbox": box["box"], "area": box["area"]}
        yield _listed(place, {**about, "iscrowd": 0, "segmentation": []})
    yield b"]}\n"


def yolo_files(lines: Lines) -> Iterator[tuple[str, str]]:
    """YOLO's files, name and text: a label file beside each image, the images' list of each split, and yolo.yaml.

    A line of a label file is ``class x y width height``, the box's centre and size as shares of the picture's.
    """
    labels = labels_of(lines)
    listed: dict[str, list[str]] = {}
    for line in lines:
        for name, boxes in _images(line):
            listed.setdefault(line["split"], []).append(f"./{name}\n")
            rows = (_yolo_row(labels.index(box["label"]), box["box"], line["width"], line["height"]) for box in boxes)
            yield f"{name.removesuffix('.png')}.txt", "".join(rows)
    for split, names in listed.items():
        yield f"yolo_{split}.txt", "".join(names)
    keys = zip(("train", "val", "test"), SPLITS, strict=True)
    splits = [f"{key}: yolo_{split}.txt\n" for key, split in keys if split in listed]
    # Quoted as JSON, which YAML reads: labels are any text.
    names = [f"  {number}: {json.dumps(label)}\n" for number, label in enumerate(labels)]
    yield "yolo.yaml", "".join([*splits, "names:\n" if names else "names: {}\n", *names])


def _images(line: Mapping[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A pair's images, named from the dataset's root, each with its boxes; none of a control."""
    if line["arm"] == COUNTERFACTUAL:
        found = json.loads(line["boxes"])
        for side in SIDES:
            yield f"{line['split']}/{line[f'{side}_file_name']}", found.get(side, [])


def _listed(place: int, entry: Mapping[str, Any]) -> bytes:
    return ((", " if place > 1 else "") + json.dumps(entry)).encode()


def _yolo_row(number: int, box: Sequence[int], width: int, height: int) -> str:
    x, y, w, h = box
    shares = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
    return f"{number} " + " ".join(f"{share:.6f}" for share in shares) + "\n"
