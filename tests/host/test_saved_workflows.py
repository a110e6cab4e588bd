"""Workflows that users saved with an earlier version still load and run: inputs may be added, never changed.

tests/fixtures/workflows holds the example workflows of every version in both forms, as they were published; a new
version adds a folder, and none is ever written again.
"""

import json
import time
from pathlib import Path

import pytest

SAVED = sorted((Path(__file__).resolve().parents[1] / "fixtures" / "workflows").glob("*/*.json"))
NEEDS_DOWNLOADS = {"pixart_kvasir_counterfactual"}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
every_workflow = pytest.mark.parametrize("path", SAVED, ids=lambda path: f"{path.parent.name}-{path.stem}")


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def inputs_of(info: dict) -> dict:
    """The inputs of a node by name, in the order in which the front end makes their widgets."""
    return {**info["input"].get("required", {}), **info["input"].get("optional", {})}


def fits(kind: str, wanted: str) -> bool:
    return "*" in (kind, wanted) or bool(set(kind.split(",")) & set(wanted.split(",")))


@every_workflow
def test_every_saved_slot_is_still_there_and_takes_what_it_took(comfy, path):
    info = comfy.object_info()
    for node in read(path)["nodes"]:
        if node["type"] == "MarkdownNote":  # lives in the front end alone
            continue
        now = inputs_of(info[node["type"]])
        for slot in node.get("inputs", []):
            if slot.get("link") is not None:
                kind = now[slot["name"]][0]
                assert isinstance(kind, list) or fits(slot["type"], kind), (node["type"], slot["name"])
        # A link names its output by its place.
        for place, slot in enumerate(node.get("outputs", [])):
            assert fits(slot["type"], info[node["type"]]["output"][place]), (node["type"], place)
            assert slot["name"] == info[node["type"]]["output_name"][place], (node["type"], place)


@every_workflow
def test_every_saved_widget_value_still_goes_to_the_widget_it_was_saved_from(comfy, path):
    """Values are saved by place, so what a node gets later must stand behind them."""
    info = comfy.object_info()
    for entry in read(path.parent / "api" / path.name).values():
        if not entry["class_type"].startswith("MedSteer_"):
            continue
        now = inputs_of(info[entry["class_type"]])
        given = list(dict.fromkeys(name.split(".")[0] for name in entry["inputs"]))
        widgets = [name for name, (kind, *_) in now.items() if isinstance(kind, list) or kind in WIDGETS]
        saved = [name for name in given if name in widgets or not isinstance(entry["inputs"].get(name), list)]
        assert widgets[: len(saved)] == saved, entry["class_type"]


@pytest.mark.parametrize(
    "path", [path for path in SAVED if path.stem not in NEEDS_DOWNLOADS], ids=lambda path: path.parent.name
)
def test_the_server_still_takes_the_saved_api_form(comfy, path):
    prompt_id = comfy.queue(read(path.parent / "api" / path.name))  # WorkflowRefused where anything is not valid
    while comfy.history(prompt_id) is None:
        comfy.interrupt(prompt_id)
        time.sleep(0.1)
