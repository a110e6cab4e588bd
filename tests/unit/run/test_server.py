"""Starting and stopping a server, against a stand-in for ComfyUI that starts at once."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import psutil
import pytest

from medsteer_core.run import server as server_module
from medsteer_core.run.server import ComfyServer, ServerError, free_port, link_checkout, remove_base


def told(server: ComfyServer) -> dict:
    """What the stand-in says of itself."""
    return json.load(urllib.request.urlopen(server.address + "/object_info"))


def gone(pid: int) -> bool:
    """Whether no process has this id any more (a zombie that waits for its parent counts as gone)."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def pack(tmp_path):
    folder = tmp_path / "some pack"
    folder.mkdir()
    (folder / "__init__.py").write_text("precious = True")
    return folder


def test_the_checkout_is_the_only_custom_node_and_the_only_one_allowed(stand_in, pack):
    with ComfyServer(stand_in, pack, cpu=True) as server:
        answer = told(server)
    assert answer["packs"] == ["medsteer"]
    words = answer["arguments"]
    assert words[words.index("--whitelist-custom-nodes") + 1] == "medsteer"
    assert "--disable-all-custom-nodes" in words and "--cpu" in words


def test_the_checkout_is_never_on_the_servers_module_path(stand_in, pack, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(pack), str(tmp_path / "kept")]))
    with ComfyServer(stand_in, pack, cpu=True) as server:
        path = told(server)["path"]
    assert str(pack) not in path and str(tmp_path / "kept") in path
    assert path[0] == str(stand_in)


def test_after_the_block_the_process_the_port_and_the_base_directory_are_gone(stand_in, pack):
    with ComfyServer(stand_in, pack, cpu=True) as server:
        pid, base, port = told(server)["pid"], server.base, server.port
    assert gone(pid) and not base.exists()
    assert free_port(port) == port
    assert (pack / "__init__.py").read_text() == "precious = True"


def test_an_error_in_the_block_stops_the_server_too(stand_in, pack):
    with pytest.raises(ZeroDivisionError), ComfyServer(stand_in, pack, cpu=True) as server:
        pid = told(server)["pid"]
        raise ZeroDivisionError
    assert gone(pid)


def test_a_server_that_fails_to_start_shows_the_end_of_its_log(stand_in, pack):
    with pytest.raises(ServerError, match=r"(?s)status 1 while starting.*told to fail"):
        ComfyServer(stand_in, pack, cpu=True, extra=("--fail",)).__enter__()


def test_a_server_that_never_answers_is_given_up_after_the_limit(stand_in, pack):
    (stand_in / "main.py").write_text("import time; print('still loading', flush=True); time.sleep(60)")
    server, begun = ComfyServer(stand_in, pack, cpu=True, start_limit=1.0), time.monotonic()
    with pytest.raises(ServerError, match=r"(?s)within 1 s.*still loading"):
        server.__enter__()
    assert time.monotonic() - begun < 20 and server.process is None


def test_a_pack_that_cannot_be_imported_is_an_error(stand_in, pack):
    main = (stand_in / "main.py").read_text()
    (stand_in / "main.py").write_text(main.replace("this is the stand-in", "0.0 seconds (IMPORT FAILED): /x/medsteer"))
    with pytest.raises(ServerError, match="could not import this pack"):
        ComfyServer(stand_in, pack, cpu=True).__enter__()


# Windows ends a process without telling it.
@pytest.mark.parametrize("number", [] if os.name == "nt" else [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_program_stops_its_server(stand_in, pack, checkout, number):
    program = (
        "import signal, sys, time, json, urllib.request\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # as on a terminal, also where it is ignored
        "from medsteer_core.run.server import ComfyServer\n"
        "with ComfyServer(sys.argv[1], sys.argv[2], cpu=True) as server:\n"
        "    told = json.load(urllib.request.urlopen(server.address + '/object_info'))\n"
        "    print(told['pid'], server.base, flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(stand_in), str(pack)]
    ours = subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    pid, base = ours.stdout.readline().split()
    ours.send_signal(number)
    assert ours.wait(20) != 0
    assert gone(int(pid)) and not os.path.exists(base)


def test_what_a_user_makes_can_be_kept_outside_the_base_directory(stand_in, pack, tmp_path):
    keep = tmp_path / "kept"
    with ComfyServer(stand_in, pack, cpu=True, keep=keep) as server:
        words = told(server)["arguments"]
    assert words[words.index("--models-directory") + 1] == str(keep / "models")
    assert sorted(path.name for path in keep.iterdir()) == ["input", "models", "output", "user"]


def test_removing_a_base_directory_never_reaches_through_the_link(tmp_path, pack):
    base = tmp_path / "base"
    base.mkdir()
    link_checkout(pack, base / "link")
    assert (base / "link" / "__init__.py").is_file()
    remove_base(base, base / "link")
    assert not base.exists() and (pack / "__init__.py").is_file()


def test_a_copied_checkout_is_removed_with_its_base_directory(tmp_path):
    copy = tmp_path / "base" / "copy"
    copy.mkdir(parents=True)
    (copy / "file").write_text("x")
    remove_base(tmp_path / "base", copy)
    assert not (tmp_path / "base").exists()


def test_the_first_free_port_skips_one_that_is_taken(stand_in, pack):
    with ComfyServer(stand_in, pack, cpu=True) as server:
        assert server.port < free_port(server.port) < server.port + 200


def test_a_missing_or_wrong_comfyui_path_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    with pytest.raises(ServerError, match=r"not set.*python dev\.py test"):
        server_module.comfyui_from_environment()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(ServerError, match=r"main\.py and nodes\.py"):
        server_module.comfyui_from_environment()


def test_the_address_is_one_that_this_machine_can_open(stand_in, pack):
    seen = {"0.0.0.0": "http://127.0.0.1:8", "::1": "http://[::1]:8", "10.0.0.1,::": "http://10.0.0.1:8"}
    for listen, address in seen.items():
        assert ComfyServer(stand_in, pack, port=8, listen=listen).address == address


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_program_takes_its_server_and_its_folder_along(stand_in, pack, checkout):
    program = (
        "import signal, sys, time, json, urllib.request\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # as on a terminal, also where it is ignored
        "from medsteer_core.run.server import ComfyServer\n"
        "with ComfyServer(sys.argv[1], sys.argv[2], cpu=True) as server:\n"
        "    told = json.load(urllib.request.urlopen(server.address + '/object_info'))\n"
        "    print(told['pid'], server.base, flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(stand_in), str(pack)]
    ours = subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    pid, base = ours.stdout.readline().split()
    os.kill(int(pid), signal.SIGSTOP)  # a server that hangs hears no request to end
    ours.kill()
    begun = time.monotonic()
    while (not gone(int(pid)) or os.path.exists(base)) and time.monotonic() - begun < 10:
        time.sleep(0.05)
    assert gone(int(pid)) and not os.path.exists(base)
    assert (pack / "__init__.py").read_text() == "precious = True"


def test_a_server_that_was_stopped_leaves_no_watch_behind(stand_in, pack):
    with ComfyServer(stand_in, pack, cpu=True) as server:
        watch = psutil.Process(server._watch.pid)
        assert "orphan_watch" in " ".join(watch.cmdline())
        # Ray kills the children of a worker that it ends, and the watch is to outlive them.
        assert watch not in psutil.Process().children(recursive=True)
    psutil.wait_procs([watch], 5)
    assert gone(watch.pid)
