"""A judge that can't be told from guessing says so wherever its word is read."""

import json

import pytest
import torch

from medsteer_core.evaluation.report import evaluate_batches
from medsteer_core.evaluation.table import in_short, text
from medsteer_core.judges.held_out import about, doubt_of
from medsteer_core.judges.judge import Answers, Terms
from medsteer_core.pictures.sweep import records, sweep
from medsteer_core.scores.verdict import verdict

WEAK = {"accuracy": 0.55, "accuracy_interval": [0.4, 0.69], "class_images": {"test": {"a": 20, "b": 20}}}
SAID = (
    "This judge can't be told from guessing: accuracy 0.55 [0.40, 0.69] on 40 held-out images, where always naming the "
    "most frequent class gives 0.50."
)


def test_an_interval_that_holds_chance_is_a_doubt():
    assert about(WEAK).startswith(SAID)
    assert about({**WEAK, "accuracy": 0.9, "accuracy_interval": [0.77, 0.96]}) == ""
    # chance is the most frequent class's share
    assert "gives 0.80" in about({**WEAK, "accuracy_interval": [0.6, 0.9], "class_images": {"test": {"a": 32, "b": 8}}})


@pytest.mark.parametrize(
    "changes",
    [
        {"accuracy_interval": None},
        {"accuracy_interval": ["x", 1]},
        {"class_images": {"test": {}}},
        {"class_images": []},
    ],
)
def test_metrics_of_another_form_say_nothing(changes):
    assert about({**WEAK, **changes}) == "" == about({})


def test_the_folders_metrics_are_read(tmp_path):
    assert doubt_of(tmp_path) == ""
    (tmp_path / "metrics.json").write_text("[1", encoding="utf-8")
    assert doubt_of(tmp_path) == ""
    (tmp_path / "metrics.json").write_text(json.dumps(WEAK), encoding="utf-8")
    assert doubt_of(tmp_path).startswith(SAID)


class Guesses:
    terms = Terms(labels=("a", "b"), classes=("a", "b"))
    identity = "test"
    doubt = SAID

    def __call__(self, images):
        first = torch.arange(len(images)) < len(images) / 2
        return Answers(torch.stack([first.float(), 1 - first.float()], 1))


def test_every_report_says_it():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 3, 32, 32, generator=generator), torch.rand(2, 3, 32, 32, generator=generator)
    judge = Guesses()
    assert verdict(a, b, judge).endswith(f"Warning: {SAID}")
    report = evaluate_batches(a, {"counterfactual": b}, "a", "b", judge)
    assert SAID in text(report) and SAID in in_short(report)
    assert records(sweep(a, b, [1.0], "a", "b", judge))["warning"] == SAID
    judge.doubt = ""
    assert "guessing" not in verdict(a, b, judge) + text(evaluate_batches(a, {"counterfactual": b}, "a", "b", judge))
    assert "warning" not in records(sweep(a, b, [1.0], "a", "b", judge))
