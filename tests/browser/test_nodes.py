"""What a node shows beside its inputs: its help page, what a run did, and its error."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from medsteer_core.steering.recipes import RECIPES

DOCS = Path(__file__).resolve().parents[2] / "web" / "docs"
EXAMPLE = DOCS.parents[1] / "example_workflows" / "2 Counterfactual pair.json"
# Of each node of the pack on the canvas: the text that it shows, and by how many pixels the text is cut.
NOTES = """() => Object.fromEntries(app.graph._nodes.flatMap(node => {
  const note = node.widgets?.find(widget => widget.name === 'medsteer_note')?.element;
  if (!note) return [];
  const shown = note.isConnected && note.clientHeight > 0;
  return [[node.type, {text: note.textContent, cut: shown ? note.scrollHeight - note.clientHeight : null}]];
}))"""
# The widgets of the first node of a type, by name; and one of them set as a user's hand does it.
WIDGETS = """type => Object.fromEntries(app.graph._nodes.find(node => node.type === type).widgets
  .map(widget => [widget.name, widget.value]))"""
TURN = """([type, name, value]) => { const node = app.graph._nodes.find(node => node.type === type);
  const widget = node.widgets.find(widget => widget.name === name); widget.value = value;
  widget.callback?.(value, app.canvas, node); }"""
EXTRACT, STEER, SAMPLER = "MedSteer_ExtractPathologyVector", "MedSteer_Steer", "MedSteer_CounterfactualSampler"


def red_pixels(png: bytes) -> int:
    """How many pixels of a screenshot are as red as the frame of a node that failed."""
    with Image.open(io.BytesIO(png)) as image:
        colours = image.convert("RGB").crop((400, 200, 900, 600)).getcolors(500 * 400)
    return sum(count for count, (r, g, b) in colours if r > 190 and g < 50 and b < 50)


def test_the_help_page_opens_from_the_node(front):
    front.drop(EXAMPLE)
    place = front.show(STEER)
    front.page.wait_for_timeout(500)
    front.page.mouse.click(*place)
    front.page.get_by_test_id("info-button").click()
    panel = front.page.get_by_test_id("properties-panel")
    title = (DOCS / f"{STEER}.md").read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    panel.get_by_role("heading", name=title, exact=True).first.wait_for()
    front.picture("help_page_of_steer")
    assert front.errors() == []


@pytest.mark.parametrize("nodes_2", [False, True], ids=["canvas", "nodes_2"])
def test_what_a_run_did_stands_whole_on_its_nodes_and_comes_back_when_all_was_cached(front, nodes_2):
    front.page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", nodes_2)
    notes = []
    for _ in range(2):
        front.clear()
        front.drop(EXAMPLE)
        assert front.page.evaluate(NOTES) == {}
        entry = front.run()
        assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
        front.page.wait_for_function(f"Object.keys(({NOTES})()).length === 5")
        front.show(EXTRACT, 0.7)
        front.picture(f"notes_on_{'nodes_2' if nodes_2 else 'the_canvas'}")
        notes.append(front.page.evaluate(NOTES))
    cached = dict(entry["status"]["messages"])["execution_cached"]["nodes"]
    assert set(cached) >= set(entry["prompt"][2]), "the second run had something to do"
    first, again = ({node: note["text"] for node, note in one.items()} for one in notes)
    compare, panel = "MedSteer_CounterfactualCompare", "MedSteer_CounterfactualPanel"
    assert set(first) == {EXTRACT, STEER, SAMPLER, compare, panel}
    assert first[panel].startswith("Polyps before, normal cecum after; SSIM outside the finding 0.9")
    assert "8 sites" in first[EXTRACT] and "affine at 8 of 8 sites" in first[STEER]
    assert again == first
    assert {note["cut"] for one in notes for note in one.values()} == {0}
    assert front.errors() == []


def test_a_wrong_input_turns_the_node_red_with_our_message(front):
    front.drop(EXAMPLE)
    # Both prompts the same: there is no direction between them, and the node says so before it samples.
    front.page.evaluate(
        """() => { const named = title => app.graph._nodes.find(n => n.title === title).widgets[0];
                   named('Finding absent').value = named('Finding present').value; }"""
    )
    front.show(EXTRACT)
    assert red_pixels(front.page.screenshot()) == 0
    entry = front.run(60)
    messages = dict(entry["status"]["messages"])
    said = messages["execution_error"]["exception_message"].strip()
    assert messages["execution_error"]["node_type"] == EXTRACT
    assert "\n" not in said
    overlay = front.page.get_by_test_id("error-overlay")
    overlay.wait_for()
    assert "Extract Pathology Vector" in overlay.inner_text()
    assert red_pixels(front.picture("wrong_input_red_node").read_bytes()) > 100
    front.page.get_by_role("button", name="View details").click()
    panel = front.page.get_by_test_id("properties-panel")
    panel.wait_for()
    front.picture("wrong_input_details")
    assert said in panel.inner_text()


def test_a_node_that_fails_no_longer_shows_what_the_run_before_it_did(front):
    front.drop(EXAMPLE)
    front.page.evaluate("app.graph._nodes.find(n => n.type === 'MedSteer_ExtractPathologyVector').widgets[0].value = 1")
    assert front.run()["status"]["status_str"] == "success"
    front.page.wait_for_function(f"({NOTES})()['{STEER}'] !== undefined")
    front.page.evaluate(TURN, [STEER, "sites", "nonsense"])
    assert front.run()["status"]["status_str"] == "error"
    front.page.wait_for_function(f"({NOTES})()['{STEER}'] === undefined")
    assert EXTRACT in front.page.evaluate(NOTES)


def test_words_that_the_model_does_not_know_are_named_on_the_node_that_encodes_them(front):
    front.drop(EXAMPLE.parent / "1 A first pair.json")
    prompt = """text => { app.graph._nodes.find(node => node.title === 'Factual prompt').widgets[0].value = text; }"""
    front.page.evaluate(prompt, "An endoscopic image of polips")
    assert front.run()["status"]["status_str"] == "success"
    front.page.wait_for_function(f"({NOTES})()['CLIPTextEncode'] !== undefined")
    said = "EndoPhantom does not know 'polips' (did you mean 'polyps'?) and ignores that."
    notes = front.page.evaluate(NOTES)
    assert notes["CLIPTextEncode"]["text"] == "Ignored: polips (polyps?)" and said in notes[SAMPLER]["text"]
    front.picture("unknown_word")
    front.page.evaluate(prompt, "An endoscopic image of polyps")
    assert front.run()["status"]["status_str"] == "success"
    front.page.wait_for_function(f"({NOTES})()['CLIPTextEncode'] === undefined")
    assert front.errors() == []


@pytest.mark.parametrize("nodes_2", [False, True], ids=["canvas", "nodes_2"])
def test_a_recipe_sets_the_widgets_and_a_changed_widget_reads_custom(front, nodes_2):
    front.page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", nodes_2)
    front.clear()
    front.drop(EXAMPLE)
    assert front.page.evaluate(WIDGETS, STEER)["recipe"] == "remove focal"
    for recipe, expected in RECIPES.items():
        for kind, values in ((STEER, expected.steer), (SAMPLER, expected.sampler)):
            front.page.evaluate(
                TURN, [kind, "operator", "suppress"] if kind == STEER else [kind, "lock", "concept map"]
            )
            assert front.page.evaluate(WIDGETS, kind)["recipe"] == "custom"
            front.page.evaluate(TURN, [kind, "recipe", recipe])
            shown = front.page.evaluate(WIDGETS, kind)
            assert {name: shown[name] for name in values} == dict(values) and shown["recipe"] == recipe
    # what the server is sent says the same
    inputs = {node["class_type"]: node["inputs"] for node in front.api_form().values()}
    assert inputs[STEER]["recipe"] == inputs[SAMPLER]["recipe"] == "add" and inputs[STEER]["operator.strength"] == 1.75
    front.page.evaluate(TURN, [STEER, "operator.strength", 1.8])
    assert front.page.evaluate(WIDGETS, STEER)["recipe"] == "custom"
    front.page.evaluate(TURN, [STEER, "operator.strength", 1.75])
    assert front.page.evaluate(WIDGETS, STEER)["recipe"] == "add"
    front.show(STEER, 0.8)
    front.picture(f"recipe_{'nodes_2' if nodes_2 else 'canvas'}")
    assert front.errors() == []


def test_the_recipe_of_an_older_workflow_is_what_its_widgets_are(front, tmp_path):
    saved = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    for node in saved["nodes"]:
        if node["type"] in (STEER, SAMPLER):
            node["widgets_values"] = node["widgets_values"][:-1]
            node["inputs"] = [entry for entry in node["inputs"] if entry["name"] != "recipe"]
            node["widgets_values"][1 if node["type"] == STEER else 7] = 1.5 if node["type"] == STEER else "concept map"
    (tmp_path / "old.json").write_text(json.dumps(saved), encoding="utf-8")
    front.drop(tmp_path / "old.json")
    assert front.page.evaluate(WIDGETS, STEER)["recipe"] == "remove diffuse"
    assert front.page.evaluate(WIDGETS, SAMPLER)["recipe"] == "custom"


# Where the canvas's own arrow beside a widget's number lies on the page.
ARROW = """([type, name]) => { const node = app.graph._nodes.find(node => node.type === type);
  const y = node.widgets.find(widget => widget.name === name).y + 10, {scale, offset} = app.canvas.ds;
  const box = app.canvas.canvas.getBoundingClientRect();
  const x = node.pos[0] + node.size[0] - 22 + offset[0];
  return [x * scale + box.x, (node.pos[1] + y + offset[1]) * scale + box.y]; }"""


@pytest.mark.parametrize("nodes_2", [False, True], ids=["canvas", "nodes_2"])
def test_the_recipe_follows_a_hand_at_the_widget(front, nodes_2):
    front.page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", nodes_2)
    front.clear()
    front.drop(EXAMPLE)
    front.show(STEER, 1.0)
    front.page.wait_for_timeout(500)
    if nodes_2:
        field = front.page.locator("[data-node-id]", has_text="recipe").locator("input[aria-valuemax='100']").first
        box = field.bounding_box()
        front.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        front.page.keyboard.press("Control+A")
        front.page.keyboard.type("0.9")
        front.page.keyboard.press("Enter")
    else:
        front.page.mouse.click(*front.page.evaluate(ARROW, [STEER, "operator.strength"]))
    front.page.wait_for_function(f"({WIDGETS})('{STEER}').recipe === 'custom'", timeout=10_000)
    assert front.page.evaluate(WIDGETS, STEER)["operator.strength"] == (0.9 if nodes_2 else 2.05)
