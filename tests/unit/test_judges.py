"""The judges: what goes in and what comes out. How well they judge is measured where they are trained."""

import pytest
import torch

from medsteer_core.endophantom.judges import LABELS, NONE, SIZE, Classifier, Judges, Segmenter, Verdict, resize
from medsteer_core.endophantom.phantom import CLASSES, FINDINGS


@pytest.fixture(scope="module")
def judges():
    torch.manual_seed(0)
    return Judges(Classifier(), Segmenter())


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


def test_probabilities_add_up_to_one(judges):
    torch.testing.assert_close(judges(pictures(3, 64, 64)).probabilities.sum(1), torch.ones(3))


def test_an_image_is_judged_alike_alone_and_in_a_batch(judges):
    images = pictures(3, 96, 96)
    together, alone = judges(images), judges(images[1:2])
    torch.testing.assert_close(together.probabilities[1:2], alone.probabilities, atol=1e-5, rtol=1e-5)
    assert (together.masks[1:2] != alone.masks).float().mean() < 1e-3


def test_values_beyond_the_range_count_as_its_ends(judges):
    images = pictures(1, 64, 64)
    beyond = images.where(images > 0.5, -0.2)
    torch.testing.assert_close(judges(beyond).probabilities, judges(beyond.clamp(0, 1)).probabilities)


def test_nothing_that_the_judges_return_tracks_gradients(judges):
    assert any(weight.requires_grad for weight in judges.classifier.parameters())
    verdict = judges(pictures(1, 64, 64).requires_grad_())
    assert not verdict.probabilities.requires_grad


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
    verdict = Verdict(probabilities, masks)
    assert verdict.labels == ["polyps", "none of these"]
    assert verdict.probability("normal cecum").tolist() == [0.25, 0.0]
    assert verdict.mask("dye").nonzero().tolist() == [[0, 2, 3]]
    assert not verdict.mask("polyp").any()


def test_a_verdict_has_no_label_beyond_the_list():
    verdict = Verdict(torch.zeros(1, len(LABELS)), torch.zeros(1, len(FINDINGS), 8, 8))
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
