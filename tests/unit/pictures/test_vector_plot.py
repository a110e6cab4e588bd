"""What is drawn of a vector: its numbers where it has them, a sentence where it has none."""

from dataclasses import replace

import pytest
import torch

from medsteer_core.extraction.sample_estimators import estimate
from medsteer_core.extraction.sample_report import KEY, PROJECTIONS, separability_facts
from medsteer_core.extraction.samples_record import SampleRecord
from medsteer_core.pictures.vector_maps import (
    BlockMap,
    Missing,
    block_numbers,
    classes_along,
    gap_map,
    separability_map,
    stability_map,
)
from medsteer_core.pictures.vector_plot import vector_picture
from medsteer_core.vectors.algebra import add
from medsteer_core.vectors.pathology_vector import PathologyVector

UNKNOWN = ["gaps", "centres", "projections", "spreads"]


def vector(blocks=4, steps=3, count=8, reported=True, **facts) -> PathologyVector:
    """Block b's classes are 2 b apart along the first of 16 channels, in unit noise."""
    generator, sides = torch.Generator().manual_seed(0), []
    for sign in (1.0, -1.0):
        sites = {f"blocks.{b}.attn2": torch.randn(count, steps, 16, generator=generator) for b in range(blocks)}
        for b, values in enumerate(sites.values()):
            values[..., 0] += sign * b
        sides.append(SampleRecord(sites, torch.arange(steps, 0, -1).float(), torch.arange(count)))
    made = estimate("mean_difference", *sides, {"noise": "paired", "samples": count, "prompts": {}, **facts})
    found = separability_facts(*sides, "mean_difference", made.site_names) if reported else None
    return replace(made, provenance={**made.provenance, KEY: found}) if reported else made


def imported() -> PathologyVector:
    return replace(vector(reported=False), provenance={"estimator": "imported", "unknown": UNKNOWN, "prompts": {}})


def affine() -> PathologyVector:
    made = vector(reported=False)
    zeros = {"offsets": torch.zeros(3, 1)}
    sites = {n: replace(s, readers=torch.zeros_like(s.directions), **zeros) for n, s in made.sites.items()}
    shares = {name: [0.5, -0.25, None] for name in made.site_names}
    return PathologyVector(sites, made.sigmas, {"estimator": "affine_map", "explained_by_site": shares})


def test_the_gap_is_in_spreads_within_a_class_and_absolute_where_classes_do_not_vary():
    made = vector()
    site = made.sites["blocks.3.attn2"]
    torch.testing.assert_close(gap_map(made).values[3], site.gaps[:, 0] / site.spreads.mean(1))
    sites = {name: replace(one, spreads=torch.zeros(3, 2)) for name, one in made.sites.items()}
    found = gap_map(replace(made, sites=sites))
    assert "units" in found.title
    torch.testing.assert_close(found.values[3], site.gaps[:, 0])


def test_a_few_large_gaps_do_not_take_all_colours():
    made = vector(blocks=30, steps=1, reported=False)
    sites = {name: replace(one, spreads=torch.ones(1, 2), gaps=torch.ones(1, 1)) for name, one in made.sites.items()}
    assert gap_map(replace(made, sites=sites)).high == 1.0
    sites["blocks.7.attn2"] = replace(sites["blocks.7.attn2"], gaps=torch.full((1, 1), 50.0))
    found = gap_map(replace(made, sites=sites))
    assert found.high == 1.0 and float(found.values[7]) == 50.0


def test_separability_and_stability_are_the_recorded_ones():
    made = vector()
    report = made.provenance[KEY]
    assert separability_map(made).values[2].tolist() == pytest.approx(report["auroc"]["blocks.2.attn2"])
    assert stability_map(made).values[2].tolist() == pytest.approx(report["stability"]["blocks.2.attn2"])


def test_the_classes_are_the_recorded_projections():
    made = vector()
    along = classes_along(made)
    found = made.provenance[KEY][PROJECTIONS]
    assert along.held_out and (along.site, along.step) == (found["site"], found["step"])
    assert list(along.present) == found["present"] and min(along.present) > max(along.absent)


def test_an_older_vector_shows_its_class_means_at_the_widest_gap():
    made = vector(reported=False)
    along, gaps = classes_along(made), gap_map(made).values
    block = made.site_names.index(along.site)
    assert not along.held_out and gaps[block, along.step] == gaps.max()
    gap = float(made.sites[along.site].gaps[along.step, 0])
    assert along.present[0] == pytest.approx(gap / 2) and along.absent[0] == pytest.approx(-gap / 2)


def test_an_affine_map_shows_what_it_predicts_and_says_that_it_has_no_stability():
    found = separability_map(affine())
    assert found.values[0, :2].tolist() == [0.5, -0.25] and bool(found.values[0, 2].isnan())
    assert (found.low, found.high) == (0.0, 1.0)
    assert isinstance(stability_map(affine()), Missing)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (imported(), "imported file"),
        (add(vector(), vector(count=9)), "combined"),
        (vector(count=3, reported=False), "3 samples a prompt"),
        (replace(vector(), provenance={KEY: {"left_out": "too much."}}), "Left out: too much."),
        (replace(vector(), provenance={}), "Extract it again"),
    ],
    ids=["imported", "combined", "few samples", "left out", "older"],
)
def test_a_vector_without_a_report_says_why(made, words):
    for found in (separability_map(made), stability_map(made)):
        assert isinstance(found, Missing) and words in found.why


def test_an_imported_vectors_zeros_are_not_drawn():
    assert isinstance(gap_map(imported()), Missing) and isinstance(classes_along(imported()), Missing)


def test_blocks_have_their_own_numbers_where_the_names_say_them():
    assert block_numbers(["blocks.3.cross_attn.proj", "blocks.5.cross_attn.proj"]) == [3, 5]
    assert block_numbers(["input_blocks.1.1.transformer_blocks.0.attn2", "middle.attn2"]) is None


@pytest.mark.parametrize(
    "made",
    [vector(), vector(28, 20), vector(1, 1, 2, reported=False), imported(), affine(), add(vector(), vector(count=9))],
    ids=["4 x 3", "28 x 20", "one", "imported", "affine", "combined"],
)
def test_every_kind_of_vector_is_drawn_in_the_same_size(made):
    picture = vector_picture(made)
    assert picture.shape == (3, 1096, 1060) and picture.min() >= 0 and picture.max() <= 1
    assert picture[:, :, -6:].min() > 0.97 and picture[:, -6:].min() > 0.97  # nothing is cut off


def test_the_maps_colours_follow_the_numbers():
    """Block 0 has no gap and is dark violet, block 3 has the widest and is yellow: brighter in green."""
    picture = vector_picture(vector())
    top, bottom = picture[1, 208 + 10, 92 + 8], picture[1, 208 + 310, 92 + 8]
    assert isinstance(gap_map(vector()), BlockMap) and bottom - top > 0.2
