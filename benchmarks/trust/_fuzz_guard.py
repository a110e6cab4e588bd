"""What no reader of a file may do: start anything, open anything else, write, or take all memory and time."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None

FORBIDDEN = (
    "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.remove", "os.rename",
    "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.putenv", "subprocess.Popen",
    "pty.spawn", "socket.", "urllib.Request", "http.client", "ftplib.", "smtplib.", "shutil.", "tempfile.",
    "webbrowser.open", "pickle.find_class", "marshal.", "ctypes.", "exec", "compile", "code.__new__", "import",
)  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class CodeRun(BaseException):
    """A reader did what it must not do; no `except Exception` may hide it."""


@dataclass
class Guard:
    """A hook on Python's audit events, which count only while `active`. ``folder`` holds the files to be read."""

    folder: Path
    active: bool = False
    seen: list[str] = field(default_factory=list)

    def watch(self) -> None:
        """From now on, and for as long as the process lives."""
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            path, _, flags = arguments
            inside = isinstance(path, str | bytes | os.PathLike) and Path(os.fsdecode(path)).parent == self.folder
            wrong = not inside or bool(flags and flags & WRITES)
        else:
            # A prefix ends in a dot; a module that is there already is only looked up.
            wrong = any(event == name or (name[-1] == "." and event.startswith(name)) for name in FORBIDDEN)
            wrong = wrong and not (event == "import" and arguments[0] in sys.modules)
        if wrong:
            self.active = False
            self.seen.append(f"{event} {arguments!r:.200}")
            raise CodeRun(self.seen[-1])


def memory() -> int:
    """The most bytes that the process ever held."""
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def limit_memory(more: int) -> None:
    """Let the process have at most ``more`` bytes than it has now: a bomb then ends in MemoryError."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError:  # no Linux: what is measured must do
        return
    size = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def seconds() -> float:
    """This process's own seconds: others on the machine don't count."""
    return time.process_time()
