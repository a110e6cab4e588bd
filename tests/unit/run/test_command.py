"""The headless command, against a small server in this process: statuses, files, what it prints."""

import json
import sys
import threading

import pytest

from medsteer_core.run import command as run
from medsteer_core.run.command import DONE, FAILED, INTERRUPTED, REFUSED, UNREACHABLE

WORKFLOW = {
    "7": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "name": "t"}, "_meta": {"title": "Saved"}},
    "8": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 4}},
}


@pytest.fixture
def command(fake, tmp_path, monkeypatch):
    """Runs the command on the fake server with further words; its exit status."""
    monkeypatch.delenv("MEDSTEER_TOKEN", raising=False)
    path = tmp_path / "w.json"
    path.write_text(json.dumps(WORKFLOW))
    return lambda *words: run.main([str(path), "--server", fake.address, "--retries", "2", *words])


def image(name="a.png", subfolder="", kind="output"):
    return {"filename": name, "subfolder": subfolder, "type": kind}


def test_a_run_with_values_set_brings_its_files_here(command, fake, tmp_path, capsys):
    fake.entry["outputs"] = {"7": {"images": [image(subfolder="deep/er"), image(kind="temp")], "text": ["a", "b"]}}
    assert command("--set", "seed=7", "--output", str(tmp_path / "out")) == DONE
    assert fake.queued[0][2]["8"]["inputs"] == {"seed": 7, "steps": 4}
    data, out = fake.files["a.png"], tmp_path / "out"
    text = out / "texts" / f"Saved_7_{fake.queued[0][1][:8]}.txt"
    found = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert found == {out / "deep/er/a.png": data, out / "previews/a.png": data, text: b"a\nb\n"}
    printed = capsys.readouterr().out
    assert "KSampler (#8), seed: 1 -> 7" in printed and str(out / "deep/er/a.png") in printed and "done in" in printed


def test_json_is_the_only_line_on_standard_output(command, fake, tmp_path, capsys):
    assert command("--json", "--output", str(tmp_path / "out")) == DONE
    summary = json.loads(capsys.readouterr().out)
    assert summary["status"] == 0 and summary["prompt_id"] == fake.queued[0][1]
    assert summary["files"] == [str(tmp_path / "out" / "a.png")] and summary["outputs"] == fake.entry["outputs"]
    fake.status, fake.answer = 400, {"error": {"message": "bad"}, "node_errors": {}}
    assert command("--json") == REFUSED
    failure = json.loads(capsys.readouterr().out)
    assert failure["status"] == REFUSED and "bad" in failure["error"]


def test_a_dry_run_prints_the_workflow_and_queues_nothing(command, fake, capsys):
    assert command("--set", "seed=7", "--dry-run") == DONE
    printed = capsys.readouterr()
    assert json.loads(printed.out)["8"]["inputs"]["seed"] == 7 and "1 -> 7" in printed.err
    assert fake.calls == [] and fake.headers == []


def test_a_node_that_fails_is_named(command, fake, capsys):
    error = {"node_id": "8", "exception_type": "ValueError", "exception_message": "no room", "traceback": []}
    fake.entry = {"status": {"status_str": "error", "messages": [["execution_error", error]]}, "outputs": {}}
    assert command() == FAILED and "error: node KSampler: ValueError: no room" in capsys.readouterr().err


def test_a_cancel_on_the_server_is_told_as_an_interruption(command, fake, capsys):
    messages = [["execution_interrupted", {"node_id": "8"}]]
    fake.entry = {"status": {"status_str": "error", "messages": messages}, "outputs": {}}
    assert command() == INTERRUPTED and "interrupted in node KSampler" in capsys.readouterr().err


def test_an_interrupted_command_cancels_its_prompt(command, fake, monkeypatch):
    def stop(_line, _progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.ProgressLine, "__call__", stop)
    assert command() == INTERRUPTED and fake.cancelled() == [fake.queued[0][1]]


def test_a_server_that_dies_is_told(command, fake, capsys):
    fake.script, fake.entry = [], None
    threading.Timer(0.3, lambda: setattr(fake, "dead", True)).start()
    assert command() == UNREACHABLE and "went away before the workflow was over" in capsys.readouterr().err


def test_a_server_with_errors_that_pass_costs_nothing(command, fake, tmp_path):
    fake.failing = {"/prompt": [500, 500], "/ws": ["drop"], "/history": ["drop"], "/view": [503, "drop"]}
    assert command("--output", str(tmp_path / "out")) == DONE
    assert (tmp_path / "out" / "a.png").read_bytes() == fake.files["a.png"] and len(fake.queued) == 1


def test_another_program_at_the_address_is_told(command, fake, capsys):
    fake.failing["/prompt"] = [200]
    assert command() == UNREACHABLE and "not as a ComfyUI would" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--set", "steps=2.5"], "a whole number was expected"),
        (["--set", "nothing=1"], "no input is named 'nothing'"),
        (["--server", "localhost:8188"], "no address of a server"),
        (["--header", "secret"], "--header wants"),
        (["--header", "A: b\r\nC: d"], "a character that headers can't carry"),
        (["--retries", "-1"], "--retries wants"),
        (["--timeout", "nan"], "--timeout"),
        (["--time-limit", "0"], "--time-limit"),
        (["--output", __file__], "is a file"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_queued(command, fake, capsys, words, message):
    assert command(*words) == REFUSED and fake.queued == []
    said = capsys.readouterr().err
    assert message in said and "secret" not in said.replace("--header wants", "")


def test_a_missing_workflow_file_is_named(capsys):
    assert run.main(["nowhere.json"]) == REFUSED
    assert "nowhere.json can't be read" in capsys.readouterr().err


def test_a_token_comes_from_the_environment_or_a_header():
    assert run.headers_of([], {"MEDSTEER_TOKEN": "t"}) == {"Authorization": "Bearer t"}
    assert run.headers_of(["Authorization: Basic x", "X-Key:1"], {"MEDSTEER_TOKEN": "t"}) == {
        "Authorization": "Basic x",
        "X-Key": "1",
    }


@pytest.mark.parametrize(
    "item",
    [
        image("../a.png"),
        image("/etc/a.png"),
        image("a.png", "../.."),
        image("a.png", "/tmp"),
        image("..\\a.png"),
        image("C:\\a.png"),
        image("a\n.png"),
        image("CON"),
        image(".bashrc"),
        image("config", ".ssh"),
        image("a.png", kind="../x"),
        image("a.png", "link"),
    ],
)
def test_a_file_name_from_the_server_never_leaves_the_folder(command, fake, tmp_path, item):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    fake.entry["outputs"] = {"7": {"images": [item]}}
    fake.files[item["filename"]] = b"evil"
    assert command("--output", str(tmp_path / "out")) == FAILED
    assert sorted(tmp_path.rglob("*")) == before


def test_another_file_of_that_name_is_kept_unless_told_otherwise(command, fake, tmp_path, capsys):
    fake.entry["outputs"] = {"7": {"images": [image(), image("b.png")]}}
    fake.files["b.png"] = b"new"
    (tmp_path / "a.png").write_bytes(b"mine")
    assert command("--output", str(tmp_path)) == FAILED
    assert (tmp_path / "a.png").read_bytes() == b"mine" and (tmp_path / "b.png").read_bytes() == b"new"
    assert f"{tmp_path / 'a.png'}: there already" in capsys.readouterr().err
    assert command("--output", str(tmp_path), "--overwrite") == DONE
    assert (tmp_path / "a.png").read_bytes() == fake.files["a.png"]
    assert command("--output", str(tmp_path)) == DONE  # the same content is no conflict


def test_help_tells_the_exit_statuses_and_needs_no_torch(capsys):
    import subprocess

    code = "import sys, medsteer_core.run.command; print({'torch', 'numpy', 'PIL', 'aiohttp'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
    with pytest.raises(SystemExit):
        run.main(["--help"])
    said = capsys.readouterr().out
    assert all(f"\n  {status}" in said for status in (DONE, FAILED, REFUSED, UNREACHABLE, INTERRUPTED))
