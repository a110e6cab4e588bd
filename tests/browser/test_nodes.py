"""What a node shows beside its inputs: its help page, and its error."""

import io
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).resolve().parents[2] / "web" / "docs"
EXAMPLE = DOCS.parents[1] / "example_workflows" / "counterfactual_pair.json"
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
