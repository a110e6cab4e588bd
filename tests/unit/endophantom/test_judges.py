"""The judges: what goes in and what comes out. How well they judge is measured where they are trained."""

import pytest
import torch

from medsteer_core.endophantom.judges import (
    FACTORS,
    LABELS,
    NONE,
    SIZE,
    Classifier,
    Distance,
    Judges,
    Regressor,
    Segmenter,
    Verdict,
    resize,
)
from medsteer_core.endophantom.phantom import CLASSES, FINDINGS, Anatomy


@pytest.fixture(scope="module")
def judges():
    torch.manual_seed(0)
    classifier = Classifier()
    return Judges(classifier, Segmenter(), Regressor(), Distance(classifier.head.in_features))


def pictures(count, height, width, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_there_is_a_label_for_each_class_and_one_for_none_of_these():
    assert LABELS == (*CLASSES, "none of these")
    assert NONE not in CLASSES


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (40, 96), (512, 384)])
def test_masks_come_back_at_the_size_of_the_images(judges, size):
    verdict = judges(pictures(2, *size))
    assert verdict.probabilities.shape == (2, 9)
    assert verdict.masks.shape == (2, len(FINDINGS), *size)
    assert verdict.masks.dtype == torch.bool
    assert verdict.distances.shape == (2,)
    assert verdict.anatomy.shape == (2, len(judges.factors))


def test_probabilities_add_up_to_one(judges):
    torch.testing.assert_close(judges(pictures(3, 64, 64)).probabilities.sum(1), torch.ones(3))


def test_an_image_is_judged_alike_alone_and_in_a_batch(judges):
    images = pictures(3, 96, 96)
    together, alone = judges(images), judges(images[1:2])
    torch.testing.assert_close(together.probabilities[1:2], alone.probabilities, atol=1e-5, rtol=1e-5)
    assert (together.masks[1:2] != alone.masks).float().mean() < 1e-3
    torch.testing.assert_close(together.distances[1:2], alone.distances, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.anatomy[1:2], alone.anatomy, atol=1e-5, rtol=1e-4)


def test_values_beyond_the_range_count_as_its_ends(judges):
    images = pictures(1, 64, 64)
    beyond = images.where(images > 0.5, -0.2)
    torch.testing.assert_close(judges(beyond).probabilities, judges(beyond.clamp(0, 1)).probabilities)


def test_nothing_that_the_judges_return_tracks_gradients(judges):
    assert any(weight.requires_grad for weight in judges.classifier.parameters())
    verdict = judges(pictures(1, 64, 64).requires_grad_())
    for answer in (verdict.probabilities, verdict.distances, verdict.anatomy):
        assert not answer.requires_grad


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 64, 64, 3), (1, 4, 64, 64), (1, 1, 3, 64, 64)])
def test_a_wrong_shape_is_refused_with_both_shapes(judges, shape):
    with pytest.raises(ValueError) as error:
        judges(torch.zeros(shape))
    assert "(batch, 3, height, width)" in str(error.value)
    assert str(shape) in str(error.value)


def test_a_verdict_is_read_by_name():
    probabilities = torch.zeros(2, len(LABELS))
    probabilities[0, LABELS.index("polyps")] = 0.75
    probabilities[0, LABELS.index("normal cecum")] = 0.25
    probabilities[1, LABELS.index(NONE)] = 1.0
    masks = torch.zeros(2, len(FINDINGS), 8, 8, dtype=torch.bool)
    masks[0, FINDINGS.index("dye"), 2, 3] = True
    verdict = Verdict(probabilities, masks, torch.tensor([0.5, 1.5]), torch.zeros(2, 3))
    assert verdict.labels == ["polyps", "none of these"]
    assert verdict.probability("normal cecum").tolist() == [0.25, 0.0]
    assert verdict.mask("dye").nonzero().tolist() == [[0, 2, 3]]
    assert not verdict.mask("polyp").any()


def test_a_verdict_has_no_label_beyond_the_list():
    verdict = Verdict(
        torch.zeros(1, len(LABELS)), torch.zeros(1, len(FINDINGS), 8, 8), torch.zeros(1), torch.zeros(1, 3)
    )
    with pytest.raises(ValueError, match="tuple.index"):
        verdict.probability("appendix")


def test_resizing_keeps_the_mean_and_does_not_alias():
    stripes = torch.zeros(1, 3, 256, 256)
    stripes[..., ::2] = 1.0
    small = resize(stripes)
    assert small.shape == (1, 3, SIZE, SIZE)
    inner = small[..., 1:-1]
    torch.testing.assert_close(inner, torch.full_like(inner, 0.5), atol=1e-4, rtol=0)


def test_an_image_of_the_judges_size_is_not_touched():
    image = pictures(1, SIZE, SIZE)
    assert resize(image) is image


def test_every_factor_is_one_of_the_anatomys_and_none_is_the_findings_own():
    known = set(Anatomy.sample(1, seed=0).factors()) | {"roll_sin3", "roll_cos3"}
    assert len(set(FACTORS)) == len(FACTORS)
    assert set(FACTORS) <= known
    assert known - set(FACTORS) == {"roll", "site_angle", "site_distance", "site_size", "finding_tint"}


def test_anatomy_comes_in_units_of_the_regressors_error_and_without_what_it_cannot_tell():
    torch.manual_seed(0)
    regressor, images = Regressor().eval(), pictures(2, SIZE, SIZE)
    with torch.no_grad():
        own_units = regressor(images)
        regressor.error.fill_(0.5)
        regressor.error[FACTORS.index("hue")] = 0.1
        regressor.kept.fill_(False)
        regressor.kept[[FACTORS.index("hue"), FACTORS.index("gain")]] = True
        anatomy = regressor.in_errors(images)
    assert regressor.factors == ("hue", "gain")
    torch.testing.assert_close(anatomy[:, 0], own_units[:, FACTORS.index("hue")] * 10)
    torch.testing.assert_close(anatomy[:, 1], own_units[:, FACTORS.index("gain")] * 2)


def test_a_regressor_answers_in_the_factors_own_units():
    torch.manual_seed(0)
    regressor, images = Regressor().eval(), pictures(2, SIZE, SIZE)
    with torch.no_grad():
        standardised = regressor(images)
        regressor.mean.fill_(3.0)
        regressor.spread.fill_(0.25)
        torch.testing.assert_close(regressor(images), standardised * 0.25 + 3.0)


def test_what_a_regressor_keeps_survives_storage_as_floats():
    trained, loaded = Regressor(), Regressor()
    trained.kept[3:] = False
    loaded.load_state_dict({key: value.float() for key, value in trained.state_dict().items()})
    assert loaded.factors == FACTORS[:3]
    assert loaded.kept.dtype == torch.bool


def test_a_regressor_sees_where_things_are():
    torch.manual_seed(0)
    image = pictures(1, SIZE, SIZE)
    here, there = image.clone(), image.clone()
    here[..., 8:24, 8:24], there[..., 40:56, 40:56] = 1.0, 1.0
    with torch.no_grad():
        answers = Regressor()(torch.cat([here, there]))
    assert (answers[0] - answers[1]).abs().max() > 0.01


def test_a_distance_is_to_the_nearest_class_in_units_of_the_limit():
    distance = Distance(features=2, classes=2)
    distance.means.copy_(torch.tensor([[0.0, 0.0], [10.0, 0.0]]))
    distance.whitening.copy_(torch.diag(torch.tensor([1.0, 0.5])))  # the second feature has a deviation of 2
    distance.limit.fill_(4.0)
    points = torch.tensor([[0.0, 0.0], [4.0, 0.0], [9.0, 0.0], [0.0, 16.0], [5.0, 0.0]])
    torch.testing.assert_close(distance(points), torch.tensor([0.0, 1.0, 0.25, 2.0, 1.25]))


def test_the_distance_is_of_the_classifiers_features(judges):
    images = pictures(2, SIZE, SIZE)
    with torch.no_grad():
        expected = judges.classifier.features(images).norm(dim=1)  # an unfitted distance: all means 0, no whitening
    torch.testing.assert_close(judges(images).distances, expected, atol=1e-4, rtol=1e-4)
