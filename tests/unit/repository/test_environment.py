"""The environment of dev.py: which one, and how it is made and shared."""

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from medsteer_core.run.server import ServerError

sys.path.append(str(Path(__file__).resolve().parents[2]))  # at the end, so that it hides nothing
import dev_environment as environment  # noqa: E402

PINS = b"torch==2.11.0\n"


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


def test_the_same_pins_give_the_same_environment_and_other_pins_another():
    key = environment.environment_key(PINS, (3, 11))
    assert key == environment.environment_key(PINS, (3, 11)) and len(key) == 16
    in_windows = PINS.replace(b"\n", b"\r\n")  # a checkout of the same file there
    assert key == environment.environment_key(in_windows, (3, 11))
    assert key != environment.environment_key(PINS + b"ruff==1\n", (3, 11))
    assert key != environment.environment_key(PINS, (3, 12))


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
def test_the_cache_is_the_platforms_own(monkeypatch, system, variables, end):
    for name in ("MEDSTEER_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", system)
    assert environment.cache_root().as_posix() == end


def test_every_package_is_pinned_exactly_and_none_by_address():
    lines = [line for line in environment.PINS.read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in line.split(";")[0] and "@" not in line for line in lines)
    assert {"torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"} <= set(lines)


def test_only_comfyui_is_unpacked_from_the_archive(tmp_path):
    sha = archive(tmp_path / "a.tar.gz", {**COMFYUI, "p-1/setup.py": "no", "p-1/vendor/other/x": "no"})
    environment.unpack_comfyui(tmp_path / "a.tar.gz", tmp_path / "out", sha)
    out = tmp_path / "out"
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert found == ["comfy/x.py", "main.py", "nodes.py"]


def test_an_archive_with_another_hash_is_refused_before_it_is_opened(tmp_path):
    archive(tmp_path / "a.tar.gz", COMFYUI)
    with pytest.raises(environment.SetupError, match=f"expected {environment.COMFYUI_SHA256}"):
        environment.unpack_comfyui(tmp_path / "a.tar.gz", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_archive_cannot_write_outside_its_folder(tmp_path):
    sha = archive(tmp_path / "a.tar.gz", {**COMFYUI, "p-1/vendor/ComfyUI/../../../evil": "x"})
    with pytest.raises(environment.SetupError, match="outside"):
        environment.unpack_comfyui(tmp_path / "a.tar.gz", tmp_path / "out", sha)
    sha = archive(tmp_path / "b.tar.gz", COMFYUI, link="p-1/vendor/ComfyUI/link")
    environment.unpack_comfyui(tmp_path / "b.tar.gz", tmp_path / "linked", sha)
    assert not (tmp_path / "linked" / "link").exists()


def test_an_archive_without_comfyui_is_an_error(tmp_path):
    sha = archive(tmp_path / "a.tar.gz", {"p-1/setup.py": "x"})
    with pytest.raises(ServerError, match=r"main\.py"):
        environment.unpack_comfyui(tmp_path / "a.tar.gz", tmp_path / "out", sha)


@pytest.fixture
def making(monkeypatch, tmp_path):
    """An empty cache, and a maker that only notes it was called and writes what a made environment has."""
    made = []

    def make(folder, python):
        made.append(folder)
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "venv" / "bin").mkdir(parents=True)
        (folder / "venv" / "bin" / "python").touch()
        (folder / ".complete").touch()

    monkeypatch.setenv("MEDSTEER_CACHE", str(tmp_path))
    monkeypatch.setattr(environment, "make_environment", make)
    return made


def test_the_environment_is_made_once_and_then_found(making):
    first, second = environment.cached_environment(), environment.cached_environment()
    assert first == second and len(making) == 1
    assert first.comfyui == making[0] / "ComfyUI"


@pytest.mark.parametrize("lost", [".complete", "venv/bin/python"])
def test_a_half_made_environment_is_made_again(making, lost):
    environment.cached_environment()
    (making[0] / lost).unlink()
    again = environment.cached_environment()
    assert len(making) == 2 and (again.comfyui.parent / lost).exists()


def test_a_lock_is_held_by_one_and_freed_when_its_holder_dies(checkout, tmp_path):
    program = "import sys, time, pathlib\nimport dev, dev_environment as environment\n"
    program += "with environment.one_at_a_time(pathlib.Path(sys.argv[1])):\n"
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


def test_too_little_disk_is_said_before_anything_is_made(tmp_path):
    with pytest.raises(environment.SetupError, match=r"GB left; .*MEDSTEER_CACHE"):
        environment.require_disk(tmp_path, 1e18)


def test_a_failing_step_shows_the_end_of_its_log(tmp_path):
    command = [sys.executable, "-c", "print('no matching distribution'); raise SystemExit(3)"]
    with pytest.raises(environment.SetupError, match=r"(?s)installing failed \(status 3\).*no matching distribution"):
        environment.run_logged(command, tmp_path / "setup.log", "installing")


def test_comfyui_path_uses_that_comfyui_and_this_python(monkeypatch, stand_in):
    monkeypatch.setenv("COMFYUI_PATH", str(stand_in))
    assert environment.environment("test") == environment.Environment(sys.executable, stand_in)


def test_comfyui_path_with_packages_missing_names_them(monkeypatch, stand_in):
    monkeypatch.setenv("COMFYUI_PATH", str(stand_in))
    monkeypatch.setitem(environment.NEEDED_BY, "test", ("pytest", "no_such_package"))
    with pytest.raises(environment.SetupError, match=r"lacks no_such_package\. .*unset COMFYUI_PATH"):
        environment.environment("test")
