"""A class gap in spreads is a number only where a class is known to vary."""

from dataclasses import replace

import pytest
import torch

from medsteer_core.pictures.summary import describe
from medsteer_core.vectors.class_gap import gaps_in_spreads
from medsteer_core.vectors.pathology_vector import PathologyVector, SiteDirections


def vector(spread=0.5, samples=8, sites=("a", "b"), **facts):
    def site(of):
        directions = torch.nn.functional.normalize(torch.ones(2, 1, 4), dim=-1)
        means = torch.tensor([[[1.0], [-1.0]]] * 2)
        return SiteDirections(directions, torch.full((2, 1), 2.0), torch.zeros(2, 4), means, torch.full((2, 2), of))

    made = {name: site(spread if name == "a" else 0.5) for name in sites}
    return PathologyVector(made, torch.tensor([2.0, 1.0]), {"samples": samples, "prompts": {}, **facts})


def test_the_gap_is_told_in_spreads_where_both_classes_vary():
    found, why = gaps_in_spreads(vector())
    assert {name: gaps.tolist() for name, gaps in found.items()} == {"a": [4.0, 4.0], "b": [4.0, 4.0]} and why == ""
    assert "largest class gap: 4.0 x the spread within a class, at a" in describe(vector())


@pytest.mark.parametrize("spread", [0.0, 1e-12, 1e-5])
def test_a_site_whose_samples_do_not_vary_is_left_out(spread):
    found, why = gaps_in_spreads(vector(spread))
    assert list(found) == ["b"] and "do not vary" in why
    assert "at b (1 sites left out: the samples of a class do not vary there)" in describe(vector(spread))
    assert (
        "class gap: no number, since the samples of a class do not vary\n"
        in describe(vector(spread, sites=("a",))) + "\n"
    )


def test_one_sample_is_no_ground_for_a_number():
    assert gaps_in_spreads(vector(samples=1)) == ({}, "one sample does not say how much images of one class vary")
    assert "class gap: no number, since one sample does not say" in describe(vector(samples=1))


def test_statistics_that_are_unknown_give_none():
    unknown = replace(vector(), provenance={"unknown": ["gaps", "spreads"]})
    assert gaps_in_spreads(unknown) == ({}, "the vector's statistics are not known")
