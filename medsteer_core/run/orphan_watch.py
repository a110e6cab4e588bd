"""Ends a server whose owner has died without a word (`kill -9`, the out-of-memory killer): no orphan keeps a GPU.

Runs as a process of its own. It reads a pipe that only the owner holds open: its end means that the owner is gone. Then
the server's process group is killed, however deep the server hangs, and its folder removed. Standard library only.

    python -I orphan_watch.py    # standard input: one line of JSON, {"pid": ..., "base": ..., "link": ...}
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path


class OrphanWatch:
    """The watching process of one server. `tell` once the server runs, `release` once it was stopped in order."""

    def __init__(self) -> None:
        windows = os.name == "nt"
        # A group of its own: what ends the owner's group must not end the watch.
        group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if windows else {"start_new_session": True}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        command = [sys.executable, "-I", "-S", str(Path(__file__).resolve())]
        self._process = subprocess.Popen(command, **pipes, **group)
        with self._process.stdout as answer:
            self.pid = int(answer.readline() or 0)

    def tell(self, pid: int, base: Path, link: Path) -> None:
        """What is to go with the owner: the process group of ``pid``, and the folder ``base`` with its ``link``."""
        self._say({"pid": pid, "base": str(base), "link": str(link)})

    def release(self) -> None:
        """The owner has stopped the server itself; harmless when called again."""
        self._say({"over": True})
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)

    def _say(self, words: dict) -> None:
        with contextlib.suppress(OSError, ValueError):  # somebody ended the watch, or it is released already
            self._process.stdin.write(json.dumps(words).encode() + b"\n")
            self._process.stdin.flush()


def watch(lines) -> None:
    """Read what the owner says to its end, then end what it left."""
    left: dict = {}
    for line in lines:
        with contextlib.suppress(ValueError):  # half a line: the owner died as it wrote
            left = json.loads(line)
    if "pid" in left:
        end_group(left["pid"])
        remove_base(Path(left["base"]), Path(left["link"]))


def end_group(pid: int) -> None:
    """Kill a process and its group at once, and wait until it is gone."""
    if os.name == "nt":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(pid)], capture_output=True, check=False)
        return
    for _ in range(100):
        try:
            os.killpg(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(0.05)


def remove_base(base: Path, link: Path) -> None:
    """Delete a base directory without ever following the link to the checkout."""
    # Before Python 3.12 rmtree walks into a junction and would delete the checkout: the link goes first. os.rmdir takes
    # a junction away, and leaves a copied folder (not empty) to rmtree.
    with contextlib.suppress(OSError):
        link.unlink() if link.is_symlink() else os.rmdir(link)
    shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # only the owner's end counts
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # Ray kills the children of a worker that it ends: the watch must be a child of nobody.
    if hasattr(os, "fork") and os.fork():
        os._exit(0)
    print(os.getpid(), flush=True)
    watch(sys.stdin.buffer)
