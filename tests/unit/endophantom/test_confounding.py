"""Anatomy that leans with the class: how far, and that nothing else changes."""

import pytest
import torch

from medsteer_core.endophantom import confounding
from medsteer_core.endophantom.anatomy import Anatomy, scene_seeds, uniform_draws
from medsteer_core.endophantom.phantom import CLASSES
from medsteer_core.endophantom.train import data

N = 6000
LABELS = torch.randint(0, 8, (N,), generator=torch.Generator().manual_seed(3))


def test_any_two_classes_lean_differently_in_four_of_seven_factors():
    ways = confounding.exponents(0.5) > 1
    assert ways.shape == (len(CLASSES), len(confounding.FACTORS)) == (8, 7)
    different = (ways[:, None] != ways[None]).sum(2)
    assert (different[~torch.eye(8, dtype=torch.bool)] == 4).all()


def test_without_confounding_the_anatomy_is_what_it_was():
    plain, labelled = Anatomy.sample(20, 5), Anatomy.sample(20, 5, LABELS[:20], 0.0)
    for name, value in plain.factors().items():
        assert torch.equal(value, labelled.factors()[name]), name


def test_confounding_moves_the_seven_factors_and_what_is_placed_by_them_alone():
    plain, leaning = Anatomy.sample(200, 5).factors(), Anatomy.sample(200, 5, LABELS[:200], 0.5).factors()
    moved = {name for name in plain if not torch.equal(plain[name], leaning[name])}
    wanted = {"lumen_centre_x", "lumen_centre_y", "lumen_radius", "hue", "saturation", "gain", "light_x"}
    assert moved == wanted | {"site_angle", "site_distance"}


def test_every_anatomy_stays_possible_in_every_class():
    hue = Anatomy.sample(N, 6, LABELS, 0.5).hue
    for label in range(8):
        own = hue[LABELS == label]
        assert own.min() < 0.1 and own.max() > 0.9


def area(strength):
    draws = confounding.lean(uniform_draws(scene_seeds(N, 7)), LABELS, strength)
    return confounding.auroc_by_class(draws, LABELS, strength)


def test_at_a_half_anatomy_tells_the_class_with_an_auroc_of_about_085():
    assert float(area(0.5).mean()) == pytest.approx(0.85, abs=0.03)
    assert ((area(0.5) - 0.86).abs() < 0.05).all()


def test_the_auroc_grows_with_the_strength_from_chance():
    means = [float(area(strength).mean()) for strength in (0.001, 0.2, 0.4, 0.6)]
    assert means == sorted(means) and means[0] == pytest.approx(0.5, abs=0.04)


def test_the_exact_likelihoods_are_as_good_as_a_trained_probe():
    draws = confounding.lean(uniform_draws(scene_seeds(N, 8)), LABELS, 0.5)
    logs = torch.stack([draws[name][:, place].clamp_min(1e-6).log() for name, place in confounding.FACTORS], 1)
    features, truth = torch.cat([logs, torch.ones(N, 1)], 1), torch.nn.functional.one_hot(LABELS, 8).float()
    half = N // 2
    weights = torch.linalg.lstsq(features[:half], truth[:half]).solution
    probe = (features[half:] @ weights).argmax(1) == LABELS[half:]
    exact = confounding.class_log_likelihoods(draws, 0.5)[half:].argmax(1) == LABELS[half:]
    assert exact.float().mean() >= probe.float().mean() - 0.01


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"labels of shape \(3,\), got None"):
        Anatomy.sample(3, 1, confounding=0.5)
    with pytest.raises(ValueError, match=r"got \(2,\)"):
        Anatomy.sample(3, 1, LABELS[:2], 0.5)


def test_the_command_prints_every_class_and_the_mean(capsys):
    areas = data.print_confounding(0.5, n=2000)
    out = capsys.readouterr().out
    assert all(name in out for name in CLASSES)
    assert f"AUROC {float(areas.mean()):.3f}" in out
