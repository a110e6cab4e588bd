"""The same graph gives the same bytes, in the next run and in another server. Small form of `bench determinism`."""

import copy

import pytest

from benchmarks.shared.probe import Probed
from benchmarks.trust.determinism import cached_nodes, compared, fresh_run, left_by
from medsteer_core.run.demo import WORKFLOW, read_workflow

PAIR, VECTOR = "counterfactual_pair", "extract_inspect_save"


def shortened(name: str, seed: int | None = None) -> dict:
    """A template with 2 samples and 4 steps; with another seed of the sampled images."""
    workflow = copy.deepcopy(read_workflow(WORKFLOW.with_name(f"{name}.json")))
    for node in workflow.values():
        small = {"samples": 2, "steps": 4, **({} if seed is None or "samples" in node["inputs"] else {"seed": seed})}
        node["inputs"] |= {key: value for key, value in small.items() if isinstance(node["inputs"].get(key), int)}
    return workflow


@pytest.fixture(scope="module")
def first(probed) -> dict[str, dict[str, str]]:
    """What one run of each template left."""
    return {name: fresh_run(probed, shortened(name)) for name in (PAIR, VECTOR)}


@pytest.mark.parametrize("name", [PAIR, VECTOR])
def test_a_template_gives_the_same_files_again_and_in_another_server(comfy_server, probed, first, name):
    again = fresh_run(probed, shortened(name))
    there = fresh_run(Probed(comfy_server), shortened(name))
    found = compared([[first[name], again], [there]])
    assert found["identical"], found["differing"]
    assert found["runs"] == 3 and any(key.endswith("image 0") for key in found["sha256"])
    assert any(key.startswith("vector") for key in found["sha256"]) == (name == VECTOR)


def test_another_seed_gives_other_images(probed, first):
    other = fresh_run(probed, shortened(PAIR, seed=1))
    assert {"Factual, image 0", "Counterfactual, image 0"} <= set(compared([[first[PAIR], other]])["differing"])


def test_a_run_that_was_served_is_told(probed):
    for _ in range(2):
        result = probed.client.run(shortened(PAIR))
    assert set(cached_nodes(probed.client.history(result.prompt_id))) & set(result.workflow)


def test_kept_samples_give_the_same_vector_as_new_ones(probed, first):
    kept = probed.server.base / "user" / "__medsteer" / "samples"
    fresh_run(probed, shortened(VECTOR))
    assert list(kept.glob("*.safetensors"))
    probed.free()
    again = left_by(probed.client.run(shortened(VECTOR)), probed.server.base)
    assert [key for key in again if key.startswith("vector")] and again["Inspect Pathology Vector, image 0"]
    assert {key: again[key] for key in again if key.startswith("vector")}.items() <= first[VECTOR].items()
