"""What others read of a dataset: Hugging Face's loader, COCO, YOLO, the card, the docs' own code, the PNGs' marking."""

import io
import json
import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parent))
from pairs import SIZE, pair, square_mask, started

from medsteer_core.dataset.boxes import boxes_of
from medsteer_core.dataset.pair_dataset import PairDataset
from medsteer_core.dataset.png import XMP_KEY, image_png, in_levels, mask_png
from medsteer_core.dataset.records import METADATA, SYNTHETIC, metadata_of
from medsteer_core.errors import MedSteerError

DOC = Path(__file__).parents[3] / "docs" / "dataset.md"
SQUARES = [(3, 4, 10, 6), (20, 18, 5, 9)]
SPLITS = ["train", "train", "validation", "train", "test", "validation"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Six pairs in three splits, two of them with masks, one a control with a mask."""
    folder = tmp_path_factory.mktemp("d") / "output" / "medsteer" / "pairs"
    dataset = PairDataset(folder)
    for number, split in enumerate(SPLITS):
        mask = square_mask(*SQUARES[: number + 1]) if number in (0, 1) else None
        dataset.add(*pair(number, split, mask))
    dataset.add(*pair(9, "test", square_mask((0, 0, 4, 4)), arm="random direction"))
    dataset.write_index("both")
    return folder


@pytest.fixture(scope="module")
def loaded(root, tmp_path_factory):
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    return load_dataset("imagefolder", data_dir=str(root), cache_dir=str(tmp_path_factory.mktemp("cache")))


def test_hugging_faces_loader_reads_images_labels_and_splits(loaded, root):
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 3, "validation": 2, "test": 2}
    by_id = {record["pair_id"]: record for record in PairDataset(root).records()}
    seen = {}
    for split, rows in loaded.items():
        assert {"factual", "counterfactual", "mask"} <= {
            name for name, kind in rows.features.items() if type(kind).__name__ == "Image"
        }
        for row in rows:
            record = by_id[row["pair_id"]]
            assert (row["split"], row["group_id"]) == (split, record["group_id"])
            assert row["intended_label"] == record["intended_label"]
            seed = record["made"]["seed"]
            assert row["factual"].getpixel((0, 0)) == (seed, 0, 0)
            assert row["counterfactual"].getpixel((0, 0)) == (0, seed, 0)
            seen[seed] = row
    assert np.array_equal(np.array(seen[1]["mask"]) == 255, square_mask(*SQUARES).numpy())
    assert seen[2]["mask"].size == (1, 1) and seen[2]["mask_source"] == "none"


def test_no_noise_stands_in_two_splits(loaded):
    groups = [set(rows["group_id"]) for rows in loaded.values()]
    assert sum(map(len, groups)) == len(set.union(*groups))


def test_coco_loads_with_the_boxes_of_the_masks(root, capsys):
    from pycocotools.coco import COCO

    coco = COCO(str(root / "annotations" / "instances_train.json"))
    assert [entry["name"] for entry in coco.loadCats(coco.getCatIds())] == ["polyps"]
    by_name = {image["file_name"]: image for image in coco.loadImgs(coco.getImgIds())}
    assert len(by_name) == 6
    boxed = {}
    for name, image in by_name.items():
        with Image.open(root / name) as picture:
            assert picture.size == (image["width"], image["height"]) == (SIZE, SIZE)
            seed = max(picture.getpixel((0, 0)))
        found = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        boxed[seed, name.rsplit("_", 1)[1]] = [(tuple(one["bbox"]), one["area"]) for one in found]
    assert boxed[0, "factual.png"] == [(SQUARES[0], 60)]
    assert boxed[1, "factual.png"] == [(SQUARES[0], 60), (SQUARES[1], 45)]
    assert boxed[0, "counterfactual.png"] == boxed[1, "counterfactual.png"] == boxed[3, "factual.png"] == []
    test = COCO(str(root / "annotations" / "instances_test.json"))
    assert len(test.getImgIds()) == 2 and test.getAnnIds() == []  # the control is left out
    assert test.getCatIds() == coco.getCatIds()  # one numbering for all splits


def test_yolos_files_give_the_same_boxes(root):
    import yaml

    about = yaml.safe_load((root / "yolo.yaml").read_text())
    assert about["names"] == {0: "polyps"} and set(about) == {"train", "val", "test", "names"}
    images = (root / about["train"]).read_text().splitlines()
    assert len(images) == 6
    found = {}
    for name in images:
        path = root / name
        with Image.open(path) as picture:
            seed = max(picture.getpixel((0, 0)))
        rows = [line.split() for line in path.with_suffix(".txt").read_text().splitlines()]
        for kind, *numbers in rows:
            x, y, w, h = (SIZE * float(number) for number in numbers)
            found.setdefault((seed, path.stem.rsplit("_")[1]), []).append(
                (int(kind), *map(round, (x - w / 2, y - h / 2, w, h)))
            )
    assert found == {
        (0, "factual"): [(0, *SQUARES[0])], (1, "factual"): [(0, *SQUARES[0]), (0, *SQUARES[1])],
    }  # fmt: skip


def test_boxes_are_of_connected_parts_and_specks_are_none():
    mask = square_mask((2, 2, 3, 3), (5, 5, 2, 2), (20, 1, 6, 1))
    assert [(one["box"], one["area"]) for one in boxes_of(mask, "a")] == [([2, 2, 5, 5], 13), ([20, 1, 6, 1], 6)]
    large = torch.zeros(128, 128, dtype=torch.bool)
    large[5, 5] = large[50:60, 50:60] = True
    assert [one["box"] for one in boxes_of(large, "a")] == [[50, 50, 10, 10]]
    assert boxes_of(torch.zeros(8, 8, dtype=torch.bool), "a") == []


def test_boxes_kept_up_by_later_runs_that_do_not_ask_for_them(tmp_path):
    dataset = PairDataset(tmp_path)
    dataset.add(*pair(0, mask=square_mask(SQUARES[0])))
    dataset.write_index("both")
    dataset.add(*pair(1, mask=square_mask(SQUARES[1])))
    dataset.write_index()
    coco = json.loads((tmp_path / "annotations/instances_train.json").read_text())
    assert len(coco["annotations"]) == 2 and len((tmp_path / "yolo_train.txt").read_text().splitlines()) == 4
    with pytest.raises(MedSteerError, match="boxes is 'voc'; one of none, COCO"):
        dataset.write_index("voc")


def test_the_card_says_what_it_is_and_counts(root):
    import yaml

    text = (root / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["size_categories"] == ["n<1K"] and "synthetic" in yaml.safe_load(front)["tags"]
    assert "Synthetic. For research only: not for diagnosis" in body
    assert "| train | 3 | 3 |" in body and "| validation | 2 | 2 |" in body and "| test | 2 | 2 |" in body
    assert "| polyps | normal cecum | counterfactual | 6 |" in body
    assert "| polyps | normal cecum | random direction | 1 |" in body
    assert '"abababababababab"' in body and '"0123456789"' in body  # the model's and the vector's hash
    assert 'load_dataset("imagefolder"' in body


def test_metadata_has_one_form_whatever_is_known():
    bare = {"group_id": "ab" * 8, "made": {}}
    lines = [metadata_of(pair(1)[0]), metadata_of(pair(1, started=bare)[0])]
    lines.append(metadata_of(pair(1, mask=square_mask(SQUARES[0]), judge="j", score={"flipped": True})[0]))
    types = [{name: type(value) for name, value in line.items()} for line in lines]
    assert types[0] == types[1] == types[2] and all(tuple(line) == METADATA for line in lines)
    assert [line["flipped"] for line in lines] == ["", "", "yes"]
    assert lines[0]["mask_file_name"] == "no_mask.png"
    assert "prompt" not in json.dumps(lines)


def code_of(word: str) -> str:
    """The docs' Python that holds a word."""
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", DOC.read_text(), re.S) if word in block]
    return code


def test_the_docs_data_loader_gives_both_images_of_every_training_pair(root, monkeypatch):
    monkeypatch.chdir(root.parents[2])
    told = {}
    exec(code_of("DataLoader"), told)
    assert told["images"].shape == (6, 3, SIZE, SIZE) and told["images"].dtype == torch.float32
    assert Counter(told["labels"].tolist()) == {0: 3, 1: 3}
    # the label goes with the picture: factuals are red, counterfactuals green, one of each a seed
    for image, label in zip(told["images"], told["labels"], strict=True):
        seed = image.amax(dim=(1, 2)).mul(255).round()
        assert seed[0 if label else 1] == 0
    reds = sorted(told["images"][told["labels"] == 0].amax(dim=(1, 2, 3)).mul(255).round().tolist())
    assert reds == [0, 1, 3]


def test_the_docs_script_reads_the_records(root, monkeypatch, capsys):
    monkeypatch.chdir(root.parents[2])
    exec(code_of("PairDataset"), {})
    assert len(capsys.readouterr().out.splitlines()) == 7


def test_pngs_carry_the_iptc_marking_the_texts_and_the_pixels():
    image = torch.rand(6, 5, 3, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    data = image_png(in_levels(image), {"workflow": '{"a": 1}', "medsteer_record": '"\u606f\u8089"'})
    assert data == image_png(in_levels(image), {"workflow": '{"a": 1}', "medsteer_record": '"\u606f\u8089"'})
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        assert np.array_equal(np.array(picture), np.clip(255 * image.numpy(), 0, 255).astype(np.uint8))
        assert picture.text["workflow"] == '{"a": 1}' and picture.text["medsteer_record"] == '"\u606f\u8089"'
        packet = picture.text[XMP_KEY]
    body = ET.fromstring(packet[packet.index("?>") + 2 : packet.rindex("<?")])
    (described,) = body.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    assert described.attrib["{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"] == SYNTHETIC
    mask = square_mask(SQUARES[0])
    with Image.open(io.BytesIO(mask_png(mask))) as picture:
        assert picture.mode == "L" and np.array_equal(np.array(picture) == 255, mask.numpy())
        assert XMP_KEY in picture.info


def test_a_record_of_another_batch_index_is_another_pair():
    assert started(1)["group_id"] != started(1, index=1)["group_id"]
