"""A sweep of strengths: which image belongs to which strength, and what is said of it."""

import csv
import io
import json

import pytest
import torch

from medsteer_core.errors import MedSteerError
from medsteer_core.judges.judge import Answers, Terms
from medsteer_core.pictures.sweep import by_strength, records, sweep, sweep_picture, table

STRENGTHS = (0.5, 1.0)
FACTUAL = torch.full((3, 3, 24, 24), 0.2)
# all images of the first strength first; from 0.5 on an image is bright
LEVELS = torch.tensor([0.3, 0.4, 0.6, 0.7, 0.8, 0.9])
COUNTERFACTUAL = LEVELS[:, None, None, None].expand(-1, 3, 24, 24)


class Brightness:
    """Says "bright" with the image's mean as probability."""

    terms, identity = Terms(("dark", "bright"), ("dark", "bright")), "brightness"

    def __call__(self, images):
        bright = images.mean((1, 2, 3))
        return Answers(torch.stack([1 - bright, bright], 1))


def found(judge=None):
    return sweep(FACTUAL, COUNTERFACTUAL, STRENGTHS, "dark", "bright", judge or Brightness(), "Brightness")


def test_all_images_of_the_first_strength_come_first():
    grid = by_strength(FACTUAL, COUNTERFACTUAL, STRENGTHS)
    assert grid.shape == (3, 2, 3, 24, 24)
    torch.testing.assert_close(grid[:, :, 0, 0, 0], torch.tensor([[0.3, 0.7], [0.4, 0.8], [0.6, 0.9]]))


def test_every_pair_has_its_own_score():
    pairs = records(found())["pairs"]
    assert [(p["image"], p["strength"], p["flipped"]) for p in pairs] == [
        (1, 0.5, False), (1, 1.0, True), (2, 0.5, False), (2, 1.0, True), (3, 0.5, True), (3, 1.0, True),
    ]  # fmt: skip
    assert [p["target_probability"][1] for p in pairs] == pytest.approx([0.3, 0.7, 0.4, 0.8, 0.6, 0.9], abs=1e-4)


def test_each_strength_has_its_flip_rate():
    record = json.loads(json.dumps(records(found())))
    assert [(s["strength"], s["n"], s["flips"]) for s in record["by_strength"]] == [(0.5, 3, 1), (1.0, 3, 3)]
    assert (record["judge"], record["source"], record["target"]) == ("Brightness", "dark", "bright")


def test_the_table_is_csv_with_a_row_for_each_pair():
    rows = list(csv.DictReader(io.StringIO(table(found()))))
    assert len(rows) == 6 and rows[0]["misses"] == "label" and rows[0]["flipped"] == "0"
    assert (rows[3]["image"], rows[3]["strength"], rows[3]["label"]) == ("2", "1", "bright")


def test_without_a_judge_there_are_pixels_alone():
    plain = sweep(FACTUAL, COUNTERFACTUAL, STRENGTHS, "", "", None)
    record = records(plain)
    assert record["judge"] is None and record["by_strength"] == [] and "flipped" not in record["pairs"][0]
    assert 0 < record["pairs"][0]["ssim"] < 1 and table(plain).splitlines()[1].startswith("1,0.5,,,,,0.")
    assert sweep_picture(FACTUAL, COUNTERFACTUAL, plain).shape[0] == 3


def test_the_grid_has_the_factual_first_and_then_the_strengths():
    picture = sweep_picture(FACTUAL, COUNTERFACTUAL, found())
    for row, levels in enumerate(((0.2, 0.3, 0.7), (0.2, 0.4, 0.8), (0.2, 0.6, 0.9))):
        for column, level in enumerate(levels):
            y, x = 52 + row * (250 + 66) + 125, 48 + column * (250 + 8) + 125
            shown = picture[:, y, x + (picture.shape[2] - (48 + 3 * 250 + 16 + 12)) // 2]
            torch.testing.assert_close(shown, torch.full((3,), level), atol=0.01, rtol=0)


def test_a_long_sweep_is_drawn_in_part_and_scored_whole():
    many = FACTUAL[:1].expand(10, -1, -1, -1), FACTUAL[:1].expand(100, -1, -1, -1)
    whole = sweep(*many, tuple(range(1, 11)), "", "", None)
    picture = sweep_picture(*many, whole)
    assert len(records(whole)["pairs"]) == 100
    assert picture.shape[1:] == (52 + 6 * 168 + 5 * 66 + 158, 48 + 9 * 168 + 8 * 8 + 12)


def test_counts_and_classes_that_do_not_fit_are_refused():
    with pytest.raises(MedSteerError, match="counterfactual has 6 images; 9 were expected: 3 strengths"):
        by_strength(FACTUAL, COUNTERFACTUAL, (1, 2, 3))
    with pytest.raises(MedSteerError, match="target class is 'polyps'; one of these was expected: dark, bright"):
        sweep(FACTUAL, COUNTERFACTUAL, STRENGTHS, "dark", "polyps", Brightness())


def test_a_factual_that_is_not_the_source_class_is_not_counted():
    swapped = sweep(FACTUAL, COUNTERFACTUAL, STRENGTHS, "bright", "dark", Brightness(), "Brightness")
    assert [s["accepted"] for s in records(swapped)["by_strength"]] == [0, 0]
