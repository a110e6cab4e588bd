"""From a sampler's images and records to pairs: labels, scores, masks and boxes, and what is refused before writing."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parent))
from pairs import SIZE, square_mask, started

from medsteer_core.dataset.pair_dataset import PairDataset
from medsteer_core.dataset.png import XMP_KEY
from medsteer_core.dataset.records import STRENGTH_ZERO
from medsteer_core.dataset.saving import MAPS, SaveRequest, save_pairs
from medsteer_core.errors import MedSteerError
from medsteer_core.judges.judge import Answers
from medsteer_core.scores.images import compare
from medsteer_core.scores.scorer import ENDOPHANTOM

POLYP, DYE = (4, 6, 12, 8), (20, 20, 6, 6)


class Phantom:
    """A judge in EndoPhantom's terms: red images show polyps at POLYP, green ones nothing, blue ones dye at DYE."""

    terms, identity = ENDOPHANTOM, "phantom sha256:00"

    def __call__(self, images):
        colours = images.mean((2, 3)).argmax(1)
        labels = [self.terms.labels.index(name) for name in ("polyps", "normal cecum", "dyed resection margins")]
        probabilities = torch.full((len(images), len(self.terms.labels)), 0.001)
        masks = torch.zeros(len(images), len(self.terms.findings), *images.shape[2:])
        for place, colour in enumerate(colours.tolist()):
            probabilities[place, labels[colour]] = 0.99
            if colour == 0:
                masks[place, self.terms.findings.index("polyp")] = square_mask(POLYP).float()
            if colour == 2:
                masks[place, self.terms.findings.index("dye")] = square_mask(DYE).float()
        return Answers(probabilities, masks, torch.zeros(len(images)), torch.zeros(len(images), 11))


def images(*colours: str) -> torch.Tensor:
    """Flat pictures (n, SIZE, SIZE, 3), a little noisy so that no two are equal."""
    picture = torch.rand(len(colours), SIZE, SIZE, 3, generator=torch.Generator().manual_seed(1)) * 0.1
    for place, colour in enumerate(colours):
        picture[place, ..., "rgb".index(colour)] += 0.6
    return picture


def request(**changes) -> SaveRequest:
    """Two pairs, red to green and red to red, saved for training."""
    fields = {
        "factual": images("r", "r"), "counterfactual": images("g", "r"), "records": [started(1), started(2)],
        "source": "polyps", "target": "normal cecum", "split": "train", **changes,
    }  # fmt: skip
    return SaveRequest(**fields)


@pytest.fixture
def dataset(tmp_path):
    return PairDataset(tmp_path / "pairs")


def opened(dataset, record, kind) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(dataset.image(record, kind))))


def test_a_judge_labels_scores_and_marks_what_is_saved(dataset):
    saved = save_pairs(dataset, request(judge=Phantom()))
    assert saved.new == 2 and saved.counts == {"train": 2, "validation": 0, "test": 0}
    flipped, kept = saved.records
    assert flipped["judge_label"] == {"factual": "polyps", "counterfactual": "normal cecum"}
    assert kept["judge_label"] == {"factual": "polyps", "counterfactual": "polyps"}
    intended = {"factual": "polyps", "counterfactual": "normal cecum"}
    assert flipped["intended_label"] == kept["intended_label"] == intended
    assert [record["score"]["flipped"] for record in saved.records] == [True, False]
    assert {record["judge"] for record in saved.records} == {"phantom sha256:00"}
    assert {record["mask_source"] for record in saved.records} == {"segmenter"}
    assert np.array_equal(opened(dataset, flipped, "mask") == 255, square_mask(POLYP).numpy())
    polyp = [{"label": "polyps", "box": list(POLYP), "area": 96}]
    assert flipped["boxes"] == {"factual": polyp, "counterfactual": []}
    assert kept["boxes"] == {"factual": polyp, "counterfactual": polyp}  # what was to go and is left is no background
    assert "flipped, says the judge: 1 of 2" in saved.in_words("x")


class Strict(Phantom):
    """A judge that finds a factual unlike what it knows: its pair does not count."""

    def __call__(self, images):
        answers = super().__call__(images)
        distances = torch.full((len(images),), 0.5)
        distances[0] = 2.0
        return replace(answers, distances=distances)


def test_the_rate_is_of_the_pairs_that_count_as_in_the_evaluation(dataset):
    said = save_pairs(dataset, request(judge=Strict())).in_words("x")
    assert "flipped, says the judge: 0 of 1; 1 not counted" in said


def test_classes_that_are_not_what_the_judge_sees_are_asked_about(dataset):
    saved = save_pairs(dataset, request(judge=Phantom(), source="normal cecum", target="polyps"))
    assert "none counted" in saved.in_words("x")
    assert "The judge calls 2 of 2 factual images 'polyps', and source_class is 'normal cecum'." in saved.in_words("x")
    right = save_pairs(dataset, request(judge=Phantom()))
    assert "source_class" not in right.in_words("x")
    assert "2 of these pairs stand in the folder as 'normal cecum' and 'polyps' too" in right.in_words("x")
    again = save_pairs(dataset, request(judge=Phantom()))
    assert again.new == 0 and "stand in the folder as" not in again.in_words("x")


def test_a_finding_for_another_is_marked_on_both_sides(dataset):
    (record,) = save_pairs(
        dataset,
        request(
            judge=Phantom(), factual=images("r"), counterfactual=images("b"), records=[started(1)],
            target="dyed resection margins",
        ),
    ).records  # fmt: skip
    assert np.array_equal(opened(dataset, record, "mask") == 255, square_mask(POLYP, DYE).numpy())
    assert [box["label"] for box in record["boxes"]["factual"]] == ["polyps"]
    assert record["boxes"]["counterfactual"] == [{"label": "dyed resection margins", "box": list(DYE), "area": 36}]


def test_without_a_judge_there_are_numbers_and_no_labels_but_the_intended(dataset):
    first, second = images("r"), images("g")
    (record,) = save_pairs(
        dataset, request(factual=first, counterfactual=second, records=[started(1)], source="any label")
    ).records
    assert (record["judge"], record["judge_label"], record["mask_source"]) == (None, None, "none")
    assert record["boxes"] is None and record["mask_file_name"] is None
    levels = [torch.from_numpy(opened(dataset, record, kind)).movedim(-1, 0) / 255 for kind in
              ("factual", "counterfactual")]  # fmt: skip
    assert record["score"] == compare(*levels)  # of the pixels as they are saved
    assert np.array_equal(opened(dataset, record, "factual"), (first[0] * 255).to(torch.uint8).numpy())


def test_several_strengths_share_their_factuals(dataset):
    records = [started(1, multiple=0.5), started(2, multiple=0.5), started(1), started(2)]
    saved = save_pairs(dataset, request(counterfactual=images("g", "g", "b", "b"), records=records))
    assert len({record["pair_id"] for record in saved.records}) == 4
    assert [record["group_id"] for record in saved.records] == [r["group_id"] for r in records]
    factuals = [opened(dataset, record, "factual") for record in saved.records]
    assert np.array_equal(factuals[0], factuals[2]) and np.array_equal(factuals[1], factuals[3])
    assert not np.array_equal(factuals[0], factuals[1])


def test_pairs_that_are_there_stay_as_they_are(dataset):
    first = save_pairs(dataset, request(judge=Phantom()))
    again = save_pairs(dataset, request())
    assert again.new == 0 and again.records == first.records
    assert "0 of 2 pairs are new in x; the others were there" in again.in_words("x")


def test_strength_zero_is_noticed(dataset):
    records = [{**started(1), "changes_nothing": True}, started(2)]
    found = [record["arm"] for record in save_pairs(dataset, request(records=records)).records]
    assert found == [STRENGTH_ZERO, "counterfactual"]
    random = request(records=records, arm="random direction", source="a")
    assert {r["arm"] for r in save_pairs(dataset, random).records} == {"random direction"}


# --- masks that are given


def test_a_users_mask_of_another_size_is_fitted(dataset):
    mask = torch.zeros(1, 2 * SIZE, 2 * SIZE)
    mask[:, 12:28, 8:32] = 1
    saved = save_pairs(dataset, request(mask=mask, boxes="COCO"))
    for record in saved.records:
        assert np.array_equal(opened(dataset, record, "mask") == 255, square_mask(POLYP).numpy())
        assert record["mask_source"] == "user"
        assert record["boxes"] == {"factual": [{"label": "polyps", "box": list(POLYP), "area": 96}]}


def test_a_concept_map_marks_from_the_locks_share_of_its_largest_value_on(dataset):
    concept = torch.zeros(2, SIZE, SIZE)
    concept[:, 6:14, 4:16] = 0.30
    concept[:, 8, 8] = 0.60
    for threshold, area in ((None, 96), (0.4, 96), (0.6, 1)):
        lock = {} if threshold is None else {"threshold": threshold}
        records = [started(1, lock=lock), started(2, lock=lock)]
        saved = save_pairs(dataset, request(mask=concept, mask_source=MAPS[0], records=records))
        assert [int((opened(dataset, r, "mask") == 255).sum()) for r in saved.records] == [area, area]
        assert {r["mask_source"] for r in saved.records} == {"concept map"}


@pytest.mark.parametrize("where, sides", [
    ("auto", ["factual"]), ("counterfactual", ["counterfactual"]), ("both", ["factual", "counterfactual"]),
])  # fmt: skip
def test_finding_in_says_which_image_a_given_masks_boxes_are_of(dataset, where, sides):
    saved = save_pairs(dataset, request(mask=square_mask(POLYP)[None].float(), finding_in=where))
    assert list(saved.records[0]["boxes"]) == sides


def test_boxes_of_unknown_classes_ask_where_the_finding_is(dataset):
    mask = square_mask(POLYP)[None].float()
    with pytest.raises(MedSteerError, match="'tumour' or 'clear'.*Set finding_in"):
        save_pairs(dataset, request(mask=mask, source="tumour", target="clear", boxes="YOLO"))
    assert dataset.ids() == []
    assert save_pairs(dataset, request(mask=mask, source="tumour", target="clear")).records[0]["boxes"] is None


# --- what is refused, with nothing written


@pytest.mark.parametrize("changes, message", [
    ({"records": [started(1)]}, "2 factual images, 2 counterfactual ones and 1 records"),
    ({"counterfactual": images("g", "g", "g")}, "2 factual images, 3 counterfactual ones and 2 records"),
    ({"factual": images("r", "r")[:0]}, "0 factual images"),
    ({"counterfactual": images("g", "g")[:, :16]}, "equal shapes were expected"),
    ({"counterfactual": images("g", "g") * float("nan")}, "not finite"),
    ({"mask": torch.ones(3, SIZE, SIZE)}, r"mask has shape \(3, 32, 32\) for 2 pairs; \(1 or 2, height"),
    ({"source": "a\nb"}, "source_class"),
    ({"judge": Phantom(), "source": "tumour"}, "the source class is 'tumour'.*go with judge 'none'"),
    ({"arm": "placebo"}, "arm is 'placebo'"),
    ({"split": "holdout"}, "split is 'holdout'; one of auto, train"),
    ({"boxes": "VOC"}, "boxes is 'VOC'"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(dataset, changes, message):
    with pytest.raises(MedSteerError, match=message):
        save_pairs(dataset, request(**changes))
    assert dataset.ids() == [] and not Path(dataset.root).exists()


def test_one_refused_pair_keeps_the_whole_batch_out(dataset):
    seen = started(2, steering=[{"vector": {"made": {"seed": 2, "noise_indices": {"present": [0, 1]}}}}])
    with pytest.raises(MedSteerError, match="seed 2, image 0 made the vector"):
        save_pairs(dataset, request(records=[started(1), seen], split="test"))
    assert not Path(dataset.root).exists()


# --- what the PNGs say


@pytest.mark.parametrize("texts, with_record, said", [
    ({"prompt": "{}", "workflow": "{}"}, True, {"prompt", "workflow", "medsteer_record"}),
    ({}, True, {"medsteer_record"}),
    ({}, False, set()),
])  # fmt: skip
def test_pngs_say_what_was_asked_for_and_always_that_they_are_synthetic(dataset, texts, with_record, said):
    secret = {"prompts": {"positive": {"text": "private words"}}}
    records = [started(1, **secret), started(2, **secret)]
    saved = save_pairs(dataset, request(records=records, texts=texts, with_record=with_record, boxes="both"))
    for record in saved.records:
        for kind in ("factual", "counterfactual"):
            with Image.open(io.BytesIO(dataset.image(record, kind))) as picture:
                picture.load()
                assert set(picture.text) == said | {XMP_KEY}
                if with_record:
                    assert json.loads(picture.text["medsteer_record"]) == record
    told = {path.parts[-3] for path in Path(dataset.root).rglob("*") if path.is_file() and b"private words" in
            path.read_bytes()}  # fmt: skip
    assert told == ({"records", "train"} if with_record else {"records"})


def test_the_same_request_gives_the_same_files(tmp_path):
    trees = []
    for name in "ab":
        save_pairs(PairDataset(tmp_path / name), replace(request(judge=Phantom()), boxes="both"))
        trees.append({p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*")
                      if p.is_file()})  # fmt: skip
    assert trees[0] == trees[1]


def real(number: int, group: str) -> dict:
    """A record of Counterfactual of Image."""
    made = started(number)["made"] | {"factual": "real image", "image": f"{number:016x}"}
    for name in ("seed", "batch_index", "noise"):
        del made[name]
    return {"group_id": group * 16, "noise_id": group * 16, "made": made}


def test_of_a_real_image_the_counterfactual_alone_is_marked_synthetic_and_no_workflow_is_told(dataset):
    texts = {"workflow": '{"image": "patient_4711.png"}', "prompt": '{"image": "patient_4711.png"}'}
    saved = save_pairs(dataset, request(records=[real(1, "a"), started(2)], texts=texts, boxes="both"))
    kinds = {}
    for record, name in zip(saved.records, ("real", "drawn"), strict=True):
        for kind in ("factual", "counterfactual"):
            with Image.open(io.BytesIO(dataset.image(record, kind))) as picture:
                picture.load()
                found = [word for word in ("compositeWith", "/trainedAlgo") if word in picture.text.get(XMP_KEY, "")]
                kinds[name, kind] = found, "workflow" in picture.text
    assert kinds == {
        ("real", "factual"): ([], False),
        ("real", "counterfactual"): (["compositeWith"], False),
        ("drawn", "factual"): (["/trainedAlgo"], True),
        ("drawn", "counterfactual"): (["/trainedAlgo"], True),
    }
    folder = Path(dataset.root)
    lines = [json.loads(line) for path in folder.rglob("metadata.jsonl") for line in path.read_text().splitlines()]
    assert sorted(line["factual_is_real"] for line in lines) == [False, True]
    card = (folder / "README.md").read_text()
    assert "In 1 pairs the factual image is real" in card and "was taken of a patient" in card.replace("\n", " ")
    assert "compositeWithTrainedAlgorithmicMedia" in card
    whole = saved.records[0]
    assert whole["synthetic"] and "patient_4711" not in json.dumps(whole)


def test_a_real_images_group_decides_its_split(dataset):
    records = [real(1, "a"), real(2, "a")]
    saved = save_pairs(dataset, request(records=records, split="auto", validation=0.4, test=0.4))
    assert len({record["split"] for record in saved.records}) == 1 == len({r["group_id"] for r in saved.records})
    assert saved.records[0]["pair_id"] != saved.records[1]["pair_id"]
