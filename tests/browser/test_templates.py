"""Every template as a user meets it: found in Templates, opened, run, saved, and brought back from its own picture."""

import json
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "example_workflows").glob("*.json"))
NEEDS_DOWNLOADS = {"8 PixArt Kvasir counterfactual"}
PACK = "medsteer"
every_template = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
every_runnable = pytest.mark.parametrize(
    "path", [path for path in EXAMPLES if path.stem not in NEEDS_DOWNLOADS], ids=lambda path: path.stem
)


def test_the_packs_templates_are_listed_with_their_thumbnails(front):
    front.browse_templates(PACK)
    cards = {}
    for path in EXAMPLES:
        # A thumbnail is loaded once its card is in view.
        card = front.page.get_by_test_id(f"template-workflow-{path.stem}")
        card.hover()
        card.locator("img").first.wait_for()
        front.page.wait_for_function(
            "card => [...card.querySelectorAll('img')].some(i => i.complete)", arg=card.element_handle()
        )
        cards[path.stem] = card.locator("img").evaluate_all(
            "all => all.map(i => [i.src, i.complete && i.naturalWidth])"
        )
    front.picture("templates_of_the_pack")
    assert front.page.locator("[data-testid^=template-workflow-]").count() == len(EXAMPLES)
    for name, images in cards.items():
        # Where a thumbnail is missing the front end shows a default picture of its own.
        assert images and all(width > 0 and "default-template" not in src for src, width in images), name
    assert front.errors() == []


@every_template
def test_a_template_opens_whole_and_as_it_was_saved(front, path):
    front.open_template(PACK, path.stem)
    front.picture(f"opened_{path.stem}")
    assert not front.page.evaluate("app.canvas.low_quality"), "it opens at a zoom at which no text is drawn"
    assert front.missing_types() == []
    assert front.toasts() == ""
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert [(node[0], node[1]) for node in front.graph()["nodes"]] == sorted(
        (str(node["id"]), node["type"]) for node in saved["nodes"]
    )
    assert len(front.graph()["links"]) == len(saved["links"])
    assert front.errors() == []


@every_runnable
def test_a_template_runs_to_images_and_comes_back_from_save_and_from_its_picture(
    front, comfy_server, path, record_property
):
    front.open_template(PACK, path.stem)
    opened = front.graph()
    entry = front.run()
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    times = {kind: data["timestamp"] / 1000 for kind, data in entry["status"]["messages"]}
    seconds = times["execution_success"] - times["execution_start"]
    record_property("seconds", seconds)
    print(f"{path.stem}: ran in {seconds:.1f} s")
    images = [image for output in entry["outputs"].values() for image in output.get("images", [])]
    assert images
    showing = [int(node) for node, output in entry["outputs"].items() if output.get("images") and node.isdigit()]
    front.page.wait_for_function(
        """ids => ids.map(id => app.graph.getNodeById(id)).filter(node => !node?.flags?.collapsed)
          .every(node => node?.imgs?.every(i => i.naturalWidth > 0))""",
        arg=showing,
    )
    front.picture(f"ran_{path.stem}")
    assert front.graph() == opened

    name = f"saved {path.stem}"
    front.page.keyboard.press("Control+s")
    box = front.page.get_by_role("dialog").get_by_role("textbox")
    box.fill(name)
    box.press("Enter")
    file = comfy_server.base / "user" / "default" / "workflows" / f"{name}.json"
    for _ in range(50):
        if file.is_file():
            break
        front.page.wait_for_timeout(100)
    assert len(json.loads(file.read_text(encoding="utf-8"))["nodes"]) == len(opened["nodes"])
    front.page.reload(wait_until="domcontentloaded")
    front.wait_until_ready()
    front.wait_for_graph()
    assert name in front.page.title()
    assert front.graph() == opened

    front.clear()
    kept = [image for image in images if image["type"] == "output"] or images
    picture = comfy_server.base / kept[0]["type"] / kept[0]["subfolder"] / kept[0]["filename"]
    front.drop(picture)
    front.picture(f"dropped_{path.stem}")
    assert front.graph() == opened
    assert front.errors() == []
