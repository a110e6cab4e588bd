"""The example workflows as drawings: nothing overlaps, no link runs behind a node, each has a thumbnail and API form.

Links are laid as LiteGraph draws them: cubic splines from slot to slot, by way of the points that are set on them.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

FOLDER = Path(__file__).resolve().parents[3] / "example_workflows"
TEMPLATES = sorted(FOLDER.glob("*.json"))
TITLE, SLOT, REACH = 30, 20, 80  # pixels: a title bar, the distance of slots, how far a way point bends its link
NOTES = {"Note", "MarkdownNote"}
# The front end fits a template's nodes, with a margin of 10, into three quarters of the window, and draws a title of 14
# pixels only where it comes out at 8 or more.
TITLE_TEXT, FILLED, MARGIN = 14, 0.75, 10
# How high a title must come out at least, in two small windows.
WINDOWS = {(1440, 900): 9.0, (1366, 768): 8.4}

every_template = pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)


@dataclass(frozen=True)
class Box:
    """A rectangle, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def of(cls, node: dict) -> "Box":
        """A node with its title bar."""
        (x, y), (width, height) = node["pos"], node["size"]
        return (
            cls(x, y - TITLE, x + folded_width(node), y) if folded(node) else cls(x, y - TITLE, x + width, y + height)
        )

    def meets(self, other: "Box") -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def holds(self, x: float, y: float) -> bool:
        return self.left < x < self.right and self.top < y < self.bottom

    def encloses(self, other: "Box") -> bool:
        inside = self.left <= other.left and other.right <= self.right
        return inside and self.top <= other.top and other.bottom <= self.bottom


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def folded(node: dict) -> bool:
    return node.get("flags", {}).get("collapsed", False)


def folded_width(node: dict) -> float:
    """As wide as its title, of which 20 letters of about 6 pixels are drawn, and two title bars' heights."""
    return min(node["size"][0], 6 * min(20, len(node.get("title") or node["type"])) + 2 * TITLE)


def plugs(node: dict) -> list[dict]:
    """The inputs that are drawn as slots above the widgets."""
    return [entry for entry in node.get("inputs", []) if "widget" not in entry]


def slot(node: dict, kind: str, number: int) -> tuple[float, float]:
    """Where a link leaves (``outputs``) or enters (``inputs``) a node; at its middle, when the input is a widget."""
    (x, y), (width, height) = node["pos"], node["size"]
    if folded(node):
        return x + (folded_width(node) if kind == "outputs" else 0), y - TITLE / 2
    if kind == "outputs":
        return x + width, y + SLOT * (number + 0.7)
    entry = node["inputs"][number]
    return (x, y + height / 2) if "widget" in entry else (x, y + SLOT * (plugs(node).index(entry) + 0.7))


def way(drawn: dict, link: list) -> list[tuple[float, float]]:
    """All points of a link in order: output, way points, input."""
    nodes = {node["id"]: node for node in drawn["nodes"]}
    extra = drawn.get("extra", {})
    reroutes = {entry["id"]: entry for entry in extra.get("reroutes", [])}
    at = {entry["id"]: entry["parentId"] for entry in extra.get("linkExtensions", [])}.get(link[0])
    between = []
    while at is not None:
        between.insert(0, tuple(reroutes[at]["pos"]))
        at = reroutes[at].get("parentId")
    return [slot(nodes[link[1]], "outputs", link[2]), *between, slot(nodes[link[3]], "inputs", link[4])]


def spline(points: list[tuple[float, float]], samples: int = 60) -> list[tuple[float, float]]:
    """Points on the drawn link: level at its ends, and at a way point along the mean of the two directions."""
    bends = []
    for before, here, after in zip(points, points[1:], points[2:], strict=False):
        came = math.atan2(here[1] - before[1], here[0] - before[0])
        half = (came - math.atan2(after[1] - here[1], after[0] - here[0])) / 2
        half += math.pi if abs(half) > math.pi / 2 else 0
        bends.append((math.cos(came - half), math.sin(came - half)))
    drawn = []
    last = len(points) - 2
    for number, (a, b) in enumerate(zip(points, points[1:], strict=False)):
        pull = math.dist(a, b) / 4
        out = (pull, 0.0) if number == 0 else [min(REACH, pull) * part for part in bends[number - 1]]
        into = (-pull, 0.0) if number == last else [-min(REACH, pull) * part for part in bends[number]]
        corners = (a, (a[0] + out[0], a[1] + out[1]), (b[0] + into[0], b[1] + into[1]), b)
        drawn += [bezier(corners, step / samples) for step in range(samples + 1)]
    return drawn


def bezier(corners, t: float) -> tuple[float, float]:
    weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
    return tuple(sum(w * corner[axis] for w, corner in zip(weights, corners, strict=True)) for axis in (0, 1))


@every_template
def test_no_node_overlaps_another(path):
    nodes = read(path)["nodes"]
    boxes = [(f"{node['id']} {node['type']}", Box.of(node)) for node in nodes]
    clashes = [(a, b) for i, (a, first) in enumerate(boxes) for b, second in boxes[:i] if first.meets(second)]
    assert len(nodes) > 3 and not clashes


@every_template
def test_no_link_runs_through_a_node_that_it_does_not_join(path):
    drawn = read(path)
    through = set()
    for link in drawn["links"]:
        others = [node for node in drawn["nodes"] if node["id"] not in (link[1], link[3])]
        points = spline(way(drawn, link))
        through |= {(link[1], link[3], n["id"], n["type"]) for n in others if any(Box.of(n).holds(*p) for p in points)}
    assert drawn["links"] and not through


@every_template
def test_every_node_lies_in_a_group_or_is_a_note(path):
    drawn = read(path)
    groups = [Box(x, y, x + width, y + height) for x, y, width, height in (g["bounding"] for g in drawn["groups"])]
    loose = [n["type"] for n in drawn["nodes"] if not any(group.encloses(Box.of(n)) for group in groups)]
    assert set(loose) <= NOTES
    clashes = [(i, j) for i, first in enumerate(groups) for j, second in enumerate(groups[:i]) if first.meets(second)]
    assert groups and not clashes


@every_template
@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: "x".join(map(str, window)))
def test_it_opens_at_a_zoom_at_which_its_titles_can_be_read(path, window):
    boxes = [Box.of(node) for node in read(path)["nodes"]]
    across = max(box.right for box in boxes) - min(box.left for box in boxes) + 2 * MARGIN
    down = max(box.bottom for box in boxes) - min(box.top for box in boxes) + 2 * MARGIN
    assert TITLE_TEXT * FILLED * min(window[0] / across, window[1] / down) >= WINDOWS[window]


@every_template
def test_the_title_of_a_folded_node_is_short_enough_to_be_shown_whole(path):
    named = [node.get("title") or node["type"] for node in read(path)["nodes"] if folded(node)]
    assert [name for name in named if len(name) > 20 and not name.startswith("MedSteer_")] == []


def test_the_first_template_is_small_and_needs_no_vector():
    nodes = [node for node in read(FOLDER / "1 A first pair.json")["nodes"] if node["type"] not in NOTES]
    assert len(nodes) <= 9 and TEMPLATES[0].stem == "1 A first pair"
    assert not {"MedSteer_ExtractPathologyVector", "MedSteer_Steer"} & {node["type"] for node in nodes}


@every_template
def test_a_note_says_what_to_change_first_and_what_the_images_are_not_for(path):
    text = " ".join(n["widgets_values"][0] for n in read(path)["nodes"] if n["type"] in NOTES).lower()
    assert "run" in text and "change" in text and "not for diagnosis" in text


@every_template
def test_a_thumbnail_stands_beside_it_small_enough_to_load_at_once(path):
    thumbnail = path.with_suffix(".jpg")
    assert 4_000 < thumbnail.stat().st_size <= 200_000
    with Image.open(thumbnail) as picture:
        assert picture.format == "JPEG"
        assert min(picture.size) >= 256 and max(picture.size) <= 1024


@every_template
def test_its_api_form_has_the_same_nodes_links_and_titles(path, api_file):
    drawn, headless = read(path), read(api_file(path))
    on_canvas = {str(n["id"]): n["type"] for n in drawn["nodes"] if n["type"] not in NOTES}
    assert {name: entry["class_type"] for name, entry in headless.items()} == on_canvas
    linked = {
        (*value, name) for name, e in headless.items() for value in e["inputs"].values() if isinstance(value, list)
    }
    assert linked == {(str(link[1]), link[2], str(link[3])) for link in drawn["links"]}
    titles = {str(n["id"]): n["title"] for n in drawn["nodes"] if n.get("title") and n["type"] not in NOTES}
    assert {name: headless[name]["_meta"]["title"] for name in titles} == titles
