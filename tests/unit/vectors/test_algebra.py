import dataclasses
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from medsteer_core.errors import MedSteerError
from medsteer_core.extraction import estimators
from medsteer_core.extraction.capture import SigmaStatistics
from medsteer_core.steering.operators import Ablate, Suppress
from medsteer_core.vectors.algebra import HOW, add, average, combine, joint_subspace, orthogonalise, scale, subtract
from medsteer_core.vectors.combined_facts import describe_combined, is_combined, label
from medsteer_core.vectors.file import load, save
from medsteer_core.vectors.match import on_schedule, overlap
from medsteer_core.vectors.pathology_vector import PathologyVector, SiteDirections

SIGMAS = (8.0, 2.0)
MODEL = {"architecture": "PixArt", "weights": "aa", "patches": ""}


def vector(present, absent, spread=(2.0, 2.0), sigmas=SIGMAS, texts=None, **facts):
    """The mean difference of two classes, whose means (C,) are the same at all of the sigmas and at the site 'b'."""
    sides = [
        {
            "b": SigmaStatistics(
                torch.tensor(sigmas),
                torch.as_tensor(mean, dtype=torch.float32).expand(len(sigmas), -1),
                torch.full((len(sigmas),), width**2),
                torch.full((len(sigmas),), 5),
            )
        }
        for mean, width in zip((present, absent), spread, strict=True)
    ]
    facts = {"model": MODEL, **facts}
    if texts:
        facts["prompts"] = {"present": {"text": texts[0]}, "absent": {"text": texts[1]}}
    return estimators.mean_difference(*sides, facts)


def random_vector(seed, rank=1, channels=12, sites=("b.0", "b.1"), steps=3, readers=False, **facts):
    """Random orthonormal directions with random gaps, of a model that says who it is."""
    generator = torch.Generator().manual_seed(seed)

    def site():
        directions = torch.linalg.qr(torch.randn(steps, channels, rank, generator=generator)).Q.mT.contiguous()
        gaps = 1 + torch.rand(steps, rank, generator=generator)
        centres = torch.randn(steps, channels, generator=generator)
        middle = (centres[:, None] * directions).sum(dim=-1)
        more = (directions.clone(), torch.zeros(steps, rank)) if readers else ()
        projections = torch.stack([middle + gaps / 2, middle - gaps / 2], dim=1)
        return SiteDirections(directions, gaps, centres, projections, torch.ones(steps, 2), *more)

    facts = {"model": MODEL, "estimator": "mean_difference", **facts}
    return PathologyVector({name: site() for name in sites}, torch.tensor([8.0, 4.0, 2.0][:steps]), facts)


def close(actual, wanted, tolerance=1e-6):
    wanted = torch.as_tensor(wanted, dtype=actual.dtype)
    torch.testing.assert_close(actual, wanted.expand(actual.shape), rtol=tolerance, atol=tolerance)


X3, Y4 = [3.0, 0.0, 0.0], [0.0, 4.0, 0.0]  # displacements 3 along x and 4 along y
NONE = [0.0, 0.0, 0.0]


# Sums


def test_vectors_are_added_as_displacements():
    site = add(vector(X3, NONE), vector(Y4, NONE)).sites["b"]
    close(site.directions[:, 0], [0.6, 0.8, 0.0])
    close(site.gaps, 5.0)


def test_weights_scale_and_turn_displacements():
    site = add(vector(X3, NONE), vector(Y4, NONE), 2.0, -2.0).sites["b"]
    close(site.directions[:, 0], [0.6, -0.8, 0.0])
    close(site.gaps, 10.0)
    assert torch.equal(subtract(vector(X3, NONE), vector(Y4, NONE), 2.0, 2.0).sites["b"].directions, site.directions)


def test_the_difference_of_two_findings_is_the_step_between_them():
    """(dyed - normal) - (polyps - normal) = dyed - polyps."""
    normal, polyps, dyed = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) * 5
    difference = subtract(vector(dyed, normal), vector(polyps, normal)).sites["b"]
    wanted = vector(dyed, polyps).sites["b"]
    close(difference.directions, wanted.directions, 1e-5)
    close(difference.gaps, wanted.gaps, 1e-5)


def test_a_sums_class_statistics_are_unknown_and_zero():
    combined = add(vector(X3, NONE), vector(Y4, NONE))
    assert combined.provenance["unknown"] == ["centres", "projections", "spreads"]
    site = combined.sites["b"]
    assert not site.centres.any() and not site.projections.any() and not site.spreads.any()


def test_an_average_of_mean_differences_averages_the_class_means():
    a, b = vector([5.0, 1.0, 0.0], [1.0, 1.0, 0.0], (3.0, 1.0)), vector([1.0, 5.0, 2.0], [1.0, 1.0, 2.0], (4.0, 1.0))
    combined = average(a, b)
    # Class means (3, 3, 1) and (1, 1, 1): 2 along x and 2 along y.
    site, half = combined.sites["b"], math.sqrt(0.5)
    close(site.directions[:, 0], [half, half, 0.0])
    close(site.gaps, 2 * math.sqrt(2))
    close(site.centres, [2.0, 2.0, 1.0])
    close(site.projections[:, :, 0], [6 * half, 2 * half])
    close(site.spreads, [math.sqrt((9 + 16) / 2), 1.0])
    assert "unknown" not in combined.provenance
    weighted = average(a, b, 3.0, 1.0).sites["b"]  # 3 along x and 1 along y
    close(weighted.directions[:, 0], F.normalize(torch.tensor([3.0, 1.0, 0.0]), dim=0))
    assert average(combined, a).provenance.get("unknown") is None  # its class means are still known


def test_an_average_of_another_estimators_vectors_knows_no_class_means():
    a, b = vector(X3, NONE), vector(Y4, NONE)
    other = PathologyVector(b.sites, b.sigmas, {**b.provenance, "estimator": "lda"})
    assert average(a, other).provenance["unknown"] == ["centres", "projections", "spreads"]


def test_a_vector_without_gaps_is_added_by_its_unit_direction():
    imported = vector(Y4, NONE)
    site = imported.sites["b"]
    zeros = {name: torch.zeros_like(getattr(site, name)) for name in ("gaps", "centres", "projections", "spreads")}
    facts = {"estimator": "imported", "unknown": list(zeros)}
    imported = PathologyVector({"b": dataclasses.replace(site, **zeros)}, imported.sigmas, facts)
    combined = add(vector(X3, NONE), imported, 3.0, 4.0)
    close(combined.sites["b"].directions[:, 0], [0.6, 0.8, 0.0])
    assert combined.provenance["unknown"] == ["gaps", "centres", "projections", "spreads"]
    assert not combined.sites["b"].gaps.any()
    assert combined.provenance["model"] == MODEL
    assert "not every part says which model it is from" in describe_combined(combined)
    assert orthogonalise(imported, vector(X3, NONE)).provenance["unknown"] == combined.provenance["unknown"]
    assert joint_subspace([imported, vector(X3, NONE)]).provenance["unknown"] == combined.provenance["unknown"]


def test_vectors_that_cancel_are_an_error_and_steps_that_do_borrow_the_nearest():
    a = vector(X3, NONE)
    with pytest.raises(MedSteerError, match="a and b cancel: nothing is left at any site"):
        subtract(a, a)
    half = random_vector(0, sites=("b",))
    site = half.sites["b"]
    directions = site.directions.clone()
    directions[1] = random_vector(1, sites=("b",)).sites["b"].directions[1]
    other = PathologyVector({"b": dataclasses.replace(site, directions=directions)}, half.sigmas, half.provenance)
    left = subtract(half, other)
    assert left.sites["b"].gaps[[0, 2], 0].tolist() == [0.0, 0.0] and left.sites["b"].gaps[1, 0] > 0
    assert torch.equal(left.sites["b"].directions[0], left.sites["b"].directions[1])
    assert left.provenance["degenerate"] == 2
    assert "nothing is left at 2 site-steps" in describe_combined(left)


# Scale


def test_scaling_scales_the_gap_and_a_negative_weight_changes_the_classes_places():
    a = vector([5.0, 1.0, 0.0], [1.0, 1.0, 0.0], (3.0, 1.0))
    twice = scale(a, 2.0)
    close(twice.sites["b"].gaps, 8.0)
    assert torch.equal(twice.sites["b"].directions, a.sites["b"].directions)
    assert twice.provenance["unknown"] == ["centres", "projections", "spreads"]
    turned, swapped = scale(a, -1.0).sites["b"], vector([1.0, 1.0, 0.0], [5.0, 1.0, 0.0], (1.0, 3.0)).sites["b"]
    for name, tensor in turned.tensors().items():
        close(tensor, getattr(swapped, name))
    assert "unknown" not in scale(a, -1.0).provenance


def test_scaling_a_vector_with_readers_scales_what_they_read():
    a = random_vector(0, rank=2, readers=True)
    half = scale(a, 0.5).sites["b.0"]
    assert torch.equal(half.readers, 0.5 * a.sites["b.0"].readers) and half.offsets.shape == (3, 2)
    with pytest.raises(
        MedSteerError, match="weight of a vector is -1; a number above 0, since this vector has readers"
    ):
        scale(a, -1.0)
    with pytest.raises(MedSteerError, match="weight of a vector is 0; a number other than 0"):
        scale(vector(X3, NONE), 0.0)


# One across another


def test_orthogonalising_takes_the_others_part_away():
    a, b = vector([4.0, 3.0, 1.0], [1.0, 3.0, 1.0 - 4.0]), vector(X3, NONE)  # a: (3, 0, 4)
    combined = orthogonalise(a, b)
    site = combined.sites["b"]
    close(site.directions[:, 0], [0.0, 0.0, 1.0])
    close(site.gaps, 4.0)
    # The classes are a's: their means have 1 and -3 along z.
    close(site.projections[:, :, 0], [1.0, -3.0])
    close(site.centres, a.sites["b"].centres)
    assert "unknown" not in combined.provenance
    # But the result is no longer all of the difference between them.
    assert add(combined, b).provenance["unknown"] == ["centres", "projections", "spreads"]


def test_orthogonalising_against_rank_2_leaves_nothing_in_its_plane():
    a, b = random_vector(0), random_vector(1, rank=2, readers=True)
    left = orthogonalise(a, b)
    for name, site in left.sites.items():
        assert (site.directions @ b.sites[name].directions.mT).abs().max() < 1e-6


def test_orthogonalising_against_directions_that_are_not_quite_of_unit_length_leaves_nothing():
    a, b = random_vector(0, sites=("b",)), random_vector(1, sites=("b",))
    longer = dataclasses.replace(b.sites["b"], directions=b.sites["b"].directions * (1 + 4e-4))
    left = orthogonalise(a, PathologyVector({"b": longer}, b.sigmas, b.provenance))
    assert (left.sites["b"].directions @ b.sites["b"].directions.mT).abs().max() < 1e-6


def test_the_dye_without_the_polyp_moves_the_dye_alone():
    """(dyed lifted polyps - polyps) across (polyps - normal), with a dye that looks a bit like a polyp."""
    generator = torch.Generator().manual_seed(0)
    normal = 10 * torch.randn(64, generator=generator)
    polyp, dye = torch.linalg.qr(torch.randn(64, 2, generator=generator)).Q.T
    polyps = normal + 4 * polyp
    dyed = polyps + 5 * dye + 2 * polyp  # the lifted polyp stands out more
    wanted = orthogonalise(vector(dyed, polyps), vector(polyps, normal)).sites["b"]
    assert (wanted.directions[:, 0] @ dye).min() > 0.99999
    assert (wanted.directions[:, 0] @ polyp).abs().max() < 1e-5
    close(wanted.gaps, 5.0, 1e-5)


def test_a_vector_that_lies_wholly_in_the_other_is_an_error():
    with pytest.raises(MedSteerError, match="a and b cancel"):
        orthogonalise(vector(X3, NONE), vector([-1.0, 0.0, 0.0], NONE))


# Both at once


def test_the_joint_subspace_holds_both_and_its_basis_is_orthonormal():
    a, b = random_vector(0, rank=2), random_vector(1)
    joint = joint_subspace([a, b])
    assert joint.rank == 3
    for name, site in joint.sites.items():
        close(site.directions @ site.directions.mT, torch.eye(3), 1e-5)
        for part in (a, b):
            given = part.sites[name].directions
            close(given @ site.directions.mT @ site.directions, given, 1e-5)
        # Each stays nearest to its own direction, and its gap is its displacement along it.
        given = torch.cat([a.sites[name].directions, b.sites[name].directions], dim=1)
        own = (given * site.directions).sum(dim=-1)
        assert (own > 0.5).all()
        close(site.gaps, torch.cat([a.sites[name].gaps, b.sites[name].gaps], dim=1) * own, 1e-5)


@pytest.mark.parametrize("operator", [Suppress(2.0, True), Suppress(1.5, False), Ablate(True)])
def test_joint_suppression_does_not_depend_on_the_order(operator):
    vectors = [random_vector(seed, channels=16) for seed in range(3)]
    activation = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(9))
    results = [operator(activation, joint_subspace(order).at("b.1", 4.0)) for order in itertools.permutations(vectors)]
    assert (results[0] - activation).abs().max() > 0.1
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-5)


def test_the_joint_subspace_of_orthogonal_vectors_is_the_vectors():
    a, b = vector(X3, [0.0, 0.0, 1.0], texts=("polyps", "normal")), vector(Y4, [0.0, 1.0, 0.0])
    a = orthogonalise(a, b)
    b = vector(Y4, [0.0, 1.0, 0.0])
    site = joint_subspace([a, b]).sites["b"]
    close(site.directions, torch.cat([a.sites["b"].directions, b.sites["b"].directions], dim=1))


def test_class_means_along_a_joint_basis_are_the_parts_own():
    """At 60 degrees each direction turns by 15; class means are projected on the turned directions."""
    a = vector([2.0, 1.0, 0.0], [0.0, 1.0, 0.0])
    b = vector([1.0, math.sqrt(3), 5.0], [0.0, 0.0, 5.0])
    joint = joint_subspace([a, b])
    site = joint.sites["b"]
    turn = math.radians(15)
    first = torch.tensor([math.cos(turn), -math.sin(turn), 0.0])
    second = torch.tensor([math.cos(5 * turn), math.sin(5 * turn), 0.0])
    close(site.directions, torch.stack([first, second]))
    close(site.gaps, [2 * math.cos(turn), 2 * math.cos(turn)])
    close(site.projections[:, :, 0], [torch.tensor([2.0, 1, 0]) @ first, torch.tensor([0.0, 1, 0]) @ first])
    close(site.projections[:, :, 1], [2 * math.cos(turn), 0.0])
    assert joint.provenance["unknown"] == ["centres", "spreads"]
    assert "projections" in joint_subspace([joint, vector([0.0, 0, 1], NONE)]).provenance["unknown"]


def test_directions_that_are_one_span_no_plane_and_too_many_fit_in_none():
    with pytest.raises(MedSteerError, match="point the same way at site 'b', sigma 8, so they span no larger"):
        joint_subspace([vector(X3, NONE), vector([1.0, 0.0, 0.0], NONE)])
    with pytest.raises(MedSteerError, match="'b.0' has 2 channels, and the vectors have 3 directions together"):
        joint_subspace([random_vector(0, rank=2, channels=2), random_vector(1, channels=2)])
    with pytest.raises(MedSteerError, match="joint subspace of 1 vectors"):
        joint_subspace([vector(X3, NONE)])


# Another schedule


def test_the_second_is_interpolated_to_the_firsts_noise_levels():
    a = vector([0.0, 0.0, 6.0], NONE, sigmas=(8.0, 4.0, 2.0))
    b = vector([3.0, 0.0, 0.0], NONE, sigmas=(8.0, 2.0))
    site = b.sites["b"]
    directions = site.directions.clone()
    directions[1, 0] = torch.tensor([0.0, 1.0, 0.0])
    b = PathologyVector({"b": dataclasses.replace(site, directions=directions)}, b.sigmas, b.provenance)
    combined = add(a, b, 0.5, 1.0)
    assert combined.sigmas.tolist() == [8.0, 4.0, 2.0]
    half = math.sqrt(0.5)  # sigma 4 is half way from 8 to 2 in the logarithm
    wanted = [[half, 0.0, half], [0.5, 0.5, half], [0.0, half, half]]
    close(combined.sites["b"].directions[:, 0], torch.tensor(wanted))


def test_what_is_interpolated_is_every_statistic():
    """At sigma 2.83, a quarter of the way from 2 to 8 in the logarithm."""
    sides = [vector([gap + 1.0, 1.0], [1.0, 1.0], spread=(gap, 0.0)).sites["b"] for gap in (8.0, 4.0)]
    steps = {name: torch.stack([t[0], sides[1].tensors()[name][0]]) for name, t in sides[0].tensors().items()}
    given = PathologyVector({"b": SiteDirections(**steps)}, torch.tensor(SIGMAS))
    site = on_schedule(given, torch.tensor([2 * 2**0.5]))["b"]
    close(site.gaps, 5.0)
    close(site.centres, [[3.5, 1.0]])
    close(site.spreads, [[5.0, 0.0]])
    close(site.projections[:, :, 0], [[6.0, 1.0]])


# Overlap


def test_the_overlap_is_the_cosine_and_says_where_it_is_largest():
    a = random_vector(0, sites=("b", "c"))
    b = random_vector(1, sites=("b", "c"))
    cosines = torch.stack([(a.sites[n].directions * b.sites[n].directions).sum(dim=(1, 2)).abs() for n in "bc"])
    found = overlap(a, b)
    assert found.mean == pytest.approx(float(cosines.mean()), abs=1e-6)
    assert found.largest == pytest.approx(float(cosines.max()), abs=1e-6)
    place = divmod(int(cosines.argmax()), 3)
    assert (found.site, found.sigma) == ("bc"[place[0]], [8.0, 4.0, 2.0][place[1]])


def test_the_overlap_of_subspaces_is_the_cosine_of_their_least_angle():
    b = vector([1.0, 1.0, 0.0], NONE)
    both = joint_subspace([vector([1.0, 0.0, 0.0], NONE), vector([0.0, 0.0, 1.0], NONE)])
    assert overlap(both, b).largest == pytest.approx(math.sqrt(0.5), abs=1e-6)
    assert overlap(both, vector([1.0, 0.0, 1.0], NONE)).largest == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("angle,told", [(59.0, True), (61.0, False), (121.0, True), (119.0, False)])
@pytest.mark.parametrize("how", HOW)
def test_an_overlap_beyond_a_half_is_told(how, angle, told):
    turned = [math.cos(math.radians(angle)), math.sin(math.radians(angle)), 0.0]
    combined = combine(vector([1.0, 0.0, 0.0], NONE), vector(turned, NONE), how)
    (found,) = combined.provenance["combined"]["overlap"]
    cosine = abs(math.cos(math.radians(angle)))
    assert found["mean"] == pytest.approx(cosine, abs=1e-4) and found["max"] == pytest.approx(cosine, abs=1e-4)
    assert (found["site"], found["reported"]) == ("b", told)
    assert ("Warning: they overlap" in describe_combined(combined)) == told
    assert f"{cosine:.2f} on average, at most {cosine:.2f} at b, sigma" in describe_combined(combined)


# As a value


@pytest.mark.parametrize("how", HOW)
def test_a_combined_vector_is_saved_and_says_what_it_is_made_of(how, tmp_path):
    a = vector(X3, [0.5, 0.5, 0.0], texts=("dyed lifted polyps", "polyps"), seed=3)
    b = vector(Y4, [0.0, 0.5, 1.0], texts=("polyps", "normal cecum"))
    combined = combine(a, b, how)
    back = load(save(combined, tmp_path / "v.safetensors"))
    assert back.content_hash() == combined.content_hash() and is_combined(back) and not is_combined(a)
    made = back.provenance["combined"]
    assert made["how"] == how and back.provenance["model"] == MODEL
    assert [part["hash"] for part in made["parts"]] == [a.content_hash(), b.content_hash()]
    assert made["parts"][0]["provenance"]["seed"] == 3
    assert "(dyed lifted polyps - polyps)" in describe_combined(back)
    assert "(polyps - normal cecum)" in label(back)


def test_the_parts_stay_as_they_were():
    a, b = random_vector(0), random_vector(1)
    before = a.content_hash(), b.content_hash()
    for how in HOW:
        combine(a, b, how, 0.5, 2.0)
    assert (a.content_hash(), b.content_hash()) == before


# What does not go together


@pytest.mark.parametrize("how", HOW)
def test_vectors_of_different_models_are_refused_by_name(how):
    a = random_vector(0)
    with pytest.raises(MedSteerError, match=r"different sites \(2 and 1; not in both: b.1\)"):
        combine(a, random_vector(1, sites=("b.0",)), how)
    with pytest.raises(MedSteerError, match="Site 'b.0' has 12 channels in vector a and 8 in vector b"):
        combine(a, random_vector(1, channels=8), how)
    with pytest.raises(MedSteerError, match="fingerprints differ in weights"):
        combine(a, random_vector(1, model={**MODEL, "weights": "bb"}), how)
    with pytest.raises(MedSteerError, match=r"fingerprints differ in patches \(patches are LoRAs\)"):
        combine(a, random_vector(1, model={**MODEL, "patches": "cc"}), how)
    b = random_vector(1)
    with pytest.raises(MedSteerError, match="Vector a comes from a diffusion model and b from a flow model"):
        combine(a, PathologyVector(b.sites, b.sigmas, b.provenance, flow=True), how)


@pytest.mark.parametrize("how", ["add", "subtract", "average"])
def test_sums_of_several_directions_or_readers_have_no_meaning(how):
    plain, wide, reading = random_vector(0), random_vector(1, rank=2), random_vector(2, readers=True)
    for pair, said in (
        ((wide, plain), "a has rank 2"),
        ((plain, wide), "b has rank 2"),
        ((reading, plain), "a has read"),
    ):
        with pytest.raises(MedSteerError, match=f"'{how}' takes one direction a step, and vector {said}"):
            combine(*pair, how)


def test_only_a_must_be_one_direction_to_be_orthogonalised():
    with pytest.raises(MedSteerError, match="vector a has rank 2"):
        orthogonalise(random_vector(0, rank=2), random_vector(1))
    with pytest.raises(MedSteerError, match="vector a has readers"):
        orthogonalise(random_vector(0, readers=True), random_vector(1))


def test_weights_and_ways_that_are_none_are_refused():
    a, b = random_vector(0), random_vector(1)
    with pytest.raises(MedSteerError, match="weight of a vector is nan; a finite number"):
        add(a, b, float("nan"))
    with pytest.raises(MedSteerError, match="weights of an average are 1 and 0; above 0"):
        average(a, b, 1.0, 0.0)
    with pytest.raises(MedSteerError, match="how is 'multiply'; one of add, subtract, average, orthogonalise"):
        combine(a, b, "multiply")
