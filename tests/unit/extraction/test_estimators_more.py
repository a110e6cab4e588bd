"""The estimators from recorded samples, on activations with a known direction."""

import pytest
import torch
from torch.nn import functional as F

from medsteer_core.errors import MedSteerError
from medsteer_core.extraction import estimators
from medsteer_core.extraction.axes import discriminant_axis, mean_axis, principal_axis
from medsteer_core.extraction.sample_estimators import ESTIMATORS, estimate, leace
from medsteer_core.extraction.samples_record import SampleRecord
from medsteer_core.extraction.separability import auroc
from medsteer_core.extraction.shrinkage import inverse_times, shrinkage
from medsteer_core.steering.operators import Affine
from medsteer_core.vectors.file import load, save

SIGMAS = (8.0, 2.0)


def record(values, first=0):
    """A record of the site 'b' from (n, S, C)."""
    levels = torch.linspace(8.0, 2.0, values.shape[1])
    return SampleRecord({"b": values.float()}, levels, torch.arange(first, first + len(values)))


def planted(count=64, channels=64, gap=4.0, noise=0.3, shared=0.0, seed=0, scale=None):
    """(direction (S, C), present, absent): samples `gap` apart along the direction, with white noise.

    `shared` is noise that the two samples of a pair have in common; `scale` (C,) makes the noise anisotropic.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    direction = F.normalize(draw(2, channels), dim=-1)
    common, pairs = 10 * draw(channels), shared * draw(count, 2, channels)
    scale = torch.ones(channels, dtype=torch.float64) if scale is None else scale
    sides = [
        common + pairs + sign * gap / 2 * direction + noise * scale * draw(count, 2, channels) for sign in (1.0, -1.0)
    ]
    return direction, *map(record, sides)


def cosines(vector, direction):
    return (vector.sites["b"].directions[:, 0].double() * direction).sum(dim=-1)


# A known direction


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("count", [32, 200], ids=["fewer samples than channels", "more"])
def test_a_planted_direction_is_found_in_noise_of_a_twentieth_of_the_gap_in_every_channel(name, count):
    """Noise 0.3 in each of 64 channels, together 2.4, against a gap of 6."""
    direction, present, absent = planted(count, gap=6.0)
    vector = estimate(name, present, absent, {"seed": 1})
    assert cosines(vector, direction).min() > 0.99
    torch.testing.assert_close(vector.sites["b"].gaps, torch.full((2, 1), 6.0), rtol=0.05, atol=0)
    assert vector.provenance["estimator"] == name and vector.provenance["seed"] == 1
    assert vector.provenance["observations"] == {"present": count, "absent": count}


def test_the_mean_difference_of_records_is_that_of_running_means():
    _, present, absent = planted()
    ours = estimate("mean_difference", present, absent, {})
    streamed = estimators.mean_difference(present.statistics(), absent.statistics(), {})
    for name, tensor in ours.sites["b"].tensors().items():
        torch.testing.assert_close(tensor, streamed.sites["b"].tensors()[name], rtol=1e-6, atol=1e-6)


def test_the_paired_differences_mean_is_the_mean_difference_and_tells_what_pairs_gain():
    _, present, absent = planted(shared=3.0)
    paired, plain = (estimate(name, present, absent, {}) for name in ("paired_difference", "mean_difference"))
    torch.testing.assert_close(paired.sites["b"].directions, plain.sites["b"].directions, rtol=0, atol=1e-6)
    torch.testing.assert_close(paired.sites["b"].gaps, plain.sites["b"].gaps)
    # Common noise cancels in pairs: what is left is 0.3 * sqrt(2) in 64 channels, 0.85 gaps; a class's spread is 24.
    assert paired.provenance["pair_spread"]["b"] == pytest.approx([0.3 * 2**0.5 * 8 / 4] * 2, rel=0.05)
    assert paired.sites["b"].spreads.min() > 20
    assert "pair_spread" not in plain.provenance


def test_class_statistics_are_along_the_estimators_own_direction():
    _, present, absent = planted(scale=torch.linspace(0.1, 3.0, 64).double())
    for name in ("principal_component", "lda", "leace"):
        site = estimate(name, present, absent, {}).sites["b"]
        means = torch.stack([p.sites["b"].double().mean(dim=0) for p in (present, absent)], dim=1)
        wanted = (means * site.directions.double()).sum(dim=-1, keepdim=True)
        torch.testing.assert_close(site.projections.double(), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(site.projections[:, 0] - site.projections[:, 1], site.gaps, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(site.centres.double(), means.mean(dim=1), rtol=1e-6, atol=1e-6)
        assert (site.gaps > 0).all()


# Each by itself


@pytest.mark.parametrize("channels", [3, 12])
def test_the_principal_axis_is_the_first_right_singular_vector_signed_by_the_mean(channels):
    generator = torch.Generator().manual_seed(0)
    absent = torch.randn(6, 2, channels, generator=generator, dtype=torch.float64)
    present = absent + torch.randn(6, 2, channels, generator=generator, dtype=torch.float64) + 0.3
    axes = principal_axis(present, absent)
    for step in range(2):
        difference = (present - absent)[:, step]
        first = torch.linalg.svd(difference).Vh[0]
        assert (first @ axes[step]).abs() > 1 - 1e-9 and (difference.mean(dim=0) @ axes[step]) > 0


def test_the_principal_axis_is_not_centred_and_follows_what_pairs_share():
    """Differences of -5 along x with 3, -3, 0 along y: the first axis is -x; about their mean it would be y."""
    differences = torch.tensor([[-5.0, 3.0], [-5.0, -3.0], [-5.0, 0.0]], dtype=torch.float64)[:, None]
    axis = principal_axis(differences, torch.zeros_like(differences))[0]
    torch.testing.assert_close(axis, torch.tensor([-1.0, 0.0], dtype=torch.float64))


def test_lda_reads_little_where_the_classes_vary():
    """Two channels, equal differences, variances 100 and 1: the discriminant is (1, 100) and so nearly the second."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4000, 1, 2, generator=generator, dtype=torch.float64) * torch.tensor([10.0, 1.0]).double()
    present, absent = noise[0] + 1.0, noise[1] - 1.0
    axis = discriminant_axis(present, absent)[0]
    assert axis[1] / axis[0] == pytest.approx(100, rel=0.25)
    assert mean_axis(present, absent)[0, 0] > 0.5


def test_lda_separates_unseen_anisotropic_samples_better_than_the_mean_difference():
    scale = torch.ones(64, dtype=torch.float64)
    scale[:8] = 20.0
    _, present, absent = planted(300, noise=1.0, scale=scale, gap=4.0)
    p, a = present.sites["b"].double(), absent.sites["b"].double()
    scores = {}
    for axis in (mean_axis, discriminant_axis):
        d = axis(p[:150], a[:150])
        scores[axis] = auroc(*(torch.einsum("nsc,sc->ns", side[150:], d) for side in (p, a))).min()
    assert scores[discriminant_axis] > 0.95 > scores[mean_axis] + 0.1


def test_samples_that_do_not_vary_give_the_mean_difference():
    present, absent = torch.zeros(3, 1, 4) + torch.tensor([3.0, 4.0, 0.0, 0.0]), torch.zeros(3, 1, 4)
    vector = estimate("lda", record(present), record(absent), {})
    torch.testing.assert_close(vector.sites["b"].directions[0, 0], torch.tensor([0.6, 0.8, 0.0, 0.0]))
    assert vector.provenance["shrinkage"] == 1.0


# Shrinkage


@pytest.mark.parametrize("rows,channels", [(20, 50), (50, 20)])
def test_shrinkage_is_ledoit_and_wolfs(rows, channels):
    """Their section 3.3 written out: the squared distances of x x' from S, over the one of S from mean * I."""
    x = torch.randn(rows, channels, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = (x - x.mean(dim=0)) * torch.linspace(0.5, 3.0, channels)
    s = x.mT @ x / rows
    far = (s - s.trace() / channels * torch.eye(channels)).square().sum()
    noise = sum((row[:, None] * row - s).square().sum() for row in x) / rows**2
    assert shrinkage(x) == pytest.approx(float(noise / far), rel=1e-9)


@pytest.mark.parametrize("rows,channels", [(20, 50), (50, 20)])
@pytest.mark.parametrize("shrunk", [1e-6, 0.3, 1.0])
def test_the_inverse_is_that_of_the_shrunk_covariance_in_both_forms(rows, channels, shrunk):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, channels, generator=generator, dtype=torch.float64)
    v = torch.randn(channels, generator=generator, dtype=torch.float64)
    s = x.mT @ x / rows
    wanted = torch.linalg.solve((1 - shrunk) * s + shrunk * s.trace() / channels * torch.eye(channels), v)
    torch.testing.assert_close(F.normalize(inverse_times(x, v, shrunk), dim=0), F.normalize(wanted, dim=0))


# LEACE


def anisotropic(count, seed, channels=16):
    """Two classes (count, C) of one covariance, whose variances differ by a factor of 400 and whose axes are turned."""
    generator = torch.Generator().manual_seed(99)
    turn = torch.linalg.qr(torch.randn(channels, channels, generator=generator, dtype=torch.float64)).Q
    shift = torch.randn(channels, generator=generator, dtype=torch.float64)
    generator.manual_seed(seed)
    noise = torch.randn(2, count, channels, generator=generator, dtype=torch.float64)
    noise = noise * torch.logspace(-0.7, 0.6, channels, dtype=torch.float64) @ turn
    return 5 + noise[0] + shift, 5 + noise[1] - shift


def erased(vector, samples, strength=1.0):
    """The samples (n, C) after `affine`."""
    return Affine(strength)(samples[:, None].float(), vector.at("b", 8.0))[:, 0].double()


def fitted(count=2000, anchor="mean", **options):
    present, absent = anisotropic(count, seed=1)
    return leace(record(present[:, None]), record(absent[:, None]), {}, anchor=anchor, **options)


def linear_auroc(present, absent):
    """AUROC on the second half of a linear classifier that was fitted to the first, whichever side it takes."""
    half = len(present) // 2
    d = discriminant_axis(present[:half, None], absent[:half, None])[0]
    return float(auroc((present[half:] @ d)[:, None], (absent[half:] @ d)[:, None]))


def test_leace_leaves_no_linear_classifier_anything_on_unseen_samples():
    unseen = anisotropic(4000, seed=2)
    assert linear_auroc(*unseen) > 0.95
    assert linear_auroc(*(erased(fitted(), side) for side in unseen)) == pytest.approx(0.5, abs=0.04)


def test_leace_makes_the_class_means_coincide_in_the_middle_of_both():
    vector = fitted(100)
    sides = anisotropic(100, seed=1)
    means = [erased(vector, side).mean(dim=0) for side in sides]
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(means[0], torch.cat(sides).mean(dim=0), rtol=0, atol=1e-5)


def test_leace_of_unequal_classes_keeps_the_mean_of_all_samples():
    present, absent = anisotropic(90, seed=1)
    absent = absent[:30]
    vector = leace(record(present[:, None]), record(absent[:, None]), {})
    everything = torch.cat([present, absent])
    after = erased(vector, everything)
    torch.testing.assert_close(after.mean(dim=0), everything.mean(dim=0), rtol=0, atol=1e-5)
    torch.testing.assert_close(after[:90].mean(dim=0), after[90:].mean(dim=0), rtol=0, atol=1e-5)


def test_leace_anchored_at_absent_leaves_the_absent_class_where_it_was():
    vector, sides = fitted(100, anchor="absent"), anisotropic(100, seed=1)
    means = [erased(vector, side).mean(dim=0) for side in sides]
    torch.testing.assert_close(means[0], sides[1].mean(dim=0), rtol=0, atol=1e-5)
    torch.testing.assert_close(means[1], sides[1].mean(dim=0), rtol=0, atol=1e-5)
    assert vector.provenance["anchor"] == "absent"


def test_leace_works_with_fewer_samples_than_channels():
    direction, present, absent = planted(12, channels=48)
    vector = leace(present, absent, {})
    assert vector.provenance["shrinkage"] > 0.5
    means = [erased(vector, side.sites["b"][:, 0]).mean(dim=0) for side in (present, absent)]
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=1e-4)


def test_leace_changes_the_activations_least_among_erasers():
    """Every eraser of rank one writes along the difference of the means and reads by some r with r.d = 1."""
    vector, sides = fitted(), anisotropic(2000, seed=1)
    everything = torch.cat(sides)
    site = vector.sites["b"]
    d, reader = site.directions[0, 0].double(), site.readers[0, 0].double()
    assert reader @ d == pytest.approx(1.0, abs=1e-5)

    def change(reads):
        return float(((everything - everything.mean(dim=0)) @ reads).square().mean())

    least = float((erased(vector, everything) - everything).square().sum(dim=-1).mean())
    assert least == pytest.approx(change(reader), rel=1e-3)
    assert change(d) > 1.3 * least  # the orthogonal projection
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        aside = torch.randn(16, generator=generator, dtype=torch.float64) * 0.1
        assert change(reader + aside - (aside @ d) * d) > least


def test_leace_writes_along_the_mean_difference_and_reads_by_the_discriminant():
    _, present, absent = planted(40)
    site = leace(present, absent, {}).sites["b"]
    values = present.sites["b"].double(), absent.sites["b"].double()
    torch.testing.assert_close(site.directions[:, 0].double(), mean_axis(*values), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        F.normalize(site.readers[:, 0].double(), dim=-1), discriminant_axis(*values), rtol=0, atol=1e-6
    )


def test_a_leace_vector_is_saved_and_loaded(tmp_path):
    vector = fitted(20)
    back = load(save(vector, tmp_path / "v.safetensors"))
    assert back.content_hash() == vector.content_hash() and back.has_readers


@pytest.mark.parametrize("rounding", [0.0, 2e-7])
def test_leace_does_nothing_at_a_step_without_difference(rounding):
    _, present, absent = planted(10)
    values = absent.sites["b"].clone()
    values[:, 1] = present.sites["b"][:, 1] * (1 + rounding)
    vector = leace(present, record(values), {})
    site = vector.sites["b"]
    assert vector.provenance["degenerate"] == 1 and site.gaps[1].item() == 0.0
    assert not site.readers[1].any() and not site.offsets[1].any() and site.readers[0].any()
    assert torch.equal(site.directions[1], site.directions[0])


# Edges


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_site_without_difference_is_left_out_and_none_at_all_is_an_error(name):
    _, present, absent = planted(10)
    same = present.sites["b"]
    both = [SampleRecord({"dead": same, "b": r.sites["b"]}, r.sigmas, r.samples) for r in (present, absent)]
    vector = estimate(name, *both, {})
    assert vector.site_names == ("b",) and vector.provenance["dropped_sites"] == ["dead"]
    with pytest.raises(MedSteerError, match="Give two different prompts"):
        estimate(name, present, present, {})


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_same_samples_give_the_same_vector(name):
    _, present, absent = planted(10)
    assert estimate(name, present, absent, {}).content_hash() == estimate(name, present, absent, {}).content_hash()


@pytest.mark.parametrize("name", ["paired_difference", "principal_component"])
def test_samples_that_are_no_pairs_are_refused_where_pairs_are_compared(name):
    _, present, absent = planted(10)
    with pytest.raises(MedSteerError, match="are not the same samples. Extract with noise 'paired'"):
        estimate(name, present, record(absent.sites["b"], first=10), {})
    with pytest.raises(MedSteerError, match="the 10 of present and 9 of absent"):
        estimate(name, present, record(absent.sites["b"][:9]), {})


def test_one_sample_each_does_for_pairs_and_not_for_a_covariance():
    direction, present, absent = planted(1, noise=0.01)
    for name in ("mean_difference", "paired_difference", "principal_component"):
        assert cosines(estimate(name, present, absent, {}), direction).min() > 0.99
    for name in ("lda", "leace"):
        with pytest.raises(MedSteerError, match="1 samples of present and 1 of absent; at least 2 of each"):
            estimate(name, present, absent, {})


def test_unknown_names_and_anchors_and_records_of_other_models_are_errors():
    _, present, absent = planted(4)
    with pytest.raises(MedSteerError, match="no estimator 'pca'; choose one of mean_difference, paired"):
        estimate("pca", present, absent, {})
    with pytest.raises(MedSteerError, match="anchor is 'present'; 'mean' or 'absent'"):
        leace(present, absent, {}, anchor="present")
    narrow = record(absent.sites["b"][..., :8])
    for name in ESTIMATORS:
        with pytest.raises(MedSteerError, match=r"Site 'b': the present prompt gave \(steps, channels\) \(2, 64\)"):
            estimate(name, present, narrow, {})
