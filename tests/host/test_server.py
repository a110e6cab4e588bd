"""The machinery of the host tests, against the real ComfyUI with core nodes only."""

import io
import threading
import time

import pytest
from PIL import Image

from medsteer_core.run.client import ComfyClient
from medsteer_core.run.server import ComfyServer, comfyui_from_environment
from medsteer_core.run.workflow import WorkflowFailed, WorkflowInterrupted, WorkflowRefused

GREY, RED = 0x808080, 0xFF0000


def blank(colour: int = GREY, size: int = 64, batch: int = 1) -> dict:
    """EmptyImage -> SaveImage."""
    inputs = {"width": size, "height": size, "batch_size": batch, "color": colour}
    return {
        "1": {"class_type": "EmptyImage", "inputs": inputs, "_meta": {"title": "Paint"}},
        "2": {
            "class_type": "SaveImage",
            "inputs": {"images": ["1", 0], "filename_prefix": "t"},
            "_meta": {"title": "Saved"},
        },
    }


def test_an_image_comes_back_as_it_was_made(comfy):
    pixels = comfy.run(blank(RED, size=48, batch=2)).pixels("Saved")
    assert pixels.shape == (2, 48, 48, 3)
    assert (pixels == [255, 0, 0]).all()


def test_progress_ends_at_one_and_names_the_nodes(comfy):
    heard = []
    comfy.run(blank(0x010203), heard.append)
    assert heard[-1].fraction == 1.0
    assert [p.fraction for p in heard] == sorted(p.fraction for p in heard)
    assert {"Paint", "Saved"} <= {p.title for p in heard}


def test_a_wrong_input_is_refused_with_node_and_input_named(comfy):
    workflow = blank()
    workflow["1"]["inputs"]["width"] = -5
    with pytest.raises(WorkflowRefused, match=r"node Paint \(id 1\), input width: .*-5"):
        comfy.run(workflow)


def test_an_unknown_node_is_refused_by_name(comfy):
    workflow = blank() | {"3": {"class_type": "NoSuchNode", "inputs": {}}}
    with pytest.raises(WorkflowRefused, match="NoSuchNode"):
        comfy.run(workflow)


def test_a_partly_valid_workflow_is_refused_as_a_whole(comfy):
    wrong = blank(size=-1)
    with pytest.raises(WorkflowRefused, match="input width"):
        comfy.run(
            blank(0x0A0B0C)
            | {"8": wrong["1"], "9": wrong["2"] | {"inputs": {"images": ["8", 0], "filename_prefix": "u"}}}
        )


def test_an_error_in_a_node_names_the_node_and_the_reason(comfy):
    workflow = {
        "1": {
            "class_type": "LoadImage",
            "inputs": {"image": comfy.upload(b"no image", "broken.png")},
            "_meta": {"title": "Load"},
        },
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    with pytest.raises(WorkflowFailed) as caught:
        comfy.run(workflow)
    assert caught.value.node_title == "Load"
    assert caught.value.exception_type.endswith("UnidentifiedImageError")
    assert "Traceback" not in str(caught.value)


def test_an_uploaded_image_goes_through_a_workflow_unchanged(comfy):
    picture = Image.linear_gradient("L").convert("RGB")
    data = io.BytesIO()
    picture.save(data, "PNG")
    workflow = {
        "1": {"class_type": "LoadImage", "inputs": {"image": comfy.upload(data.getvalue(), "gradient.png")}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "g"}},
    }
    assert (comfy.run(workflow).pixels("SaveImage")[0][:, 0, 0] == range(256)).all()


def test_an_interrupt_is_told_apart_from_an_error(comfy):
    # A large blur: seconds of work in a few nodes, so the interrupt falls between two of them.
    workflow = blank(size=2048)
    for node in range(10, 40):
        inputs = {"image": [str(node - 1) if node > 10 else "1", 0], "blur_radius": 31, "sigma": 9.0}
        workflow[str(node)] = {"class_type": "ImageBlur", "inputs": inputs}
    workflow["2"]["inputs"]["images"] = ["39", 0]
    begun, stop = time.monotonic(), threading.Event()

    def stop_in_the_blur(progress):
        if progress.title == "ImageBlur" and not stop.is_set():
            stop.set()
            comfy.interrupt()

    with pytest.raises(WorkflowInterrupted, match="ImageBlur"):
        comfy.run(workflow, stop_in_the_blur)
    assert stop.is_set() and time.monotonic() - begun < 60
    assert comfy.run(blank(0x111111)).pixels("Saved").max() == 0x11  # the server goes on


def test_several_prompts_in_one_queue_keep_their_own_results(comfy):
    colours = [0x010000, 0x020000, 0x030000]
    queued = [(comfy.queue(blank(colour)), blank(colour)) for colour in colours]
    found = [comfy.wait(prompt_id, workflow).pixels("Saved")[0, 0, 0, 0] for prompt_id, workflow in queued]
    assert found == [1, 2, 3]


def test_the_pack_is_loaded_from_its_link_and_hides_no_core_node(comfy, comfy_server):
    known = comfy.object_info()
    assert known["MedSteer_Steer"]["python_module"] == "custom_nodes.medsteer"
    assert known["KSampler"]["python_module"] == "nodes"
    assert str(comfy_server.base / "custom_nodes" / "medsteer") in comfy_server.log_tail(1000)


def test_the_pack_works_from_any_folder_name(checkout, comfy):
    with ComfyServer(comfyui_from_environment(), checkout, cpu=True, name="a pack-2.0") as server:
        renamed = ComfyClient(server.address).object_info()
    packs = {name for name, node in renamed.items() if node["python_module"].startswith("custom_nodes.a pack-2")}
    assert packs == {
        name for name, node in comfy.object_info().items() if node["python_module"] == "custom_nodes.medsteer"
    }
    assert "MedSteer_Steer" in packs
