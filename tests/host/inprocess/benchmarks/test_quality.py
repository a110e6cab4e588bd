"""The quality benchmark in its reduced form: 8 pairs, polyps -> normal cecum, by the benchmark's own functions.

The thresholds must be able to fail: a flipped sign, a swapped pair and a dropped hook each make them.
The judges are EndoPhantom's own, so a flip is their opinion.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from benchmarks.evidence import quality
from benchmarks.evidence._methods import methods
from benchmarks.evidence._store import Store
from benchmarks.shared import presets as _presets
from benchmarks.shared.lab import Lab, comfyui_version
from benchmarks.shared.presets import PAIRS, Pair, Presets
from medsteer_core.errors import MedSteerError
from medsteer_core.vectors.pathology_vector import PathologyVector

PAIR, SEEDS = PAIRS[0], range(40000, 40008)  # seeds of neither split
SAMPLES = 8
LEAST_FLIP, LEAST_SSIM, MOST_RANDOM_FLIP = 0.75, 0.90, 0.25


@pytest.fixture(scope="module")
def presets():
    """The shipped presets with fewer runs for the vectors."""
    ours = replace(Presets().ours["removing"], samples=SAMPLES)
    return Presets(medsteer=replace(Presets().medsteer, samples=SAMPLES), ours={"removing": ours})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quality")


@pytest.fixture(scope="module")
def lab():
    return Lab()


@pytest.fixture
def measure(lab, folder, presets, monkeypatch):
    """``measure(name, store, value)``: the record of a method at its reported setting, by the benchmark's functions."""
    monkeypatch.setattr(_presets, "COVARIANCE_SAMPLES", 6)

    def run(name, store=None, chosen=presets):
        store = store or Store(lab, folder, comfyui_version())
        method = methods(lab, store, PAIR, chosen)[name][0]
        return quality.summary(quality.results(store, PAIR, method, method.values[0], SEEDS))

    return run


def is_good(record):
    """The reduced benchmark's thresholds."""
    enough = record["accepted"] >= len(SEEDS) // 2
    return enough and record["flip"] >= LEAST_FLIP and (record["ssim_outside"] or 0.0) >= LEAST_SSIM


def test_our_preset_flips_and_keeps_the_rest(measure):
    record = measure("recipe")
    assert is_good(record), record


def test_many_strengths_at_once_are_each_as_if_made_alone(lab, folder, presets):
    store = Store(lab, folder, comfyui_version())
    method = next(arm for arm in methods(lab, store, PAIR, presets)["vector"] if "lock" in arm.arm)
    chunk, _ = store.factual(PAIR, SEEDS[:2])
    together = method.run_many(chunk, (1.0, 2.0))
    assert together.shape == (2, *chunk.latents.shape)
    for made, strength in zip(together, (1.0, 2.0), strict=True):
        assert torch.equal(made, method.run(chunk, strength))


def test_the_prompt_alone_under_the_vectors_lock_changes_nothing_outside_and_does_not_steer(lab, folder, presets):
    store = Store(lab, folder, comfyui_version())
    method = methods(lab, store, PAIR, presets)["prompt_switch_lock"][1]
    chunk, _ = store.factual(PAIR, SEEDS[:2])
    made = method.run(chunk, 0.45)
    same = (made == chunk.latents).all(1)
    assert 0.3 < float(same.float().mean()) < 0.95
    free = methods(lab, store, PAIR, presets)["prompt_switch"][0].run(chunk, 0.45)
    assert float((made - free)[~same[:, None].expand_as(made)].abs().mean()) < float(
        (chunk.latents - free).abs().mean()
    )


def test_strength_zero_changes_no_byte(measure):
    record = measure("strength_0")
    assert record["identical"] is True
    assert (record["flip"], record["ssim_outside"]) == (0.0, 1.0)


def test_the_same_push_in_a_random_direction_does_not_flip(measure):
    assert measure("random_direction")["flip"] <= MOST_RANDOM_FLIP


# Broken on purpose


class BrokenStore(Store):
    """A store with another's factual images that hands out a changed vector, and keeps what comes of it elsewhere."""

    def __init__(self, lab, folder, good, change):
        super().__init__(lab, folder, comfyui_version())
        self.good, self.change = good, change

    def factual(self, pair, seeds):
        return self.good.factual(pair, seeds)

    def vector(self, pair, noise, samples):
        return self.change(self.good, pair, noise, samples)


def with_flipped_sign(good, pair, noise, samples):
    vector = good.vector(pair, noise, samples)
    sites = {name: replace(site, directions=-site.directions) for name, site in vector.sites.items()}
    return PathologyVector(sites, vector.sigmas, vector.provenance, vector.flow)


def unchanged(good, pair, noise, samples):
    return good.vector(pair, noise, samples)


def of_the_swapped_pair(good, pair, noise, samples):
    return good.vector(Pair(pair.target, pair.source), noise, samples)


@pytest.mark.parametrize("change", [with_flipped_sign, of_the_swapped_pair])
def test_a_wrong_vector_fails_the_thresholds(measure, lab, folder, tmp_path, change):
    good = Store(lab, folder, comfyui_version())
    record = measure("recipe", BrokenStore(lab, tmp_path, good, change))
    assert not is_good(record), record


def test_a_dropped_hook_is_an_error_and_without_that_check_fails_the_thresholds(
    measure, lab, folder, presets, tmp_path, monkeypatch
):
    from medsteer_core.host.patching import calls

    good = Store(lab, folder, comfyui_version())
    good.vector(PAIR, presets.medsteer.noise, SAMPLES)  # made before, since extraction needs the hooks
    store = BrokenStore(lab, tmp_path, good, unchanged)
    monkeypatch.setattr(calls, "hooks", lambda sites, visit: nullcontext())
    with pytest.raises(MedSteerError, match="There is no concept map: .*the steering changes nothing here"):
        measure("recipe", store)
    unlocked = replace(presets, ours={"removing": replace(presets.ours["removing"], lock="none")})
    with pytest.raises(MedSteerError, match="changed nothing"):
        measure("recipe", store, unlocked)
    monkeypatch.setattr(calls, "check_touched", lambda run: None)
    record = measure("recipe", store, unlocked)
    assert not is_good(record), record
    assert record["flip"] == 0.0
