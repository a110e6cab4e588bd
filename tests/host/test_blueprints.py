"""The pack's subgraph blueprints: the server lists them, and a graph with one of them runs.

`blueprints/` holds, for each, a graph with the blueprint dropped into it, as the front end exported it for the API.
"""

import json
from pathlib import Path

import pytest

from medsteer_core.run.demo import ROOT

FIXTURES = Path(__file__).parent / "blueprints"
NAMES = ("Counterfactual pair", "Extract and steer")
PORTS = {
    "Counterfactual pair": (["clip", "model", "vae"], {"factual", "counterfactual", "concept_map"}),
    "Extract and steer": (["clip", "model"], {"model", "positive", "negative", "vector"}),
}

pytestmark = pytest.mark.parametrize("name", NAMES)


def exported(name: str) -> dict:
    return json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))


def blueprint(name: str) -> tuple[dict, dict]:
    """The node that is dropped on the canvas, and the subgraph behind it."""
    data = json.loads((ROOT / "subgraphs" / f"{name}.json").read_text(encoding="utf-8"))
    (node,), (inside,) = data["nodes"], data["definitions"]["subgraphs"]
    return node, inside


def test_the_server_lists_and_serves_it(comfy, name):
    listed = comfy._json("/global_subgraphs")
    (ours,) = [key for key, entry in listed.items() if entry["name"] == name]
    assert listed[ours]["info"]["node_pack"] == "custom_nodes.medsteer"
    served = comfy._json(f"/global_subgraphs/{ours}")
    assert json.loads(served["data"])["nodes"][0]["title"] == name


def test_its_node_has_named_inputs_outputs_and_widgets(name):
    node, inside = blueprint(name)
    links, outputs = PORTS[name]
    assert node["type"] == inside["id"] and inside["name"] == name
    assert [entry["name"] for entry in node["inputs"] if "widget" not in entry] == links
    assert {entry.get("label", entry["name"]) for entry in node["outputs"]} == outputs
    widgets = [entry["name"] for entry in node["inputs"] if "widget" in entry]
    assert widgets[:2] == ["finding present", "finding absent"] and "strength" in widgets
    assert len(node["widgets_values"]) == len(widgets) == len(set(widgets))


def test_the_exported_graph_holds_what_the_blueprint_holds(name):
    _, inside = blueprint(name)
    expanded = {key.split(":")[1]: entry["class_type"] for key, entry in exported(name).items() if ":" in key}
    assert expanded == {str(node["id"]): node["type"] for node in inside["nodes"]}


def test_its_images_are_not_made_from_the_noise_that_the_vector_saw(name):
    seeds = {
        entry["class_type"]: entry["inputs"]["seed"] for entry in exported(name).values() if "seed" in entry["inputs"]
    }
    extraction = seeds.pop("MedSteer_ExtractPathologyVector")
    assert seeds and not set(seeds.values()) & set(range(extraction, extraction + 32))


def test_a_graph_with_it_runs(comfy, name):
    graph = exported(name)
    for entry in graph.values():
        if entry["class_type"] == "MedSteer_ExtractPathologyVector":
            entry["inputs"].update(samples=2, steps=6)
    result = comfy.run(graph)
    images = [item for output in result.outputs.values() for item in output.get("images", [])]
    assert len(images) == {"Counterfactual pair": 3, "Extract and steer": 1}[name]
