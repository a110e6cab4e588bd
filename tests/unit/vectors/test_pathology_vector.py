import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from medsteer_core.errors import MedSteerError
from medsteer_core.files.same_bytes import canonical_json
from medsteer_core.vectors.pathology_vector import PathologyVector, SiteDirections


def site(angles, rank=1, channels=4, gaps=None):
    """A site whose step s points `angles[s]` degrees from the first axis to the second (rank 2: and across that)."""
    radians = torch.deg2rad(torch.tensor(angles, dtype=torch.float64))
    directions = torch.zeros(len(angles), rank, channels, dtype=torch.float64)
    directions[:, 0, 0], directions[:, 0, 1] = radians.cos(), radians.sin()
    if rank == 2:
        directions[:, 1, 0], directions[:, 1, 1] = -radians.sin(), radians.cos()
    steps = len(angles)
    gaps = torch.ones(steps, rank) if gaps is None else torch.tensor(gaps).reshape(steps, rank)
    projections = torch.stack([gaps / 2, -gaps / 2], dim=1)
    return SiteDirections(directions.float(), gaps, torch.zeros(steps, channels), projections, torch.ones(steps, 2))


def vector(sites=None, sigmas=(16.0, 4.0, 1.0), provenance=None, flow=False):
    sites = sites or {"b.0": site([0.0, 30.0, 60.0]), "b.1": site([90.0, 90.0, 90.0], channels=6)}
    return PathologyVector(sites, torch.tensor(sigmas), provenance or {"cfg": 4.5}, flow)


def angle(direction):
    return math.degrees(math.atan2(direction[1], direction[0]))


def test_steps_rank_names_and_widths():
    value = vector()
    assert (value.steps, value.rank, value.site_names) == (3, 1, ("b.0", "b.1"))
    assert (value.channels("b.0"), value.channels("b.1")) == (4, 6)


def test_a_recorded_sigma_gives_the_recorded_values_bit_by_bit():
    value = vector()
    for step, sigma in enumerate([16.0, 4.0, 1.0]):
        at = value.at("b.0", sigma)
        assert torch.equal(at.directions, value.sites["b.0"].directions[step])
        assert torch.equal(at.gaps, value.sites["b.0"].gaps[step])
        assert torch.equal(at.projections, value.sites["b.0"].projections[step])


def test_several_sites_at_once_are_as_one_by_one():
    value = vector()
    for sigma in (16.0, 8.0, 1.0):
        together = value.at_sites(["b.1", "b.0"], sigma)
        assert list(together) == ["b.1", "b.0"]
        for name, at in together.items():
            alone = value.at(name, sigma)
            assert all(torch.equal(getattr(at, entry), getattr(alone, entry)) for entry in ("directions", "gaps"))


def test_between_two_sigmas_the_direction_turns_and_keeps_unit_length():
    at = vector().at("b.0", 8.0)  # half way from 16 to 4 in log sigma, so half way from 0 to 30 degrees
    assert angle(at.directions[0]) == pytest.approx(15.0, abs=1e-3)
    assert at.directions.norm().item() == pytest.approx(1.0, abs=1e-6)


def test_gaps_and_projections_are_interpolated_linearly():
    value = vector({"b": site([0.0, 0.0, 0.0], gaps=[2.0, 4.0, 8.0])})
    at = value.at("b", 2.0)
    torch.testing.assert_close(at.gaps, torch.tensor([6.0]))
    torch.testing.assert_close(at.projections, torch.tensor([[3.0], [-3.0]]))


def test_flow_models_interpolate_sigma_itself():
    at = vector({"b": site([0.0, 40.0])}, sigmas=(1.0, 0.5), flow=True).at("b", 0.75)
    assert angle(at.directions[0]) == pytest.approx(20.0, abs=1e-3)


def reading(angles, **changes):
    """A site with readers and offsets that tell the step that they belong to."""
    plain = site(angles, rank=2)
    number = torch.arange(float(len(angles)))
    readers = number[:, None, None].expand(-1, 2, 4).clone()
    fields = {"readers": readers, "offsets": 10 * readers[..., 0], **changes}
    return dataclasses.replace(plain, **fields)


@pytest.mark.parametrize(
    ("sigma", "step"), [(99.0, 0), (16.0, 0), (8.1, 0), (7.9, 1), (4.0, 1), (2.1, 1), (1.9, 2), (1.0, 2), (0.1, 2)]
)
def test_with_readers_the_nearest_level_in_log_sigma_stands_alone(sigma, step):
    value = vector({"b": reading([0.0, 40.0, 80.0])})
    at = value.at("b", sigma)
    for name in ("directions", "gaps", "projections", "readers", "offsets"):
        assert torch.equal(getattr(at, name), getattr(value.sites["b"], name)[step])


def test_with_readers_of_a_flow_model_the_nearest_level_in_sigma_stands_alone():
    value = vector({"b": reading([0.0, 40.0])}, sigmas=(1.0, 0.1), flow=True)
    assert [value.at("b", sigma).offsets[0].item() for sigma in (0.56, 0.54)] == [0.0, 10.0]


def test_readers_are_cast_with_the_rest_and_may_be_missing():
    at = vector({"b": reading([0.0, 40.0, 80.0])}).at("b", 4.0).cast("cpu", torch.float16)
    assert (at.readers.dtype, at.offsets.dtype, at.directions.dtype) == (torch.float16,) * 3
    assert at.offsets.tolist() == [10.0, 10.0]
    plain = vector().at("b.0", 4.0).cast("cpu", torch.float16)
    assert plain.readers is None and plain.offsets is None and plain.gaps.dtype == torch.float16


def test_readers_count_in_the_content_hash():
    sites = [reading([0.0]), reading([0.0], offsets=torch.ones(1, 2)), site([0.0], rank=2)]
    values = [vector({"b": one}, sigmas=(1.0,)) for one in sites]
    assert len({value.content_hash() for value in values}) == 3
    assert [value.has_readers for value in values] == [True, True, False]


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ({"b": reading([0.0], offsets=None)}, "'b'.*readers are given and offsets missing"),
        ({"b": reading([0.0], readers=None)}, "'b'.*readers are missing and offsets given"),
        ({"b": reading([0.0]), "c": site([0.0], rank=2)}, "'c'.*at every site or at none"),
        ({"b": site([0.0], rank=2), "c": reading([0.0])}, "'c'.*at every site or at none"),
        ({"b": reading([0.0], readers=torch.ones(1, 2, 5))}, r"'b': readers has shape \(1, 2, 5\); \(1, 2, 4\)"),
        ({"b": reading([0.0], offsets=torch.ones(1, 1))}, r"'b': offsets has shape \(1, 1\); \(1, 2\)"),
        ({"b": reading([0.0], offsets=torch.full((1, 2), math.nan))}, "'b': offsets has values that are not finite"),
    ],
)
def test_readers_that_do_not_fit_are_refused_by_the_sites_name(sites, message):
    with pytest.raises(MedSteerError, match=message):
        vector(sites, sigmas=(1.0,))


def test_beyond_the_recorded_sigmas_the_end_stands():
    value = vector()
    assert angle(value.at("b.0", 100.0).directions[0]) == pytest.approx(0.0)
    assert angle(value.at("b.0", 0.01).directions[0]) == pytest.approx(60.0, abs=1e-4)


def test_opposite_neighbours_give_the_nearer_one_and_no_nan():
    value = vector({"b": site([0.0, 180.0])}, sigmas=(16.0, 4.0))
    assert abs(angle(value.at("b", 8.0).directions[0])) == pytest.approx(180.0)
    assert angle(value.at("b", 9.0).directions[0]) == pytest.approx(0.0, abs=1e-3)


def test_interpolated_directions_of_higher_rank_stay_orthonormal():
    value = vector({"b": site([0.0, 50.0], rank=2)}, sigmas=(16.0, 4.0))
    at = value.at("b", 8.0)
    torch.testing.assert_close(at.directions @ at.directions.T, torch.eye(2), rtol=0, atol=1e-6)
    assert angle(at.directions[0]) == pytest.approx(25.0, abs=1e-3)


def test_cast_moves_every_value():
    at = vector().at("b.0", 8.0).cast(torch.device("cpu"), torch.bfloat16)
    assert {tensor.dtype for tensor in (at.directions, at.gaps, at.projections)} == {torch.bfloat16}


def test_an_unknown_site_is_an_error_that_names_those_there_are():
    with pytest.raises(MedSteerError, match=r"no site 'b.7'; it has 2, from 'b.0' to 'b.1'"):
        vector().at("b.7", 1.0)


# The content hash


def test_equal_vectors_have_equal_hashes_of_64_hex_digits():
    assert vector().content_hash() == vector().content_hash()
    assert len(vector().content_hash()) == 64 and int(vector().content_hash(), 16) >= 0
    assert vector().short_hash() == vector().content_hash()[:10]


def test_the_hash_is_the_same_in_another_process():
    code = (
        "from torch import ones; from medsteer_core.vectors.pathology_vector import *\n"
        "s = SiteDirections(ones(1, 1, 1), ones(1, 1), ones(1, 1), ones(1, 2, 1), ones(1, 2))\n"
        "v = PathologyVector({'b': s}, ones(1), {'y': 1, 'x': [0.1, None]})\n"
    )
    namespace = {}
    exec(code, namespace)  # the same lines here and there
    other = subprocess.run(
        [sys.executable, "-c", code + "print(v.content_hash())"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == namespace["v"].content_hash()


@pytest.mark.parametrize("name", ["directions", "gaps", "centres", "projections", "spreads"])
def test_the_hash_sees_every_value_of_every_site(name):
    original = vector()
    changed = getattr(original.sites["b.1"], name).clone()
    changed.view(-1)[-1] += 1e-5
    sites = {**original.sites, "b.1": dataclasses.replace(original.sites["b.1"], **{name: changed})}
    assert vector(sites).content_hash() != original.content_hash()


def test_the_hash_sees_names_order_sigmas_flow_and_provenance():
    a, b = site([0.0, 30.0, 60.0]), site([90.0, 90.0, 90.0])
    variants = [
        vector({"a": a, "b": b}),
        vector({"b": b, "a": a}),
        vector({"a": a, "c": b}),
        vector({"a": a, "b": b}, flow=True),
        vector({"a": a, "b": b}, sigmas=(16.0, 4.0, 1.5)),
        vector({"a": a, "b": b}, provenance={"cfg": 4.0}),
    ]
    assert len({value.content_hash() for value in variants}) == len(variants)


def test_the_hash_does_not_depend_on_the_order_of_provenance_or_the_memory_layout():
    plain = vector({"b": site([0.0, 30.0, 60.0])}, provenance={"a": 1, "b": (1, 2)})
    turned = dataclasses.replace(
        plain.sites["b"], centres=torch.zeros(4, 3).T, directions=plain.sites["b"].directions.mT.contiguous().mT
    )
    assert not turned.centres.is_contiguous()
    assert vector({"b": turned}, provenance={"b": [1, 2], "a": 1}).content_hash() == plain.content_hash()


# Provenance


def test_provenance_is_plain_json_and_the_callers_dict_is_left_alone():
    given = {"seeds": (1, 2), 3: "three"}
    value = vector(provenance=given)
    given["seeds"] = ()
    assert value.provenance == {"seeds": [1, 2], "3": "three"}
    assert json.loads(canonical_json(value.provenance)) == value.provenance


@pytest.mark.parametrize("bad", [{"x": torch.zeros(1)}, {"x": math.nan}, {"x": {1, 2}}])
def test_provenance_that_json_cannot_hold_is_an_error(bad):
    with pytest.raises(MedSteerError, match="must be JSON"):
        vector(provenance=bad)


# Validation


def broken(**changes):
    return {"b.0": site([0.0, 30.0, 60.0]), "bad": dataclasses.replace(site([0.0, 30.0, 60.0]), **changes)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gaps": torch.ones(2, 1)}, r"Site 'bad': gaps has shape \(2, 1\); \(3, 1\)"),
        ({"directions": torch.eye(4)[:2, None]}, r"directions has shape \(2, 1, 4\); \(3, 1, 4\)"),
        ({"directions": torch.ones(3)}, r"directions has shape \(3,\)"),
        ({"centres": torch.zeros(3, 5)}, r"centres has shape \(3, 5\); \(3, 4\)"),
        ({"projections": torch.zeros(3, 1, 2)}, r"projections has shape \(3, 1, 2\); \(3, 2, 1\)"),
        ({"spreads": torch.zeros(3)}, r"spreads has shape \(3,\); \(3, 2\)"),
        ({"directions": 1.01 * site([0.0, 30.0, 60.0]).directions}, "Site 'bad': directions must have unit length"),
        ({"directions": torch.zeros(3, 1, 4)}, "unit length"),
        ({"gaps": torch.tensor([[1.0], [math.nan], [1.0]])}, "Site 'bad': gaps has values that are not finite"),
        ({"gaps": -torch.ones(3, 1)}, "Site 'bad': gaps has negative values"),
        ({"spreads": -torch.ones(3, 2)}, "spreads has negative values"),
        ({"centres": torch.zeros(3, 4).double()}, r"Site 'bad': centres is torch.float64 on cpu; torch.float32"),
    ],
)
def test_a_site_that_does_not_fit_is_named_with_the_shapes(changes, message):
    with pytest.raises(MedSteerError, match=message):
        vector(broken(**changes))


def test_directions_of_one_step_must_be_orthogonal():
    skew = site([0.0], rank=2)
    skew.directions[0, 1] = torch.tensor([0.6, 0.8, 0.0, 0.0])
    with pytest.raises(MedSteerError, match="orthogonal"):
        vector({"b": skew}, sigmas=(1.0,))


def test_one_rank_for_all_sites():
    with pytest.raises(MedSteerError, match=r"Site 'b.1': directions has shape \(1, 2, 4\); \(1, 1, 4\)"):
        vector({"b.0": site([0.0]), "b.1": site([0.0], rank=2)}, sigmas=(1.0,))


@pytest.mark.parametrize("sigmas", [(1.0, 4.0, 16.0), (16.0, 4.0, 4.0), (16.0, 4.0, 0.0), (16.0, 4.0, -1.0)])
def test_sigmas_must_be_positive_and_strictly_descending(sigmas):
    with pytest.raises(MedSteerError, match="strictly descending"):
        vector(sigmas=sigmas)


def test_a_vector_needs_a_site_and_a_step():
    with pytest.raises(MedSteerError, match="at least one cross-attention site"):
        PathologyVector({}, torch.ones(1), {})
    with pytest.raises(MedSteerError, match="at least one step"):
        PathologyVector({"b": site([0.0])}, torch.ones(0), {})
