"""What the downstream benchmark trains on, how it trains, and how it counts."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from benchmarks.evidence import _arms, _detectors, downstream
from benchmarks.evidence._arms import ARMS, COUNTERFACTUAL, NOTHING, REPROMPTED, TRUE, Generated, Labelled
from benchmarks.shared import bootstrap as _bootstrap
from benchmarks.shared.presets import OURS
from medsteer_core.endophantom.phantom import Anatomy, render

QUICK = _detectors.Recipe(steps=40, batch=8, learning_rate=3e-3, weight_decay=0.0)


def plain(level: int, n: int = 4) -> torch.Tensor:
    """Images of one grey level."""
    return torch.full((n, 3, 64, 64), level, dtype=torch.uint8)


def scattered(gain: float, seeds: int = 5, scenes: int = 60, seed: int = 0) -> np.ndarray:
    """Logits ``(seeds, 2 * scenes)``; ``gain`` is how far those with the finding stand above the others."""
    noise = np.random.default_rng(seed).normal(size=(seeds, 2 * scenes))
    return noise + gain * (np.arange(2 * scenes) < scenes)


def by_arm(**gains: float) -> dict:
    arms = dict(zip(("nothing", "reprompted", "counterfactual", "true"), ARMS, strict=True))
    return {name: {arms[key]: scattered(gain) for key, gain in gains.items()} for name in _detectors.NETWORKS}


def test_the_real_set_leans_as_the_classes_of_the_training_data_do():
    anatomy, names = _arms.real_anatomy(4000, 0, downstream.Design().confounding)
    polyps = torch.tensor([name == "polyps" for name in names])
    assert int(polyps.sum()) == 2000
    # a uniform number raised to exp(+-0.47) has the mean 1 / (1 + exp(+-0.47))
    assert float(anatomy.hue[polyps].mean()) == pytest.approx(0.385, abs=0.02)
    assert float(anatomy.hue[~polyps].mean()) == pytest.approx(0.615, abs=0.02)


def test_every_test_scene_is_seen_with_and_without_polyps_and_differs_nowhere_else():
    test = _arms.test_set(3)
    assert test.labels.tolist() == [1, 1, 1, 0, 0, 0]
    masks = render(Anatomy.sample(3, _arms.TEST_SEED), "polyps", 64).masks[:, 0:1]
    near = torch.nn.functional.max_pool2d(masks, 9, 1, 4) > 0
    change = (test.images[:3].float() - test.images[3:].float()).abs() / 255
    assert float(change.where(~near, 0).max()) < 0.06  # sensor noise
    assert all(float(change[i].where(near[i], 0).max()) > 0.1 for i in range(3))


def test_steering_is_ours_for_removing_a_finding_and_its_extraction_shares_no_noise():
    assert downstream.PAIR.name == "polyps -> normal cecum"
    assert downstream.PRESET == replace(OURS["removing"], lock="none")
    first, count = downstream.EXTRACTION_SEED, 2 * downstream.PRESET.samples
    assert not set(range(first, first + count)) & set(_arms.image_seeds(10_000, 0))


def test_true_pairs_lean_as_polyps_do_and_show_each_scene_twice():
    pairs = _arms.true_pairs(2, 0, 0.47)
    far = (pairs.images[:2].float() - pairs.images[2:].float()).abs().median()
    assert pairs.labels.tolist() == [1, 1, 0, 0] and float(far) <= 3


def test_training_seeds_share_no_scene_and_no_noise():
    scenes = [set(_arms.real_anatomy(50, seed, 0.47)[0].seed.tolist()) for seed in (0, 1)]
    assert not scenes[0] & scenes[1] and not set(_arms.image_seeds(100, 0)) & set(_arms.image_seeds(100, 1))


def test_arms_add_equally_many_images_with_and_without_polyps():
    made = Generated(plain(10), plain(20), plain(30))
    true = Labelled.of(plain(40), plain(50))
    assert _arms.added(NOTHING, made, true) is None
    levels = {}
    for arm in (REPROMPTED, COUNTERFACTUAL, TRUE):
        extra = _arms.added(arm, made, true)
        assert extra.labels.tolist() == [1] * 4 + [0] * 4, arm
        levels[arm] = [int(extra.images[0, 0, 0, 0]), int(extra.images[4, 0, 0, 0])]
    assert levels == {REPROMPTED: [10, 30], COUNTERFACTUAL: [10, 20], TRUE: [40, 50]}


def test_generated_images_are_made_once_for_one_setting(tmp_path):
    calls = []

    def make(seeds):
        calls.append(seeds)
        return Generated(plain(1, len(seeds)), plain(2, len(seeds)), plain(3, len(seeds)))

    first, new = _arms.generated(tmp_path, {"strength": 2.0}, 3, 1, make)
    again, second_time = _arms.generated(tmp_path, {"strength": 2.0}, 3, 1, make)
    assert (new, second_time) == (True, False) and torch.equal(first.reprompted, again.reprompted)
    _arms.generated(tmp_path, {"strength": 1.0}, 3, 1, make)
    assert calls == [[410_000, 410_001, 410_002]] * 2


@pytest.mark.parametrize("name", list(_detectors.NETWORKS))
def test_a_detector_learns_what_is_plain_and_the_same_seed_gives_the_same_detector(name):
    bright = torch.rand(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    bright[:8, :, 20:40, 20:40] += 1.0
    labels = torch.tensor([1] * 8 + [0] * 8)
    state = torch.get_rng_state()
    one, two = (_detectors.scores(_detectors.train(name, bright, labels, 3, QUICK), bright) for _ in range(2))
    assert torch.equal(one, two) and torch.equal(torch.get_rng_state(), state)
    assert float(one[:8].min()) > float(one[8:].max())


def test_augmentation_only_turns_images_upside_down():
    images = torch.rand(64, 3, 64, 64)
    out = _detectors.augmented(images, torch.Generator().manual_seed(0))
    upright = torch.tensor([torch.equal(a, b) for a, b in zip(out, images, strict=True)])
    turned = torch.tensor([torch.equal(a, b.flip(1)) for a, b in zip(out, images, strict=True)])
    assert bool((upright ^ turned).all()) and 16 < int(turned.sum()) < 48


def test_images_without_a_second_class_or_of_another_size_are_refused():
    with pytest.raises(ValueError, match="one class"):
        _detectors.train("CNN", plain(1).float(), torch.ones(4).long(), 0, QUICK)
    with pytest.raises(ValueError, match=r"expected \(n, 3, 64, 64\)"):
        _detectors.train("CNN", torch.zeros(4, 3, 32, 32), torch.ones(4).long(), 0, QUICK)


def test_a_training_is_taken_from_its_file_and_made_anew_for_other_images(tmp_path, monkeypatch):
    calls = []
    fake = SimpleNamespace(eval=lambda: None)
    monkeypatch.setattr(_detectors, "train", lambda *a: calls.append(a[0]) or fake)
    monkeypatch.setattr(_detectors, "scores", lambda network, images: torch.arange(len(images)).float())
    test = Labelled.of(plain(5), plain(6))
    for images in (Labelled.of(plain(1), plain(2)), Labelled.of(plain(1), plain(2)), Labelled.of(plain(1), plain(3))):
        one = downstream.tested(tmp_path, "CNN", TRUE, 0, QUICK, images, test)
        assert one["logits"] == list(range(8))
    assert len(calls) == 2 and len(list(tmp_path.glob("*.json"))) == 2 and not list(tmp_path.glob("*.part"))


def test_area_is_that_of_torchmetrics_and_keeps_the_order_of_confident_logits():
    logits = scattered(1.0, seeds=1)[0]
    labels = torch.tensor([1] * 60 + [0] * 60)
    wanted = float(binary_auroc(torch.from_numpy(logits).sigmoid(), labels))
    assert downstream.area(logits, labels) == pytest.approx(wanted, abs=1e-6)
    assert downstream.area([60.0, 50.0, 40.0, 30.0], torch.tensor([1, 1, 0, 0])) == 1.0


def test_the_bootstrap_of_every_seed_and_scene_once_is_the_plain_area():
    logits = scattered(1.0, seeds=2).round(1)  # with ties
    once = _bootstrap.Draws(np.ones((1, 2)), np.ones((1, 60)))
    labels = torch.tensor([1] * 60 + [0] * 60)
    wanted = np.mean([downstream.area(row, labels) for row in logits])
    assert _bootstrap.resampled_auroc(logits[:, :60], logits[:, 60:], once)[0] == pytest.approx(wanted, abs=1e-6)


def test_the_bootstrap_draws_a_scene_with_both_of_its_images():
    present, absent = np.array([[3.0, 0.0]]), np.array([[1.0, 2.0]])
    draws = _bootstrap.Draws(np.ones((2, 1)), np.array([[2.0, 0.0], [0.0, 2.0]]))
    assert _bootstrap.resampled_auroc(present, absent, draws).tolist() == [1.0, 0.0]


def test_a_better_arm_has_its_interval_above_zero_and_equal_arms_differ_by_nothing():
    logits = by_arm(nothing=0.5, reprompted=1.0, counterfactual=2.5, true=4.0)
    for arms in logits.values():
        arms[NOTHING] = arms[REPROMPTED]
    found = downstream.results(logits, torch.tensor([1] * 60 + [0] * 60))["detectors"]
    assert set(found) == {"CNN", "ViT", downstream.POOLED}
    for name in found:
        gains = found[name]["differences"]
        assert len(gains) == 6 and gains[downstream.KEY]["interval"][0] > 0.05, name
        assert gains[f"{REPROMPTED} - {NOTHING}"] == {"difference": 0.0, "interval": [0.0, 0.0]}


@pytest.mark.parametrize(("nothing", "true", "ok"), [(0.8, 5.0, True), (2.5, 5.0, False), (0.8, 1.5, False)])
def test_the_design_is_ok_only_with_room_below_and_a_high_ceiling(nothing, true, ok):
    logits = by_arm(nothing=nothing, reprompted=1.0, counterfactual=1.0, true=true)
    assert downstream.results(logits, torch.tensor([1] * 60 + [0] * 60))["design_ok"] is ok


def test_the_record_is_json_and_its_table_names_the_key_difference():
    record = {
        **downstream.results(
            by_arm(nothing=0.5, reprompted=1.0, counterfactual=2.0, true=4.0), torch.tensor([1] * 60 + [0] * 60)
        ),
        "design": {"real": 64, "images_added": 200, "test_scenes": 60},
        "seeds": {"training": [0, 1]},
    }
    shown = downstream.table(json.loads(json.dumps(record)))
    assert downstream.KEY in shown and f"{record['detectors']['CNN']['auc'][TRUE]['auc']:.3f}" in shown
    picture = downstream.plot(record, downstream.POOLED, downstream.KEY)
    assert picture.shape[0] == 3 and float(picture.min()) < 0.3 and float(picture.max()) == 1.0
