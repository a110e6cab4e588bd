"""A headless ComfyUI with one checkout of this pack as its only custom node, started and always stopped again.

Also when this process is killed: an `OrphanWatch` ends the server then.

Standard library only: dev.py runs it under any Python, tests and benchmarks under the environment's Python. The user's
own ComfyUI folder is never written to: every run has a base directory of its own (ComfyUI's `--base-directory`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from .orphan_watch import OrphanWatch, remove_base

PACK_NAME = "medsteer"
KEPT_FOLDERS = ("models", "input", "output", "user")
# What a copy of the checkout leaves out; only Windows without links ever copies.
NOT_COPIED = (".git", "output", "__pycache__", ".venv")
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(RuntimeError):
    """ComfyUI could not be started, or the pack could not be loaded into it."""


def comfyui_from_environment() -> Path:
    """The ComfyUI folder that `COMFYUI_PATH` names; dev.py sets it for everything it starts.

    Raises ServerError when the variable is missing or names no ComfyUI.
    """
    value = os.environ.get("COMFYUI_PATH")
    if not value:
        raise ServerError("COMFYUI_PATH is not set. Run this through dev.py (for example `python dev.py test`).")
    return checked_comfyui(Path(value))


def checked_comfyui(folder: Path) -> Path:
    """`folder` made absolute, when it holds ComfyUI's main.py and nodes.py; ServerError otherwise."""
    folder = folder.expanduser().resolve()
    if not all((folder / name).is_file() for name in ("main.py", "nodes.py")):
        raise ServerError(f"{folder} holds no ComfyUI: main.py and nodes.py were expected in it. Check COMFYUI_PATH.")
    return folder


def free_port(first: int | None = None, host: str = "127.0.0.1") -> int:
    """A port nobody listens on: the first free one from `first`, or any when `first` is None."""
    for port in range(first, min(first + 200, 65536)) if first else (0,):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
            if os.name != "nt":  # there it would allow a port that is taken; elsewhere one just given back is free
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return probe.getsockname()[1]
    raise ServerError(f"no free port on {host} between {first} and {first + 199}. Choose another with --port.")


def has_accelerator(python: str) -> bool:
    """Whether torch in the Python at `python` sees a GPU (CUDA, ROCm, Metal or XPU)."""
    question = "import torch; a = getattr(torch, 'accelerator', torch.cuda); print(a.is_available())"
    answer = subprocess.run([python, "-c", question], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise ServerError(f"{python} cannot import torch:\n{answer.stderr.strip()[-800:]}")
    return answer.stdout.strip().endswith("True")


def link_checkout(checkout: Path, link: Path) -> None:
    """Make `link` show the folder `checkout`: a symbolic link, on Windows else a junction, else a copy."""
    try:
        link.symlink_to(checkout, target_is_directory=True)
        return
    except OSError:
        if os.name != "nt":
            raise
    junction = subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(checkout)], capture_output=True, check=False)
    if junction.returncode:
        shutil.copytree(checkout, link, ignore=shutil.ignore_patterns(*NOT_COPIED))


@contextlib.contextmanager
def signals_as_interrupt():
    """Within it SIGTERM and SIGHUP raise KeyboardInterrupt, so that `with` blocks and `finally` run.

    Does nothing outside the main thread, and where the signal already has a handler.
    """
    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    taken = []
    for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _raise_interrupt)
            taken.append(number)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _raise_interrupt(number, _frame):
    raise KeyboardInterrupt(f"signal {number}")


class ComfyServer:
    """A ComfyUI process as a context manager: running and answering inside the `with`, gone after it.

    comfyui: ComfyUI's folder. checkout: the pack's folder. python: the interpreter that has ComfyUI's packages.
    cpu: True for `--cpu`; None asks torch. keep: a folder in which models, input, output and saved workflows stay
    after the run; None keeps nothing. name: the pack's folder name under custom_nodes. start_limit: seconds.
    """

    def __init__(
        self,
        comfyui: Path,
        checkout: Path,
        *,
        python: str = sys.executable,
        port: int | None = None,
        listen: str = "127.0.0.1",
        cpu: bool | None = None,
        keep: Path | None = None,
        name: str = PACK_NAME,
        extra: tuple[str, ...] = (),
        start_limit: float = 300.0,
    ):
        self.comfyui, self.checkout, self.python = checked_comfyui(Path(comfyui)), Path(checkout).resolve(), python
        self.port, self.listen, self.cpu, self.keep, self.name = port, listen, cpu, keep, name
        self.extra, self.start_limit = extra, start_limit
        self.process: subprocess.Popen | None = None
        self.base: Path | None = None
        self._watch: OrphanWatch | None = None
        self.seconds_to_start = 0.0
        self._signals = contextlib.ExitStack()

    @property
    def address(self) -> str:
        """Where this machine reaches the server, such as `http://127.0.0.1:8188`."""
        host = self.listen.split(",")[0]
        if host in ("0.0.0.0", "::"):
            host = "127.0.0.1"
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def device(self) -> str:
        return "CPU" if self.cpu else "GPU"

    def __enter__(self) -> ComfyServer:
        self._signals.enter_context(signals_as_interrupt())
        try:
            self._start()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_exception) -> None:
        self.stop()

    def command(self) -> list[str]:
        """The command line of the server process."""
        arguments = ["--base-directory", str(self.base), "--listen", self.listen, "--port", str(self.port)]
        # ComfyUI's default database stands in its own folder, which is not ours to write to, and two servers lock it.
        arguments += ["--disable-auto-launch", "--database-url", "sqlite:///:memory:"]
        arguments += ["--disable-api-nodes", "--disable-all-custom-nodes", "--whitelist-custom-nodes", self.name]
        if self.keep:
            folders = {name: str(self.keep.resolve() / name) for name in KEPT_FOLDERS}
            arguments += [word for name, path in folders.items() for word in (f"--{name}-directory", path)]
        return [self.python, str(self.comfyui / "main.py"), *arguments, *(["--cpu"] if self.cpu else []), *self.extra]

    def log_tail(self, lines: int = 25) -> str:
        """The last lines that the server wrote."""
        if self.base is None or not (self.base / "comfyui.log").is_file():
            return ""
        text = (self.base / "comfyui.log").read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def stop(self) -> None:
        """End the server with everything it started and remove its base directory; harmless when called again."""
        try:
            if self.process is not None:
                _end_process_tree(self.process)
        finally:
            self.process = None
            if self._watch is not None:
                self._watch.release()
                self._watch = None
            if self.base is not None:
                remove_base(self.base, self.base / "custom_nodes" / self.name)
                self.base = None
            self._signals.close()

    def _start(self) -> None:
        if self.cpu is None:
            self.cpu = not has_accelerator(self.python)
        if self.port is None:
            self.port = free_port(host="127.0.0.1")
        self.base = Path(tempfile.mkdtemp(prefix="medsteer-"))
        for folder in ("custom_nodes", "temp", *KEPT_FOLDERS):
            (self.base / folder).mkdir()
            if self.keep and folder in KEPT_FOLDERS:
                (self.keep / folder).mkdir(parents=True, exist_ok=True)
        link_checkout(self.checkout, self.base / "custom_nodes" / self.name)
        # A group of its own: a Ctrl-C in the terminal reaches only us, and we end the server in order.
        windows = os.name == "nt"
        group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if windows else {"start_new_session": True}
        self._watch = OrphanWatch()  # before the server, so that it is ready when there is something to watch
        with open(self.base / "comfyui.log", "wb") as log:
            self.process = subprocess.Popen(
                self.command(),
                cwd=self.base,
                env=_server_environment(self.checkout),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                **group,
            )
        self._watch.tell(self.process.pid, self.base, self.base / "custom_nodes" / self.name)

    def _wait_until_ready(self) -> None:
        begun = time.monotonic()
        while True:
            with contextlib.suppress(OSError, ValueError):
                with _NO_PROXY.open(self.address + "/object_info", timeout=30) as answer:
                    json.load(answer)
                break
            if self.process.poll() is not None:
                what = f"ComfyUI ended with status {self.process.returncode} while starting"
                raise ServerError(f"{what}. Its log ends:\n{self.log_tail()}")
            if time.monotonic() - begun > self.start_limit:
                what = f"ComfyUI did not answer within {self.start_limit:.0f} s"
                raise ServerError(f"{what}. Its log ends:\n{self.log_tail()}")
            time.sleep(0.1)
        # Another program may have taken the port and answered in ComfyUI's place.
        if self.process.poll() is not None:
            raise ServerError(f"port {self.port} belongs to another program. ComfyUI's log ends:\n{self.log_tail()}")
        self.seconds_to_start = time.monotonic() - begun
        log = self.log_tail(400)
        if "IMPORT FAILED" in log:
            raise ServerError(f"ComfyUI started, but could not import this pack. Its log ends:\n{log[-6000:]}")


def _server_environment(checkout: Path) -> dict[str, str]:
    """Our environment without the checkout on PYTHONPATH: its `nodes` folder must never hide ComfyUI's `nodes`."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    paths = [path for path in environment.pop("PYTHONPATH", "").split(os.pathsep) if path]
    paths = [path for path in paths if Path(path).resolve() != checkout]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths)} if paths else environment


def _end_process_tree(process: subprocess.Popen, grace: float = 10.0) -> None:
    """Ask the process and its group to end, and kill what is left after `grace` seconds."""
    if os.name == "nt":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True, check=False)
        process.wait(grace)
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        pass
    finally:  # also after a second Ctrl-C: no more asking, and whatever outlived the leader goes too
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
