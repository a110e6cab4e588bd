"""What a worker makes of a server's answers, with a stand-in for ComfyUI's client."""

import errno
import io
import json

import pytest
from PIL import Image

from medsteer_core.dataset.pair_dataset import PairDataset
from medsteer_core.dataset.records import finish
from medsteer_core.run.server import ServerError
from medsteer_core.run.workflow import ServerUnreachable, WorkflowError, WorkflowFailed
from medsteer_core.scale import worker as worker_module
from medsteer_core.scale.plan import Plan
from medsteer_core.scale.tasks import Tasks
from medsteer_core.scale.worker import CRASH, DONE, FAULT, OUTPUT, START, Settings, Worker

WORKFLOW = {
    "8": {"class_type": "MedSteer_CounterfactualSampler", "inputs": {"seed": 1, "strengths": "1"}},
    "9": {"class_type": "MedSteer_SaveCounterfactualPairs", "inputs": {"record": ["8", 5], "folder": "x"}},
}


def png(shade: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(data, "PNG")
    return data.getvalue()


class Client:
    """Answers a workflow with two pairs of its seed; `error` is raised instead."""

    def __init__(self, error=None, shown=None):
        self.error, self.shown, self.runs = error, shown, 0

    def run(self, workflow, time_limit):
        self.runs += 1
        if self.error:
            raise self.error
        seed = workflow["8"]["inputs"]["seed"]
        records = [
            finish(
                {"made": {"seed": seed, "batch_index": index, "steering": []}, "group_id": f"{seed:08x}{index:08x}"},
                source="polyps", target="clean", split="train",
            )
            for index in (0, 1)
        ]  # fmt: skip
        names = [record[f"{side}_file_name"] for record in records for side in ("factual", "counterfactual")]
        files = [{"filename": name.split("/")[-1], "subfolder": "s", "type": "output"} for name in names]
        self.shown = self.shown or {"medsteer_pairs": records, "images": files}
        return self

    def output(self, title):
        assert title == "MedSteer_SaveCounterfactualPairs"
        return self.shown

    def view(self, filename, subfolder, type):
        return png(200 if "counter" in filename else 100)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """`made(client)`: a worker that talks to it, with the folder of its pairs."""

    def make(client, folder=tmp_path / "pairs"):
        worker = Worker(Settings(str(folder), address="http://127.0.0.1:1"))
        monkeypatch.setattr(worker, "_client", lambda: client)
        return worker

    return make


@pytest.fixture
def task(tmp_path):
    return Tasks(Plan(WORKFLOW, str(tmp_path), [7]))[0]


def files(folder) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_tasks_pairs_are_written_and_then_its_marker(made, task, tmp_path):
    outcome = made(Client()).run(task)
    assert (outcome.kind, outcome.new, len(outcome.pair_ids)) == (DONE, 2, 2)
    assert PairDataset(tmp_path / "pairs").ids() == sorted(outcome.pair_ids)
    marker = json.loads((tmp_path / "pairs" / "tasks" / f"{task.task_id}.json").read_text())
    assert marker == {"task_id": task.task_id, "seed": 7, "pair_ids": sorted(outcome.pair_ids)}


def test_a_half_done_task_is_redone_and_what_was_there_is_not_written_again(made, task, tmp_path):
    outcome = made(Client()).run(task)
    whole = files(tmp_path / "pairs")
    lost = outcome.pair_ids[0]
    (tmp_path / "pairs" / "tasks" / f"{task.task_id}.json").unlink()
    (tmp_path / "pairs" / "records" / lost[:2] / f"{lost}.json").unlink()
    again = made(Client()).run(task)
    assert (again.kind, again.new) == (DONE, 1)
    assert files(tmp_path / "pairs") == whole


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (WorkflowFailed("Steer", "ValueError", "no such site"), FAULT),
        (WorkflowError("the workflow was not finished after 5 s"), CRASH),
        (ServerUnreachable("nobody answers"), CRASH),
        (ConnectionResetError(), CRASH),
    ],
)
def test_a_tasks_own_fault_is_told_apart_from_a_crash(made, task, tmp_path, error, kind):
    outcome = made(Client(error)).run(task)
    assert outcome.kind == kind and str(error) in outcome.error
    assert not (tmp_path / "pairs").exists()


def test_a_comfyui_that_will_not_start_is_told(task, tmp_path, monkeypatch):
    def refuse(*_arguments, **_options):
        raise ServerError("no ComfyUI there")

    monkeypatch.setattr(worker_module, "ComfyServer", refuse)
    outcome = Worker(Settings(str(tmp_path), comfyui=str(tmp_path))).run(task)
    assert outcome.kind == START and outcome.error == "no ComfyUI there"


def test_a_server_that_tells_of_no_pairs_is_the_tasks_fault(made, task):
    assert "told of no pairs" in made(Client(shown={"images": [{}]})).run(task).error


def test_a_full_disk_is_told_and_leaves_no_marker(made, task, tmp_path, monkeypatch):
    worker = made(Client())

    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(worker.dataset.store, "write_whole", full)
    outcome = worker.run(task)
    assert outcome.kind == OUTPUT and "the disk is full" in outcome.error
    assert not list((tmp_path / "pairs").rglob("*.json"))


def test_pairs_go_to_any_fsspec_address(made, task):
    outcome = made(Client(), "memory://scale_worker/pairs").run(task)
    assert (outcome.kind, outcome.new) == (DONE, 2)
    assert PairDataset("memory://scale_worker/pairs").ids() == sorted(outcome.pair_ids)
    assert PairDataset("memory://scale_worker/pairs").store.list("tasks") == [f"tasks/{task.task_id}.json"]
