"""The example files against the front end: its own schema check, a round trip, and the API form it would send."""

import json
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "example_workflows").glob("*.json"))
every_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
# What every save writes anew: counters, the order of drawing, sizes as the texts need them, the view, names in the
# user's language, slots that nothing is linked to, and widgets that a node got after the file was saved.
KEPT = ("groups", "links")
KEPT_IN_NODES = ("id", "type", "pos", "flags", "mode", "title", "color", "bgcolor")


def plain(workflow: dict) -> dict:
    """What a workflow says, without what changes with every save."""
    return {"nodes": {str(node["id"]): _plain_node(node) for node in workflow["nodes"]}} | {
        name: sorted(workflow.get(name) or [], key=json.dumps) for name in KEPT
    }


def _plain_node(node: dict) -> dict:
    linked = {
        "inputs": {slot["name"]: slot["link"] for slot in node.get("inputs", []) if slot.get("link") is not None},
        "outputs": {slot["name"]: sorted(slot["links"]) for slot in node.get("outputs", []) if slot.get("links")},
    }
    return {name: node[name] for name in KEPT_IN_NODES if node.get(name) not in (None, {}, "")} | linked


@every_example
def test_a_file_passes_the_front_ends_schema_and_a_round_trip(front, path):
    front.drop(path)
    assert front.toasts() == ""
    saved, again = json.loads(path.read_text(encoding="utf-8")), front.serialized()
    assert plain(again) == plain(saved)
    values = {str(node["id"]): node.get("widgets_values") or [] for node in again["nodes"]}
    for node in saved["nodes"]:
        old = node.get("widgets_values") or []
        assert values[str(node["id"])][: len(old)] == old, node["type"]
    assert front.errors() == []


def test_the_schema_check_is_on(front, tmp_path):
    broken = json.loads(EXAMPLES[0].read_text(encoding="utf-8"))
    broken["nodes"][0]["pos"] = "somewhere"
    (tmp_path / "broken.json").write_text(json.dumps(broken), encoding="utf-8")
    front.drop(tmp_path / "broken.json", load=False)
    front.page.locator(".p-toast-message").first.wait_for()
    assert "pos" in front.toasts()


@every_example
def test_the_api_file_is_what_the_front_end_exports(front, path, pytestconfig, api_file):
    front.drop(path)
    exported = front.api_form()
    file = api_file(path)
    if pytestconfig.getoption("write_api"):
        file.write_text(json.dumps(exported, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    assert json.loads(file.read_text(encoding="utf-8")) == exported, "write it anew with: python dev.py export"
