"""Save Counterfactual Pairs on the real server: what a remote client collects, and what is refused before sampling."""

import copy
import io
import json

import numpy as np
import pytest
from PIL import Image

from medsteer_core.dataset.records import SYNTHETIC, files_of, to_bytes
from medsteer_core.run.demo import WORKFLOW
from medsteer_core.run.workflow import WorkflowFailed, WorkflowRefused

EXAMPLE = json.loads(WORKFLOW.read_text())
SAVE = "MedSteer_SaveCounterfactualPairs"
SETTINGS = {
    "folder": "medsteer/tested", "source_class": "polyps", "target_class": "normal cecum", "split": "auto",
    "judge": "EndoPhantom", "boxes": "both", "metadata": "workflow and record", "arm": "counterfactual",
    "finding_in": "auto", "validation_fraction": 0.1, "test_fraction": 0.1,
}  # fmt: skip


def graph(seed: int = 7, **changes) -> dict:
    """The example up to its decoded pairs, small; two images at strengths 0 and 1, saved as a dataset and as images."""
    nodes = {i: copy.deepcopy(EXAMPLE[i]) for i in ("1", "2", "3", "4", "5", "6", "7", "8", "10", "11", "14")}
    nodes["6"]["inputs"].update(samples=2, steps=6)
    nodes["9"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 2}}
    nodes["8"]["inputs"].update(latent_image=["9", 0], seed=seed, steps=6, strengths="0, 1", lock="none")
    pairs = {"factual": ["10", 0], "counterfactual": ["11", 0], "record": ["8", 5]}
    nodes["30"] = {"class_type": SAVE, "inputs": {**pairs, **SETTINGS, **changes}}
    return nodes


def pixels(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)))


@pytest.fixture(scope="module")
def first(comfy):
    """The first run."""
    return comfy.run(graph())


def test_a_client_gets_every_record_and_file_over_http_alone(comfy, first):
    output = first.output(SAVE)
    records = output["medsteer_pairs"]
    assert [record["made"]["multiple"] for record in records] == [0, 0, 1, 1]
    assert [record["arm"] for record in records] == ["strength 0"] * 2 + ["counterfactual"] * 2
    assert [record["made"]["batch_index"] for record in records] == [0, 1, 0, 1]
    assert {record["made"]["prompts"]["positive"]["text"] for record in records} == {"An endoscopic image of polyps"}
    files = {(item["subfolder"], item["filename"]) for item in output["images"]}
    for record in records:
        for name in files_of(record).values():
            folder, _, file = name.rpartition("/")
            assert (f"medsteer/tested/{folder}", file) in files
        kept = comfy.view(f"{record['pair_id']}.json", f"medsteer/tested/records/{record['pair_id'][:2]}")
        assert kept == to_bytes(record)
    assert "4 of 4 pairs are new in medsteer/tested" in first.text(SAVE)


def test_the_pictures_are_those_of_core_save_image_and_say_more(first):
    saved = [data for data, item in zip(first.images(SAVE), first.output(SAVE)["images"], strict=True)
             if item["filename"].endswith("_counterfactual.png")]  # fmt: skip
    cores = first.images("Counterfactual")
    assert len(saved) == len(cores) == 4
    for ours, core in zip(saved, cores, strict=True):
        assert np.array_equal(pixels(ours), pixels(core))
        with Image.open(io.BytesIO(ours)) as picture, Image.open(io.BytesIO(core)) as other:
            picture.load()
            assert SYNTHETIC in picture.text["XML:com.adobe.xmp"]
            assert json.loads(picture.text["prompt"]).keys() == json.loads(other.text["prompt"]).keys()
            assert json.loads(picture.text["medsteer_record"]) in first.output(SAVE)["medsteer_pairs"]


def test_the_concept_map_can_mark_the_finding_and_a_second_run_adds(comfy, first):
    result = comfy.run(graph(seed=8, mask=["8", 2], judge="none", metadata="marking only"))
    records = result.output(SAVE)["medsteer_pairs"]
    assert {record["mask_source"] for record in records} == {"concept map"}
    assert {record["judge"] for record in records} == {None}
    assert "4 of 4 pairs are new" in result.text(SAVE)
    with Image.open(io.BytesIO(result.images(SAVE)[0])) as picture:
        picture.load()
        assert list(picture.text) == ["XML:com.adobe.xmp"]
    again = comfy.run(graph(judge="none"))
    assert "0 of 4 pairs are new" in again.text(SAVE)
    assert again.output(SAVE)["medsteer_pairs"] == first.output(SAVE)["medsteer_pairs"]


def test_the_same_workflow_gives_the_same_bytes_also_when_nodes_are_cached(comfy, first):
    texts = first.output(SAVE)["medsteer_pairs"]
    other = comfy.run(graph(folder="medsteer/other"))
    assert other.output(SAVE)["medsteer_pairs"] == texts
    for one, two in zip(first.images(SAVE), other.images(SAVE), strict=True):
        assert np.array_equal(pixels(one), pixels(two))
    nodes = graph(folder="medsteer/other")
    nodes["2"]["inputs"]["text"] += "!"  # means the same: everything runs again, and only the words differ
    again = comfy.run(nodes).output(SAVE)["medsteer_pairs"]
    assert [record["pair_id"] for record in again] != [record["pair_id"] for record in texts]
    assert [record["group_id"] for record in again] == [record["group_id"] for record in texts]


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "a\nb", "CON", "C:\\x", "", "a/nul.txt"])
def test_a_folder_that_leads_out_is_refused_before_anything_runs(comfy, name):
    with pytest.raises(WorkflowRefused, match="folder is "):
        comfy.queue(graph(folder=name))


def test_a_link_that_leads_out_of_the_output_folder_is_refused(comfy, comfy_server, tmp_path):
    output = comfy_server.base / "output"
    (output / "link").symlink_to(tmp_path, target_is_directory=True)
    try:
        for name in ("link", "link/pairs"):
            with pytest.raises(WorkflowRefused, match="leads out of the output folder"):
                comfy.queue(graph(folder=name))
    finally:
        (output / "link").unlink()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes, message", [
    ({"source_class": "a\nb"}, "source_class is"), ({"judge": "nobody"}, "no judge 'nobody'"),
    ({"split": "holdout"}, "split"), ({"test_fraction": 1.5}, "test_fraction"),
    ({"source_class": "tumour"}, "the source class is 'tumour'"),
])  # fmt: skip
def test_wrong_settings_are_refused_before_anything_runs(comfy, changes, message):
    with pytest.raises(WorkflowRefused, match=message):
        comfy.queue(graph(**changes))


@pytest.mark.parametrize("seed, changes, message", [
    (1000, {"split": "test"}, "seed 1000, image 0 made the vector.*another seed"),
    (7, {"mask": ["8", 3]}, "had no lock, so it marks the whole image"),
    (7, {"counterfactual": ["10", 0]}, "2 factual images, 2 counterfactual ones and 4 records"),
])  # fmt: skip
def test_what_can_only_be_seen_later_stops_the_node_with_nothing_written(comfy, comfy_server, seed, changes, message):
    with pytest.raises(WorkflowFailed, match=f"(?s){message}"):
        comfy.run(graph(seed=seed, folder="medsteer/refused", **changes))
    assert not (comfy_server.base / "output/medsteer/refused").exists()
