"""Every template in the window of a small laptop: opened from Templates, it can be read as it stands, without zooming.

Measured in pixels of the screen: the size of a text on the canvas times the zoom at which the template opened.
"""

import json
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "example_workflows").glob("*.json"))
PACK = "medsteer"
# The smallest text in pixels that each window may show: a node's title, a note, a widget, a box of text to write into
# (for which the front end takes the smallest letters).
WINDOWS = {
    (1440, 900): {"title": 9.0, "note": 9.0, "widget": 7.7, "box": 6.4},
    (1366, 768): {"title": 8.4, "note": 9.0, "widget": 7.2, "box": 6.0},
}
LEFT, TOP = 58, 90  # pixels that the front end's side bar and its bars above take
SIZES = """() => {
  const {scale, offset} = app.canvas.ds;
  const nodes = app.graph._nodes.map(node => {
    const [x, y, width, height] = node.boundingRect;
    return [node.title, (x + offset[0]) * scale, (y + offset[1]) * scale,
      (x + offset[0] + width) * scale, (y + offset[1] + height) * scale];
  });
  const onScreen = element => parseFloat(getComputedStyle(element).fontSize)
    * element.getBoundingClientRect().width / element.offsetWidth;
  const notes = [...document.querySelectorAll('.comfy-markdown .tiptap')].filter(note => note.clientHeight > 0);
  const lines = notes.flatMap(note => [...note.querySelectorAll(':scope > *')].filter(line => line.innerText.trim()));
  const boxes = [...document.querySelectorAll('textarea.comfy-multiline-input')].filter(box => box.clientHeight > 0);
  return {
    nodes, drawn: !app.canvas.low_quality, notes: notes.length,
    cut: Math.max(...notes.map(note => note.scrollHeight - note.clientHeight)),
    text: {
      title: LiteGraph.NODE_TEXT_SIZE * scale, widget: LiteGraph.NODE_SUBTEXT_SIZE * scale,
      note: Math.min(...lines.map(onScreen)), box: boxes.length ? Math.min(...boxes.map(onScreen)) : null,
    },
  };
}"""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: "x".join(map(str, window)))
def test_a_template_opens_legibly_in_a_small_window(shared_front, path, window):
    front, (width, height) = shared_front, window
    front.page.set_viewport_size({"width": width, "height": height})
    front.page.wait_for_function(
        "([w, h]) => app.canvas.canvas.width === w && app.canvas.canvas.height === h", arg=window
    )
    front.open_template(PACK, path.stem)
    front.page.wait_for_function("document.querySelector('.comfy-markdown .tiptap')?.clientHeight > 0")
    found = front.page.evaluate(SIZES)
    front.page.screenshot(path=front.pictures / f"small_{width}_{path.stem}.png")
    print(path.stem, {name: size and round(size, 1) for name, size in found["text"].items()})
    assert found["drawn"] and found["notes"] == 1 and found["cut"] <= 0
    small = {name: size for name, size in found["text"].items() if size and size < WINDOWS[window][name]}
    assert small == {}
    outside = [
        title
        for title, left, top, right, bottom in found["nodes"]
        if left < LEFT or top < TOP or right > width or bottom > height
    ]
    assert outside == []
    assert len(found["nodes"]) == len(json.loads(path.read_text(encoding="utf-8"))["nodes"])
