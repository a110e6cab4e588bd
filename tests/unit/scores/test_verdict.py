"""Did it work, in a sentence: what is told of pairs, and of what the judge can't tell."""

import pytest
import torch

from medsteer_core.endophantom.phantom import Anatomy, render
from medsteer_core.judges.judge import Answers, Terms
from medsteer_core.scores.scorer import embedded_judges, score_pair
from medsteer_core.scores.verdict import verdict


def renders(name, n=1, noise=1):
    return render(Anatomy.sample(n, 4), name, 128, noise_seed=noise).image


class Says:
    """A judge whose answers are given: labels by their place, and how far the images are."""

    terms = Terms(labels=("sick", "well"), classes=("sick", "well"))
    identity = "test"

    def __init__(self, labels, distances=None):
        self.answers = Answers(torch.eye(2)[labels], None, None if distances is None else torch.tensor(distances))

    def __call__(self, images):
        return self.answers


def random_pairs(n):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.full((n, 3, 32, 32), 0.5)


def test_a_flipped_pair_is_told_with_the_scorers_own_structure():
    pair = renders("polyps"), renders("normal cecum", noise=2)
    score = score_pair(pair[0][0], pair[1][0], "polyps", "normal cecum")
    expected = f"Polyps before, normal cecum after; SSIM outside the finding {score.ssim_outside:.3f}."
    assert score.flipped and verdict(*pair, embedded_judges()) == expected


def test_a_diffuse_finding_is_told_with_the_drift_of_the_anatomy():
    pair = renders("ulcerative colitis"), renders("normal cecum", noise=2)
    score = score_pair(pair[0][0], pair[1][0], "ulcerative colitis", "normal cecum")
    expected = f"Ulcerative colitis before, normal cecum after; anatomy drift {score.anatomy_drift:.2f}."
    assert verdict(*pair, embedded_judges()) == expected


def test_a_pair_that_did_not_flip_says_so():
    said = verdict(renders("polyps"), renders("polyps", noise=2), embedded_judges())
    assert said.startswith("Polyps before and after; SSIM outside the finding 0.9")
    assert "It did not work: the judge sees no change. Try another seed" in said


def test_a_pair_of_two_organs_is_told_to_have_changed_altogether():
    said = verdict(renders("polyps"), render(Anatomy.sample(1, 9), "normal pylorus", 128).image, embedded_judges())
    assert said.startswith("Polyps before, normal pylorus after; SSIM outside the finding 0.")
    assert said.endswith("or start later.") and "Much else changed: take prompts of one organ" in said
    assert "Much else" not in verdict(renders("polyps"), renders("normal cecum", noise=2), embedded_judges())


def test_what_overshot_is_not_told_to_be_made_stronger():
    a, b = random_pairs(1)
    said = verdict(a, b, Says([0, 0], [0.1, 3.0]))
    assert "did not work" not in said and "Try a lower strength" in said


def test_equal_images_are_told_before_any_judge_is_asked():
    image = renders("polyps")
    assert verdict(image, image.clone(), embedded_judges()).startswith("The counterfactual is the factual image")


def test_a_judge_that_does_not_know_such_images_has_no_say():
    noise, grey = random_pairs(1)
    said = verdict(noise, grey, embedded_judges())
    assert said.startswith(
        "This factual image is unlike anything that the judge was trained on, so that it has no say."
    )
    assert "before" not in said and "SSIM of the whole image" in said


def test_several_pairs_are_counted_by_what_became_of_them():
    a, b = random_pairs(4)
    judge = Says([0, 0, 0, 0, 1, 1, 0, 1], [0.1, 0.1, 0.1, 2.0, 0.1, 3.0, 0.1, 0.1])
    said = verdict(a, b, judge).splitlines()
    assert said[0].startswith("Sick before, well after: 2 of 3; sick before and after: 1 of 3; SSIM of the whole image")
    assert said[1].startswith("In 1 of 3 it did not work. Try another seed")
    assert (
        said[2]
        == "1 of 4 counterfactuals are unlike anything that the judge was trained on. Try a lower strength or cfg."
    )
    assert said[3].startswith("1 of 4 factual images are unlike anything")


@pytest.mark.parametrize("judge", [None, Says([0, 1])])
def test_without_marks_structure_is_told_outside_the_mask(judge):
    a = random_pairs(1)[0]
    b = a.clone()
    b[..., 20:, 20:] = 0.5
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[:, 20:, 20:] = True
    assert "SSIM outside the mask 1.000" in verdict(a, b, judge, mask)
    assert "SSIM of the whole image 0." in verdict(a, b, judge)
    assert "SSIM of the whole image 0." in verdict(a, b, judge, torch.ones_like(mask))
