"""dev.py: which environment, how it is made and shared, and what each command's status is."""

import hashlib
import importlib.util
import io
import shutil
import subprocess
import sys
import tarfile
import time

import pytest

from medsteer_core.run.server import ServerError

PINS = b"torch==2.11.0\n"


@pytest.fixture(scope="module")
def dev(checkout):
    """dev.py as a module."""
    spec = importlib.util.spec_from_file_location("dev", checkout / "dev.py")
    module = sys.modules["dev"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def archive(path, files: dict[str, str], link: str | None = None) -> str:
    """A tar.gz of these files; its SHA-256."""
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
        if link:
            member = tarfile.TarInfo(link)
            member.type, member.linkname = tarfile.SYMTYPE, "/etc"
            tar.addfile(member)
    return hashlib.sha256(path.read_bytes()).hexdigest()


COMFYUI = {"p-1/vendor/ComfyUI/main.py": "m", "p-1/vendor/ComfyUI/nodes.py": "n", "p-1/vendor/ComfyUI/comfy/x.py": "x"}


def test_the_same_pins_give_the_same_environment_and_other_pins_another(dev):
    key = dev.environment_key(PINS, (3, 11))
    assert key == dev.environment_key(PINS, (3, 11)) and len(key) == 16
    assert key == dev.environment_key(PINS.replace(b"\n", b"\r\n"), (3, 11))  # a Windows checkout of the same file
    assert key != dev.environment_key(PINS + b"ruff==1\n", (3, 11))
    assert key != dev.environment_key(PINS, (3, 12))


@pytest.mark.parametrize(
    ("system", "variables", "end"),
    [
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/medsteer"),
        ("linux", {"HOME": "/h"}, "/h/.cache/medsteer"),
        ("darwin", {"HOME": "/h"}, "/h/Library/Caches/medsteer"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/medsteer"),
        ("linux", {"MEDSTEER_CACHE": "/m", "XDG_CACHE_HOME": "/x"}, "/m/medsteer"),
    ],
)
def test_the_cache_is_the_platforms_own(dev, monkeypatch, system, variables, end):
    for name in ("MEDSTEER_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", system)
    assert dev.cache_root().as_posix() == end


def test_every_package_is_pinned_exactly_and_none_by_address(dev):
    lines = [line for line in dev.PINS.read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in line.split(";")[0] and "@" not in line for line in lines)
    assert {"torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"} <= set(lines)


def test_only_comfyui_is_unpacked_from_the_archive(dev, tmp_path):
    sha = archive(tmp_path / "a.tar.gz", {**COMFYUI, "p-1/setup.py": "no", "p-1/vendor/other/x": "no"})
    dev.unpack_comfyui(tmp_path / "a.tar.gz", tmp_path / "out", sha)
    out = tmp_path / "out"
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert found == ["comfy/x.py", "main.py", "nodes.py"]


def test_an_archive_with_another_hash_is_refused_before_it_is_opened(dev, tmp_path):
    archive(tmp_path / "a.tar.gz", COMFYUI)
    with pytest.raises(dev.SetupError, match=f"expected {dev.COMFYUI_SHA256}"):
        dev.unpack_comfyui(tmp_path / "a.tar.gz", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_archive_cannot_write_outside_its_folder(dev, tmp_path):
    sha = archive(tmp_path / "a.tar.gz", {**COMFYUI, "p-1/vendor/ComfyUI/../../../evil": "x"})
    with pytest.raises(dev.SetupError, match="outside"):
        dev.unpack_comfyui(tmp_path / "a.tar.gz", tmp_path / "out", sha)
    sha = archive(tmp_path / "b.tar.gz", COMFYUI, link="p-1/vendor/ComfyUI/link")
    dev.unpack_comfyui(tmp_path / "b.tar.gz", tmp_path / "linked", sha)
    assert not (tmp_path / "linked" / "link").exists()


def test_an_archive_without_comfyui_is_an_error(dev, tmp_path):
    sha = archive(tmp_path / "a.tar.gz", {"p-1/setup.py": "x"})
    with pytest.raises(ServerError, match=r"main\.py"):
        dev.unpack_comfyui(tmp_path / "a.tar.gz", tmp_path / "out", sha)


@pytest.fixture
def making(dev, monkeypatch, tmp_path):
    """An empty cache, and a maker that only notes it was called and writes what a made environment has."""
    made = []

    def make(folder, python):
        made.append(folder)
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "venv" / "bin").mkdir(parents=True)
        (folder / "venv" / "bin" / "python").touch()
        (folder / ".complete").touch()

    monkeypatch.setenv("MEDSTEER_CACHE", str(tmp_path))
    monkeypatch.setattr(dev, "make_environment", make)
    return made


def test_the_environment_is_made_once_and_then_found(dev, making):
    first, second = dev.cached_environment(), dev.cached_environment()
    assert first == second and len(making) == 1
    assert first.comfyui == making[0] / "ComfyUI"


@pytest.mark.parametrize("lost", [".complete", "venv/bin/python"])
def test_a_half_made_environment_is_made_again(dev, making, lost):
    dev.cached_environment()
    (making[0] / lost).unlink()
    again = dev.cached_environment()
    assert len(making) == 2 and (again.comfyui.parent / lost).exists()


def test_a_lock_is_held_by_one_and_freed_when_its_holder_dies(dev, checkout, tmp_path):
    program = "import sys, time, pathlib, dev\nwith dev.one_at_a_time(pathlib.Path(sys.argv[1])):\n"
    program += "    print('in', flush=True)\n    time.sleep(60)\n"
    holder = [sys.executable, "-c", program, str(tmp_path / "lock")]
    first = subprocess.Popen(holder, cwd=checkout, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "in\n"
    second = subprocess.Popen(holder, cwd=checkout, stdout=subprocess.PIPE, text=True)
    assert "waiting" in second.stdout.readline()
    first.kill()
    first.wait()
    begun = time.monotonic()
    assert second.stdout.readline() == "in\n" and time.monotonic() - begun < 5
    second.kill()
    second.wait()


def test_too_little_disk_is_said_before_anything_is_made(dev, tmp_path):
    with pytest.raises(dev.SetupError, match=r"GB left; .*MEDSTEER_CACHE"):
        dev.require_disk(tmp_path, 1e18)


def test_a_failing_step_shows_the_end_of_its_log(dev, tmp_path):
    command = [sys.executable, "-c", "print('no matching distribution'); raise SystemExit(3)"]
    with pytest.raises(dev.SetupError, match=r"(?s)installing failed \(status 3\).*no matching distribution"):
        dev.run_logged(command, tmp_path / "setup.log", "installing")


def test_comfyui_path_uses_that_comfyui_and_this_python(dev, monkeypatch, stand_in):
    monkeypatch.setenv("COMFYUI_PATH", str(stand_in))
    assert dev.environment("test") == dev.Environment(sys.executable, stand_in)


def test_comfyui_path_with_packages_missing_names_them(dev, monkeypatch, stand_in):
    monkeypatch.setenv("COMFYUI_PATH", str(stand_in))
    monkeypatch.setitem(dev.NEEDED_BY, "test", ("pytest", "no_such_package"))
    with pytest.raises(dev.SetupError, match=r"lacks no_such_package\. .*unset COMFYUI_PATH"):
        dev.environment("test")


@pytest.mark.parametrize(
    ("ruff", "tests", "status"),
    [(0, [0, 0], 0), (1, [0, 0], 1), (0, [1, 0], 1), (0, [0, 2], 2), (0, [5, 0], 0), (0, [0, 5], 0), (0, [5, 5], 5)],
)
def test_the_status_of_test_is_bad_when_any_part_is(dev, ruff, tests, status):
    assert dev.overall_status(ruff, tests) == status


def test_unit_host_and_browser_tests_run_apart_unless_paths_are_named(dev):
    assert dev.suites(["-k", "steer"]) == [["tests/unit"], ["tests/host"], ["tests/browser"]]
    assert dev.suites(["-k", "steer"], browser=False) == [["tests/unit"], ["tests/host"]]
    assert dev.suites(["tests/unit/repository/test_dev.py::test_x"]) == [[]]


@pytest.fixture
def only_path(monkeypatch, tmp_path):
    """A PATH with nothing but an empty folder, and no variable that says anything about a browser."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PATHEXT", ".exe")
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.delenv("MEDSTEER_BROWSER", raising=False)
    return tmp_path


def program(path):
    path = path.with_suffix(".exe") if sys.platform == "win32" else path
    path.write_text("")
    path.chmod(0o755)
    return str(path)


def test_the_chromium_is_what_the_variable_names_else_the_first_on_the_path(dev, monkeypatch, only_path):
    assert dev.chromium() is None
    chrome = program(only_path / "google-chrome")
    assert dev.chromium() == chrome
    chromium = program(only_path / "chromium")
    assert dev.chromium() == chromium
    monkeypatch.setenv("CHROMIUM", chrome)
    assert dev.chromium() == chrome
    monkeypatch.setenv("CHROMIUM", str(only_path / "gone"))
    with pytest.raises(dev.SetupError, match="CHROMIUM names .*gone, which is no program"):
        dev.chromium()


def test_without_a_chromium_the_browser_tests_are_left_out_and_that_is_said(dev, monkeypatch, capsys, only_path):
    ran = []
    monkeypatch.setattr(dev, "environment", lambda command: dev.Environment(sys.executable, dev.ROOT))
    monkeypatch.setattr(dev, "run_child", lambda command, made, **variables: ran.append((command[3:], variables)) or 0)
    assert dev.main(["test"]) == 0
    assert ran == [(["check", "."], {}), (["tests/unit"], {}), (["tests/host"], {})]
    assert "NOT RUN: the browser tests: no Chromium was found" in capsys.readouterr().out
    chromium = program(only_path / "chromium")
    monkeypatch.setattr(dev, "browser_lacks", lambda made: None)
    assert dev.main(["test"]) == 0
    assert ran[-1] == (["tests/browser"], {"CHROMIUM": chromium})
    assert "NOT RUN" not in capsys.readouterr().out


def test_a_required_browser_that_is_missing_is_a_failure_and_nothing_runs(dev, monkeypatch, capsys, only_path):
    monkeypatch.setattr(dev, "environment", lambda command: dev.Environment(sys.executable, dev.ROOT))
    monkeypatch.setattr(dev, "run_child", None)
    assert dev.main(["export"]) == 1
    assert "exported by ComfyUI's front end in a browser, but no Chromium was found" in capsys.readouterr().err
    monkeypatch.setenv("MEDSTEER_BROWSER", "required")
    assert dev.main(["test"]) == 1
    assert "MEDSTEER_BROWSER=required is set, but no Chromium was found" in capsys.readouterr().err


def test_words_that_dev_does_not_know_are_passed_on(dev, monkeypatch):
    passed = []
    monkeypatch.setattr(dev, "environment", lambda command: dev.Environment("python", dev.ROOT))
    monkeypatch.setattr(dev, "run_child", lambda command, made: passed.append(command) or 0)
    assert dev.main(["demo", "--seed", "3", "--", "--output", "x"]) == 0
    assert passed == [["python", "-m", "medsteer_core.run.demo", "--seed", "3", "--output", "x"]]


def test_a_missing_or_unknown_benchmark_is_answered_with_those_there_are(dev, monkeypatch, capsys):
    monkeypatch.setattr(dev, "benchmarks", lambda: ["pair", "speed"])
    assert dev.main(["bench", "nonesuch"]) == 1 and dev.main(["bench"]) == 1
    said = capsys.readouterr().err
    assert "no benchmark 'nonesuch'; those there are: pair, speed" in said and "name a benchmark" in said
