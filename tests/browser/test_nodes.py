"""What a node shows beside its inputs: its help page, what a run did, and its error."""

import io
from pathlib import Path

import pytest
from PIL import Image

DOCS = Path(__file__).resolve().parents[2] / "web" / "docs"
EXAMPLE = DOCS.parents[1] / "example_workflows" / "counterfactual_pair.json"
# Of each node of the pack on the canvas: the text that it shows, and by how many pixels the text is cut.
NOTES = """() => Object.fromEntries(app.graph._nodes.flatMap(node => {
  const note = node.widgets?.find(widget => widget.name === 'medsteer_note')?.element;
  if (!note) return [];
  const shown = note.isConnected && note.clientHeight > 0;
  return [[node.type, {text: note.textContent, cut: shown ? note.scrollHeight - note.clientHeight : null}]];
}))"""
EXTRACT, STEER = "MedSteer_ExtractPathologyVector", "MedSteer_Steer"


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
        front.page.wait_for_function(f"Object.keys(({NOTES})()).length === 4")
        front.show(EXTRACT, 0.7)
        front.picture(f"notes_on_{'nodes_2' if nodes_2 else 'the_canvas'}")
        notes.append(front.page.evaluate(NOTES))
    cached = dict(entry["status"]["messages"])["execution_cached"]["nodes"]
    assert set(cached) >= set(entry["prompt"][2]), "the second run had something to do"
    first, again = ({node: note["text"] for node, note in one.items()} for one in notes)
    assert set(first) == {EXTRACT, STEER, "MedSteer_CounterfactualSampler", "MedSteer_CounterfactualCompare"}
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
