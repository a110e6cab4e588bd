"""Training and measuring the judges at toy size. How well the trained ones judge stands in the bundle's recipe."""

import math
from dataclasses import replace

import pytest
import torch

from medsteer_core.endophantom.judges import FACTORS, Classifier, Distance, Judges, Regressor, Segmenter
from medsteer_core.endophantom.phantom import CLASSES, Anatomy
from medsteer_core.endophantom.train import distance, files, held_out, judges, regressor


def gaussians(n, features=16, seed=0, decades=1.0):
    """Features of eight classes with one covariance, whose deviations run from 0.1 to 10, and their classes."""
    draw = torch.Generator().manual_seed(7)
    mix = torch.linalg.qr(torch.randn(features, features, generator=draw))[0]
    mix = torch.logspace(-decades, decades, features)[:, None] * mix
    means = 20 * torch.randn(len(CLASSES), features, generator=draw)
    draw.manual_seed(seed)
    labels = torch.arange(n) % len(CLASSES)
    return means[labels] + torch.randn(n, features, generator=draw) @ mix, labels, means, mix


def fitted(n=4000):
    out = distance.fit(*gaussians(n, seed=1)[:2])
    distance.set_limit(out, gaussians(n, seed=2)[0])
    return out


def test_one_in_a_hundred_held_out_features_lies_beyond_the_limit():
    beyond = (fitted()(gaussians(20_000, seed=3)[0]) > 1).float().mean()
    assert 0.006 < float(beyond) < 0.015


def test_features_are_far_in_deviations_and_not_in_absolute_terms():
    out, (_, _, means, mix) = fitted(), gaussians(8)
    direction = mix / mix.norm(dim=1, keepdim=True)  # rows: deviations 0.1 to 10
    assert float(out((means[0] + 2.0 * direction[0])[None])) > 2  # twenty deviations
    assert float(out((means[0] + 2.0 * direction[-1])[None])) < 0.1  # a fifth of one


def test_the_fitted_whitening_makes_the_classes_covariance_the_identity():
    features, labels, means, _ = gaussians(8000, seed=1, decades=0.3)
    white = (features - means[labels]) @ distance.fit(features, labels).whitening
    torch.testing.assert_close(white.T @ white / len(white), torch.eye(16), atol=0.06, rtol=0)


def test_fewer_renders_than_features_still_give_a_distance():
    features, labels, _, _ = gaussians(40, features=64, seed=1)
    away = distance.fit(features, labels)(gaussians(200, features=64, seed=2)[0])
    assert away.isfinite().all() and float(away.max()) < 100


def test_a_class_without_renders_is_refused():
    with pytest.raises(ValueError, match="two renders of each class"):
        distance.fit(torch.randn(20, 4), torch.zeros(20, dtype=torch.long))


def test_a_mirror_turns_what_has_a_side_and_nothing_else():
    scene = Anatomy.sample(4, seed=3)
    turned = torch.tensor([-1.0, 1.0])
    mirror = replace(
        scene, lumen_centre=scene.lumen_centre * turned, light=scene.light * turned, roll=math.pi - scene.roll
    )
    torch.testing.assert_close(regressor.mirrored(regressor.targets(scene)), regressor.targets(mirror))


def test_spoiling_leaves_colour_and_brightness_and_changes_every_image():
    images = regressor.pool(64, 5)[0][:24, 0].float() / 255
    out = regressor.spoil(images, torch.Generator().manual_seed(2))
    assert out.shape == images.shape and 0 <= float(out.min()) and float(out.max()) <= 1
    torch.testing.assert_close(out.mean((2, 3)), images.mean((2, 3)), atol=0.012, rtol=0)
    assert ((out - images).abs().mean((1, 2, 3)) > 1e-4).all()


def test_training_the_regressor_resumes_and_learns_where_the_lumen_is(tmp_path, capsys):
    def train(steps):
        regressor.run(tmp_path, steps, batch=8, scenes=256, measured=64)
        return capsys.readouterr().out, regressor.load(tmp_path / "regressor.pt")

    half, saved = train(30)
    assert saved["step"] == 30 and "step 30/30" in half
    whole, saved = train(80)
    assert saved["step"] == 80 and "step 80/80" in whole
    assert train(80)[0] == ""
    model = Regressor()
    model.load_state_dict(saved["model"])
    share = model.error / model.spread
    assert float(share[FACTORS.index("lumen_centre_x")]) < 0.65
    assert {"lumen_centre_x", "lumen_centre_y"} <= set(model.factors)
    roll = FACTORS.index("roll_sin3")
    assert not model.kept[roll] and "roll_sin3" not in model.factors


def test_the_pool_shows_each_scene_as_two_classes_of_one_organ():
    images, factors = regressor.pool(64, 5)
    assert images.shape == (64, 2, 3, 64, 64) and factors.shape == (64, len(FACTORS))
    apart = (images[:, 0].float() - images[:, 1].float()).abs().mean((1, 2, 3)) / 255
    strangers = (images[:, 0].float() - images[:, 0].roll(1, 0).float()).abs().mean((1, 2, 3)) / 255
    assert float(apart.max()) > 0.02  # another finding
    assert float(apart.mean()) < 0.4 * float(strangers.mean())  # on the same wall


def test_a_factor_is_kept_if_half_of_its_variance_is_told():
    class Told(Regressor):
        def forward(self, images):
            return answers

    draw = torch.Generator().manual_seed(0)
    truth = 3 * torch.randn(256, len(FACTORS), generator=draw)
    wrong = torch.linspace(0.3, 6.0, len(FACTORS)) * torch.randn(truth.shape, generator=draw)
    answers, model = truth + wrong, Told()
    explained = regressor.measure(model, torch.zeros(256, 3, 1, 1, dtype=torch.uint8), truth)
    torch.testing.assert_close(model.error, wrong.square().mean(0).sqrt())
    assert torch.equal(model.kept, explained >= 0.5)
    assert model.kept[0] and not model.kept[-1]
    assert float(explained[0]) == pytest.approx(0.99, abs=0.005)


class Through:
    """An autoencoder that loses nothing but the ``shade`` it multiplies with."""

    def __init__(self, shade):
        self.shade = shade

    def encode(self, images):
        return (images + 1) / 2

    def decode(self, latents):
        return latents * self.shade * 2 - 1


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    classifier = Classifier()
    return Judges(classifier, Segmenter(), Regressor(), Distance(classifier.head.in_features))


def test_every_judge_is_measured_on_renders_and_through_the_autoencoder(untrained):
    numbers = held_out.held_out(untrained, Through(1.0), n=64)
    ways = {key.split(": ")[0] for key in numbers}
    assert ways == {"renders", "through the autoencoder"}
    for what in ("accuracy", "nonsense rejected", "Dice of polyp", "RMSE of hue", "R2 of roll_sin3"):
        # nothing is lost on this way, so nothing changes (but for the last bit of a pixel)
        assert numbers[f"through the autoencoder: {what}"] == pytest.approx(numbers[f"renders: {what}"], abs=2e-3)
    assert numbers["renders: nonsense over the limit"] == 1.0  # the limit of an unfitted distance is 1
    dark = held_out.held_out(untrained, Through(0.1), n=64)
    assert dark["renders: RMSE of gain"] == numbers["renders: RMSE of gain"]
    assert dark["through the autoencoder: RMSE of gain"] != pytest.approx(numbers["renders: RMSE of gain"], abs=1e-3)


def test_the_trained_judges_of_a_run_come_from_its_three_files(untrained, tmp_path):
    nets = {"classifier": untrained.classifier.state_dict(), "segmenter": untrained.segmenter.state_dict()}
    files.save_atomic({"step": 7, **nets}, tmp_path / "judges.pt")
    files.save_atomic({"step": 8, "model": untrained.regressor.state_dict()}, tmp_path / "regressor.pt")
    files.save_atomic({"renders": 9, "model": untrained.distance.state_dict()}, tmp_path / "distance.pt")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loaded, known = judges.load_trained(tmp_path)(images), untrained(images)
    assert torch.equal(loaded.probabilities, known.probabilities) and torch.equal(loaded.masks, known.masks)
    assert torch.equal(loaded.distances, known.distances) and torch.equal(loaded.anatomy, known.anatomy)
    assert judges.steps(tmp_path) == {"steps": 7, "regressor_steps": 8, "distance_renders": 9}


def test_judges_cannot_be_measured_without_a_decoder(tmp_path):
    with pytest.raises(FileNotFoundError, match="run `decoder` first"):
        judges.run(tmp_path, 1)
