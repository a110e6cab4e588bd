"""The published ways to steer, by name."""

import pytest

from medsteer_core.errors import MedSteerError
from medsteer_core.steering.operators import make_operator
from medsteer_core.steering.presets import MEDSTEER, POLYPSTEER, PRESETS, find_preset, scaled_sites
from medsteer_core.steering.selection import select_sites


def test_medsteer_suppresses_at_2_keeping_the_norm_everywhere():
    preset = find_preset("MedSteer (paper)")
    assert (preset.operator, dict(preset.parameters)) == ("suppress", {"strength": 2.0, "keep_norm": True})
    assert (preset.rows, preset.sites) == ("all", "all")
    assert preset.describe() == "suppress, strength 2, norm kept, rows all, blocks all"


def test_polypsteer_suppresses_at_2_5_in_eight_blocks_of_the_positive_rows():
    preset = find_preset("PolypSteer")
    assert (preset.operator, dict(preset.parameters)) == ("suppress", {"strength": 2.5, "keep_norm": False})
    assert (preset.rows, preset.sites) == ("positive", "8-15 of 28")
    assert preset.describe() == "suppress, strength 2.5, norm not kept, rows positive, blocks 8-15 of 28"


@pytest.mark.parametrize("name", [MEDSTEER, POLYPSTEER])
def test_every_preset_is_an_operator(name):
    preset = PRESETS[name]
    assert make_operator(preset.operator, **preset.parameters).to_dict() == {
        "name": preset.operator,
        **preset.parameters,
    }


@pytest.mark.parametrize(
    ("depth", "blocks"), [(28, range(8, 16)), (14, range(4, 8)), (8, range(2, 5)), (3, range(0, 2)), (1, range(1))]
)
def test_a_range_of_blocks_is_scaled_to_the_models_depth(depth, blocks):
    names = [f"blocks.{index}" for index in range(depth)]
    assert select_sites(scaled_sites("8-15 of 28", depth), names) == tuple(names[index] for index in blocks)


def test_other_sites_stay_as_they_are():
    assert [scaled_sites(sites, 3) for sites in ("all", "0-3,8", "blocks.1*")] == ["all", "0-3,8", "blocks.1*"]


@pytest.mark.parametrize("name", ["custom", "medsteer", ""])
def test_a_preset_that_there_is_not_is_refused_with_those_that_there_are(name):
    with pytest.raises(MedSteerError, match=rf"no preset '{name}'; choose custom, MedSteer \(paper\) or PolypSteer"):
        find_preset(name)
