"""The headless command against a real ComfyUI."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from medsteer_core.run import command as run
from medsteer_core.run.client import ComfyClient
from medsteer_core.run.demo import WORKFLOW
from medsteer_core.run.server import ComfyServer, comfyui_from_environment

FEW = [
    *("--set", "Extract Pathology Vector.samples=1"),
    *("--set", "Extract Pathology Vector.steps=2"),
    *("--set", "Counterfactual Sampler.steps=4"),
]


@pytest.fixture
def command(comfy):
    return lambda *words: run.main([str(WORKFLOW), "--server", comfy.address, *words])


def started(server, checkout, *words):
    """The command as a process of its own, while its workflow runs, and the id of its prompt."""
    names = [sys.executable, "-m", "medsteer_core.run", str(WORKFLOW), "--server", server.address, "--json", *words]
    process = subprocess.Popen(names, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    client, end = ComfyClient(server.address), time.monotonic() + 60
    while not (running := json.loads(client._http.get("/queue"))["queue_running"]):
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process, running[0][1]


def test_the_example_runs_and_its_pair_comes_here(command, tmp_path, capsys):
    assert command(*FEW, "--set", "seed=7", "--output", str(tmp_path), "--json") == run.DONE
    summary = json.loads(capsys.readouterr().out)
    names = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert names == {"medsteer", "previews", "texts"}
    saved = sorted((tmp_path / "medsteer").iterdir())
    assert [path.name.split("_0")[0] for path in saved] == ["counterfactual", "difference", "factual"]
    for path in saved:
        with Image.open(path) as image:
            assert "difference" in path.name or image.size == (128, 128)
            assert json.loads(image.text["prompt"])["8"]["inputs"]["seed"] == 7
    assert sorted(summary["files"]) == sorted(str(path) for path in tmp_path.rglob("*") if path.is_file())


def test_each_image_gets_its_least_strength(command, tmp_path):
    words = ("--set", "Extract Pathology Vector.samples=4", "--set", "passes=2", "--set", "Image size.batch_size=2")
    assert command(*words, "--calibrate", "polyps -> normal cecum", "--output", str(tmp_path)) == run.DONE
    told = "\n".join(path.read_text(encoding="utf-8") for path in (tmp_path / "texts").iterdir())
    assert re.search(r"flipped \d of \d, each at the least strength that does it", told)
    assert len(list((tmp_path / "medsteer").glob("counterfactual*"))) == 2


def test_a_class_that_the_judge_does_not_know_is_told_before_anything_runs(command, capsys):
    assert command("--calibrate", "polips -> normal cecum") == run.REFUSED
    assert "polips" in capsys.readouterr().err


def test_a_node_that_fails_is_named_by_its_title(command, capsys):
    assert command(*FEW, "--set", "Steer.sites=nowhere") == run.FAILED
    assert "error: node Steer: " in capsys.readouterr().err


def test_a_value_that_the_server_refuses_names_node_and_input(command, capsys):
    assert command("--set", "Counterfactual Sampler.scheduler=none") == run.REFUSED
    assert "node Counterfactual Sampler (id 8), input scheduler" in capsys.readouterr().err


def test_a_fraction_is_refused_where_comfyui_would_cut_it_off(command, capsys):
    assert command("--set", "Image size.width=128.5") == run.REFUSED
    assert "a whole number was expected" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_an_interrupted_command_stops_its_prompt_and_no_other(comfy, comfy_server, checkout):
    process, prompt_id = started(comfy_server, checkout, "--set", "Extract Pathology Vector.seed=501")
    other = comfy.queue(
        {
            "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 5}},
            "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        }
    )
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == run.INTERRUPTED and json.loads(out)["status"] == run.INTERRUPTED
    assert comfy.wait(other, {"2": {"class_type": "PreviewImage"}}, 30).output("PreviewImage")["images"]
    assert comfy.status(prompt_id) == "cancelled" and comfy.status(other) == "completed"


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_server_that_is_killed_while_the_workflow_runs_is_told(checkout):
    with ComfyServer(comfyui_from_environment(), checkout, cpu=True) as server:
        words = ("--retries", "1", "--set", "Extract Pathology Vector.seed=502")
        process, _ = started(server, checkout, *words)
        os.kill(server.process.pid, signal.SIGKILL)
        out, said = process.communicate(timeout=60)
    assert process.returncode == run.UNREACHABLE
    assert "the server went away before the workflow was over" in said
    assert json.loads(out)["status"] == run.UNREACHABLE
