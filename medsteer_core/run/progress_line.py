"""How far a workflow is, as a line of text."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from .workflow import Progress


class ProgressLine:
    """One line that moves on a terminal; elsewhere a line for each node. It goes to `stream`, or standard output."""

    def __init__(self, terminal: bool | None = None, stream: TextIO | None = None):
        self.stream = stream
        self.terminal = (stream or sys.stdout).isatty() if terminal is None else terminal
        self._title, self._begun = "", time.monotonic()

    def __call__(self, progress: Progress) -> None:
        steps = f" {progress.value:.0f}/{progress.maximum:.0f}" if progress.maximum > 1 else ""
        line = f"{100 * progress.fraction:3.0f}%  {progress.title}{steps}  {progress.seconds:.1f} s"
        if self.terminal:
            print(f"\r{line[:100]:<100}", end="", file=self.stream, flush=True)
        elif progress.title != self._title:
            print(line, file=self.stream, flush=True)
        self._title = progress.title

    def end(self) -> None:
        """Finish the line."""
        seconds = time.monotonic() - self._begun
        line = f"{chr(13) if self.terminal else ''}{f'100%  done in {seconds:.1f} s':<100}".rstrip(" ")
        print(line, file=self.stream, flush=True)

    def broken(self) -> None:
        """Leave the line as it stands, so that what comes next begins a line of its own."""
        if self.terminal and self._title:
            print(file=self.stream, flush=True)
        self._title = ""
