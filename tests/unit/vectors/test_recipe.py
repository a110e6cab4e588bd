"""How a vector was made, short enough for an image's metadata."""

import json

import torch

from medsteer_core.vectors.pathology_vector import PathologyVector, SiteDirections
from medsteer_core.vectors.recipe import recipe

MADE = {"prompts": {"present": {"text": "polyps", "sha256": "ab"}}, "seed": 3, "steps": 20, "estimator": "lda"}
REPORT = {"separability": {"auroc": {"a": [1.0] * 20}}, "explained_by_site": {"a": [0.5]}, "observations": {}}


def vector(provenance):
    site = SiteDirections(
        torch.tensor([[[1.0, 0.0]]]), torch.ones(1, 1), torch.zeros(1, 2), torch.zeros(1, 2, 1), torch.ones(1, 2)
    )
    return PathologyVector({"a": site}, torch.tensor([1.0]), provenance)


def test_it_says_how_the_vector_was_made_and_not_how_good_it_is():
    made = vector(MADE | REPORT)
    assert recipe(made, "polyps_1.safetensors") == {
        "vector": made.short_hash(), "file": "polyps_1.safetensors", "made": MADE,
    }  # fmt: skip
    assert "file" not in recipe(made)


def test_the_parts_of_a_combined_vector_lose_their_reports_too():
    parts = [{"weight": 1.0, "provenance": MADE | REPORT}, {"weight": -1.0, "provenance": MADE}]
    made = recipe(vector({"combined": "subtract", "parts": parts}))["made"]
    assert [part["provenance"] for part in made["parts"]] == [MADE, MADE]
    assert json.loads(json.dumps(made)) == made
