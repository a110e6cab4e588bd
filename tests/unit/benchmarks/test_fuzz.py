"""The small form of `dev.py bench fuzz`: its guard sees what it must, and whatever goes in, readers and core stay sane.

Only MedSteerError comes out, and numbers are finite or refused.
"""

import json
import math
import os
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.trust import fuzz
from benchmarks.trust._fuzz_guard import Guard
from benchmarks.trust._fuzz_targets import TARGETS
from benchmarks.trust._fuzz_worker import Range
from medsteer_core.endophantom.text import VOCABULARY, tokenize
from medsteer_core.errors import MedSteerError
from medsteer_core.pictures.sweep import sweep
from medsteer_core.scores.images import compare
from medsteer_core.steering.operators import make_operator
from medsteer_core.steering.selection import select_sites
from medsteer_core.steering.token_map import mask_for_latent, token_weights
from medsteer_core.vectors.pathology_vector import StepDirection
from medsteer_core.vectors.schedule import SigmaWindow, interpolate_index

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
ANY_NUMBER = st.floats() | st.integers(-(2**70), 2**70)
FILES = 150


# Readers


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """Each reader behind a guard of its own."""
    made = {}
    for number, (name, target) in enumerate(TARGETS.items()):
        folder = tmp_path_factory.mktemp(f"reader{number}")
        made[name] = Guard(folder), target.files(folder)
        made[name][0].watch()
    return made


@pytest.mark.parametrize("name", TARGETS)
def test_changed_files_give_a_value_or_a_medsteer_error_and_run_nothing(gallery, name):
    guard, read = gallery[name]
    target, chance = TARGETS[name], random.Random(7)
    files = target.seeds()
    for data in files * 10:  # imports that readers make when they first need them, before anyone looks
        _quietly(read, target.mutate(data, chance))
    found = Range(read, guard, {})
    found.begin()
    for number in range(FILES):
        data = chance.choice(files)
        for _ in range(1 + number % 3):
            data = target.mutate(data, chance)
        found.shoot(data)
    assert found.done == FILES and found.refused > FILES / 4
    assert not found.failures, found.failures


@pytest.mark.parametrize("name", TARGETS)
def test_the_valid_files_that_changes_begin_from_are_read(gallery, name):
    guard, read = gallery[name]
    found = Range(read, guard, {})
    found.begin()
    for data in TARGETS[name].seeds():
        found.shoot(data)
    assert found.accepted and not found.failures, found.failures


def _quietly(read, data):
    try:
        read(data)
    except MedSteerError:
        pass


@pytest.mark.parametrize(
    ("what", "deed"),
    [
        ("open", lambda folder: open(folder / "new", "w").close()),
        ("open", lambda _folder: open(__file__).close()),
        ("os.system", lambda _folder: os.system("true")),
        ("subprocess.Popen", lambda _folder: subprocess.run([sys.executable, "-c", ""], check=False)),
        ("compile", lambda _folder: eval("1 + 1")),
        ("import", lambda _folder: __import__("this_is_no_module")),
        ("os.remove", lambda folder: os.remove(folder / "new")),
    ],
)
def test_the_guard_sees_what_a_reader_must_not_do(tmp_path, what, deed):
    guard = Guard(tmp_path)
    guard.watch()

    def read(_data):
        try:
            deed(tmp_path)
        except Exception:  # a reader that hides it
            return

    found = Range(read, guard, {})
    found.begin()
    found.shoot(b"")
    assert [failure for failure in found.failures if f"ran: {what}" in failure], found.failures


def test_the_guard_takes_reading_of_the_file_itself(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    guard = Guard(tmp_path)
    guard.watch()
    found = Range(lambda _data: (tmp_path / "file").read_bytes(), guard, {})
    found.begin()
    found.shoot(b"")
    assert (found.accepted, found.failures) == (1, {})


def test_other_errors_long_messages_and_long_times_are_failures(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.trust._fuzz_worker.SECONDS_LIMIT", -1.0)

    def read(data):
        if data == b"error":
            raise KeyError("x")
        raise MedSteerError("a\nb" if data == b"lines" else "x" * 3000)

    found = Range(read, Guard(tmp_path), {})
    found.begin()
    for data in (b"error", b"lines", b"long"):
        found.shoot(data)
    assert [failure.split(" ")[0] for failure in found.failures] == ["KeyError", "took", "a", "a"]
    assert fuzz.failed({"readers": {"x": {"failures": found.failures}}}) == 1
    assert fuzz.failed({"readers": {"x": {"failures": {}}}}) == 0


def test_the_benchmark_writes_its_numbers_and_a_table(tmp_path, capsys):
    words = ["--executions", "60", "--only", "model config.json", "--plain", "--output", str(tmp_path)]
    assert fuzz.main(words) == 0
    record = json.loads((tmp_path / "fuzz.json").read_text())
    row = record["readers"]["model config.json"]
    assert record["executions"] == row["executions"] == row["accepted"] + row["refused"] == 60
    assert row["worst_memory_mb"] < 256 and "model config.json" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["fuzz.json"]


# The core


def _made(make, *arguments, **parameters):
    try:
        return make(*arguments, **parameters)
    except MedSteerError as error:
        assert str(error).strip()
        return None


@QUICK
@given(st.sampled_from(["suppress", "ablate", "add", "set", "switch", "affine", "x", "", None]), ANY_NUMBER, ANY_NUMBER,
       st.sampled_from(["present", "absent", "", "x"]), st.booleans())  # fmt: skip
def test_any_strength_gives_an_operator_whose_result_is_finite_or_an_error(name, strength, focus, toward, keep_norm):
    parameters = {"suppress": {"strength": strength}, "add": {"strength": strength, "toward": toward},
                  "set": {"strength": strength, "toward": toward}, "switch": {"strength": strength},
                  "affine": {"strength": strength, "focus": focus}}.get(name, {})  # fmt: skip
    operator = _made(make_operator, name, keep_norm=keep_norm, **parameters)
    if operator is None:
        return
    assert math.isfinite(getattr(operator, "strength", 0.0))
    if abs(getattr(operator, "strength", 0.0)) <= 100 and name != "switch":
        step = StepDirection(torch.eye(4)[:1], torch.ones(1), torch.tensor([[1.0], [-1.0]]), torch.eye(4)[:1],
                             torch.zeros(1))  # fmt: skip
        steered = operator(torch.linspace(-2, 2, 24).reshape(2, 3, 4), step)
        assert steered.shape == (2, 3, 4) and bool(steered.isfinite().all())


@QUICK
@given(st.text(max_size=40) | st.from_regex(r"[-0-9, *\[\]!?a-z.]{0,30}", fullmatch=True))
def test_any_text_for_sites_chooses_some_or_is_an_error(text):
    names = [f"blocks.{number}.cross_attn.proj" for number in range(12)]
    chosen = _made(select_sites, text, names)
    assert chosen is None or (chosen and set(chosen) <= set(names) and list(chosen) == sorted(chosen, key=names.index))


@QUICK
@given(st.text())
def test_any_prompt_is_words_of_the_vocabulary(text):
    assert all(0 <= token < len(VOCABULARY) for token in tokenize(text))


@QUICK
@given(ANY_NUMBER, ANY_NUMBER, st.booleans())
def test_any_noise_level_and_window_is_looked_up_or_refused(sigma, other, flow):
    found = _made(interpolate_index, torch.tensor([4.0, 2.0, 1.0]), sigma, flow)
    assert found is None or (0 <= found[0] <= found[1] <= 2 and 0.0 <= found[2] <= 1.0)
    window = _made(SigmaWindow, sigma, other)
    assert window is None or isinstance(1.0 in window, bool)


SIDES = st.integers(1, 70)


@QUICK
@given(SIDES, SIDES, SIDES, SIDES, st.integers(1, 3), st.floats(0, 1))
def test_masks_of_any_size_fit_latents_of_any_size(mask_h, mask_w, height, width, images, value):
    mask = torch.full((1, mask_h, mask_w), value)
    weights = _made(token_weights, mask, math.ceil(height / 2) * math.ceil(width / 2), height, width)
    assert weights is None or (bool(weights.isfinite().all()) and float(weights.min()) >= -1e-6)
    fitted = _made(mask_for_latent, mask, images, height, width)
    assert fitted is None or (fitted.shape[-2:] == (height, width) and bool(fitted.isfinite().all()))


@settings(QUICK, max_examples=15)
@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from([0.5, math.nan, math.inf, -math.inf, 1e30, -3.0]))
def test_images_of_any_size_and_value_are_compared_or_refused(height, width, value):
    first, second = torch.full((3, height, width), 0.5), torch.full((3, height, width), value)
    found = _made(compare, first, second)
    assert found is None or all(math.isfinite(number) for number in found.values())
    assert found is not None or value != 0.5 or min(height, width) < 11


@QUICK
@given(st.lists(ANY_NUMBER, max_size=4), st.integers(0, 3), st.integers(0, 3))
def test_sweeps_of_any_strengths_and_counts_are_made_or_refused(strengths, rows, images):
    first, second = torch.full((rows, 3, 16, 16), 0.5), torch.full((images, 3, 16, 16), 0.4)
    _made(sweep, first, second, strengths, "polyps", "normal cecum", None, "none")
