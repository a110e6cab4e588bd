"""Plans of real images: which files are taken, what a task is, and what of a file reaches a server."""

import hashlib
import io
import json

import pytest
from PIL import Image

from medsteer_core.errors import MedSteerError
from medsteer_core.scale.images import upright_png
from medsteer_core.scale.plan import read_plan
from medsteer_core.scale.tasks import Tasks


def node(class_type, title="", **inputs):
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": title or class_type}}


def workflow() -> dict:
    """Phantom Image, edited, and saved; the panel looks at the image too."""
    return {
        "1": node("MedSteer_LoadEndoPhantom"),
        "2": node("CLIPTextEncode", "Finding", text="polyps here", clip=["1", 1]),
        "3": node("CLIPTextEncode", "None", text="nothing here", clip=["1", 1]),
        "4": node("MedSteer_PhantomImage", seed=4),
        "8": node("MedSteer_CounterfactualOfImage", "Edit", image=["4", 0], strengths="1", steps=4, positive=["2", 0],
                  counterfactual=["3", 0]),
        "9": node("MedSteer_SaveCounterfactualPairs", "Save", factual=["4", 0], record=["8", 6], folder="x",
                  source_class="a", target_class="b", split="auto"),
    }  # fmt: skip


def picture(colour, size=(12, 8)) -> Image.Image:
    return Image.new("RGB", size, colour)


@pytest.fixture
def planned(tmp_path):
    """`planned(text)`: a plan of the three images in photos/."""
    (tmp_path / "photos").mkdir()
    for name, colour in (("b.png", (0, 9, 0)), ("a.jpg", (200, 0, 0)), ("c.PNG", (0, 0, 7))):
        picture(colour).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no image")

    def make(text: str, graph=None):
        (tmp_path / "workflow.json").write_text(json.dumps(graph or workflow()))
        (tmp_path / "plan.yaml").write_text(f"workflow: workflow.json\noutput: pairs\n{text}", encoding="utf-8")
        return read_plan(tmp_path / "plan.yaml")

    return make


def test_a_folder_gives_a_task_for_each_image_and_strengths(planned):
    tasks = Tasks(planned("images: photos\nstrengths: [0.5, 1]\nset: {Edit.steps: [4, 8]}\n"))
    assert len(tasks) == 6 and [task.image[1] for task in tasks] == ["a.jpg", "b.png", "c.PNG"] * 2
    assert {task.pairs for task in tasks} == {2} and len({task.task_id for task in tasks}) == 6
    task = tasks[1]
    loader = task.workflow[task.load]
    assert loader["class_type"] == "LoadImage"
    assert task.workflow["8"]["inputs"]["image"] == [task.load, 0] == task.workflow["9"]["inputs"]["factual"]
    assert task.workflow["8"]["inputs"]["strengths"] == "0.5, 1"


def test_neither_names_nor_groups_reach_a_server(planned, tmp_path):
    (tmp_path / "list.csv").write_text("file,group\nb.png,patient Doe\na.jpg,patient Doe\n", encoding="utf-8")
    tasks = Tasks(planned("images: {folder: photos, list: list.csv}\n"))
    assert [task.image[1] for task in tasks] == ["b.png", "a.jpg"]
    for task in tasks:
        told = json.dumps(task.workflow)
        assert "Doe" not in told and "a.jpg" not in told and "photos" not in told
    groups = {task.workflow["8"]["inputs"]["group"] for task in tasks}
    assert len(groups) == 1 and len(groups.pop()) == 16


def test_a_task_is_known_by_the_images_bytes_and_not_by_its_name(planned, tmp_path):
    before = {task.task_id for task in Tasks(planned("images: photos\n"))}
    (tmp_path / "photos" / "b.png").rename(tmp_path / "photos" / "z.png")
    assert {task.task_id for task in Tasks(planned("images: photos\n"))} == before
    picture((1, 2, 3)).save(tmp_path / "photos" / "z.png")
    assert len({task.task_id for task in Tasks(planned("images: photos\n"))} & before) == 2


def test_pairs_of_concepts_go_to_both_prompts_and_the_labels(planned):
    task = Tasks(planned("images: photos\npairs: [{present: polyps, absent: normal cecum}]\n"))[0]
    texts = [task.workflow[number]["inputs"]["text"] for number in "23"]
    assert texts == ["An endoscopic image of polyps", "An endoscopic image of normal cecum"]
    assert task.workflow["9"]["inputs"]["target_class"] == "normal cecum"


def test_what_is_uploaded_is_upright_and_says_nothing_of_itself():
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker of patient Doe"
    picture((10, 20, 30)).save(buffer, "JPEG", exif=exif)
    sent = upright_png(buffer.getvalue(), "x.jpg")
    assert b"Doe" not in sent
    with Image.open(io.BytesIO(sent)) as shown:
        assert shown.size == (8, 12) and shown.mode == "RGB" and not shown.info and not shown.getexif()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("images: nowhere\n", "there is no folder"),
        ("images: photos\nseeds: 1\n", "'seeds' goes with images that are drawn"),
        ("images: photos\nchunk: 2\n", "'chunk' goes with images that are drawn"),
        ("images: {list: x.csv}\n", "'folder' is missing"),
        ("images: {folder: photos, list: gone.csv}\n", "can't be read as CSV"),
        ("seeds: 1\n", "real 'images' go with Counterfactual of Image, and 'seeds' with Counterfactual Sampler"),
        ("", "seeds or images"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(planned, text, told):
    with pytest.raises(MedSteerError, match=told):
        Tasks(planned(text))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("name\na.jpg\n", "no column 'file'"),
        ("file\na.jpg\nx.png\n", "line 3: there is no file"),
        ("file\n../plan.yaml\n", "line 2: there is no file"),
    ],
)
def test_a_list_that_does_not_fit_names_its_line(planned, tmp_path, rows, told):
    (tmp_path / "list.csv").write_text(rows, encoding="utf-8")
    with pytest.raises(MedSteerError, match=told):
        planned("images: {folder: photos, list: list.csv}\n")


def test_the_same_image_twice_and_no_image_are_said(planned, tmp_path):
    (tmp_path / "photos" / "copy.png").write_bytes((tmp_path / "photos" / "b.png").read_bytes())
    with pytest.raises(MedSteerError, match="copy.png and b.png are the same image"):
        planned("images: photos\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MedSteerError, match="there is no image in"):
        planned("images: empty\n")


def test_a_marker_names_the_file_by_its_hash(planned, tmp_path):
    task = Tasks(planned("images: photos\n"))[0]
    assert task.file_sha256 == hashlib.sha256((tmp_path / "photos" / "a.jpg").read_bytes()).hexdigest()
