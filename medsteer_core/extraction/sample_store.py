"""What an extraction has seen, kept on disk: a run that was stopped goes on, and more samples add to those there."""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files.same_bytes import canonical_json

FORMAT = "medsteer-samples-1"
SUFFIX = ".safetensors"
# What the folder may hold: beyond it, what was not used for longest is removed.
MOST_BYTES = 4 * 10**9
# A state is written while sampling goes on when at least so many times the last writing's time has passed.
TIMES_THE_WRITING = 25
FIRST_WRITING_AFTER = 30.0  # seconds; what is over sooner is written at its end alone

State = Mapping[str, Tensor]


def prefixed(name: str, state: State) -> dict[str, Tensor]:
    """The state with `name/` before its tensors' names, so that several go into one file."""
    return {f"{name}/{key}": value for key, value in state.items()}


def under(name: str, state: State) -> dict[str, Tensor]:
    """The part of a state that `prefixed` named."""
    return {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}


@dataclass(frozen=True, eq=False)
class Stored:
    """A state, and the numbers of the images that it has seen."""

    images: tuple[int, ...]
    state: State


class SampleStore:
    """A folder of states, each under a hash of everything that decided it. Files are seen whole or not at all.

    Two ComfyUIs may share it: of two that write the same state at once, one stays.
    """

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        self.folder, self.most_bytes = folder, most_bytes

    def path(self, facts: Mapping[str, Any]) -> Path:
        """Where the state of these (JSON-able) facts lies."""
        return self.folder / f"{_digest(facts)[:32]}{SUFFIX}"

    def read(self, facts: Mapping[str, Any]) -> Stored | None:
        """The state of these facts; None where there is none that can be read."""
        path = self.path(facts)
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT or about["facts"] != _digest(facts):
                    return None
                state = {name: file.get_tensor(name).clone() for name in file.keys()}
                stored = Stored(tuple(json.loads(about["images"])), state)
            os.utime(path)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None
        return stored

    def images(self, facts: Mapping[str, Any]) -> tuple[int, ...]:
        """The images of the state of these facts, without reading it; () where there is none."""
        try:
            with safe_open(self.path(facts), framework="pt") as file:
                return tuple(json.loads((file.metadata() or {})["images"]))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return ()

    def write(self, facts: Mapping[str, Any], images: Sequence[int], state: State) -> bool:
        """Keep a state; False, and nothing written, where it alone is more than the folder may hold. Raises OSError."""
        size = sum(value.numel() * value.element_size() for value in state.values())
        if size > self.most_bytes:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(facts)
        self._make_room(size, path)
        part = self.folder / f".{path.name}.{uuid.uuid4().hex}.part"
        about = {"format": FORMAT, "facts": _digest(facts), "images": json.dumps(list(images))}
        try:
            save_file({name: value.contiguous() for name, value in state.items()}, part, metadata=about)
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
        except SafetensorError as error:  # its writer's form of a full disk or a folder that may not be written
            raise OSError(str(error)) from None
        finally:
            part.unlink(missing_ok=True)
        return True

    def _make_room(self, size: int, keep: Path) -> None:
        """Remove what was not used for longest, and what a writer that was killed left behind."""
        files = {path: path.stat() for path in self.folder.glob(f"*{SUFFIX}") if path != keep}
        for path in self.folder.glob(f".*{SUFFIX}.*.part"):
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink(missing_ok=True)
        total = size + sum(about.st_size for about in files.values())
        for path, about in sorted(files.items(), key=lambda entry: entry[1].st_mtime):
            if total <= self.most_bytes:
                return
            path.unlink(missing_ok=True)
            total -= about.st_size


def _digest(facts: Mapping[str, Any]) -> str:
    """Facts as a hash: prompts can be private, and are not written."""
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()


class Checkpoint:
    """One extraction's way to the store. `tell` hears, in words, what the user should know. Nothing here stops a run.

    Example: `stored = checkpoint.read(wanted)`; after each batch `checkpoint.offer(images, watch.to_state)`; at the
    end, also one that was not wanted, `checkpoint.close(images, watch.to_state)`.
    """

    def __init__(
        self,
        store: SampleStore,
        facts: Mapping[str, Any],
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._facts, self._tell, self._clock = store, facts, tell, clock
        self._known = len(store.images(facts))  # what is there is never replaced by less
        self._written, self._took, self._next = 0, 0.0, clock() + FIRST_WRITING_AFTER

    def read(self, wanted: Iterable[int]) -> Stored | None:
        """What is there, if all of its images are wanted: others can't be taken out of running sums again."""
        stored = self._store.read(self._facts)
        if stored is None or not set(stored.images) <= set(wanted):
            return None
        self._written = len(stored.images)
        return stored

    def offer(self, images: Sequence[int], state: Callable[[], State]) -> None:
        """Write the state where enough time has passed, so that writing takes a few percent of the time at most."""
        if self._clock() >= self._next:
            self.close(images, state)

    def close(self, images: Sequence[int], state: Callable[[], State]) -> None:
        """Write the state unless it is there already, or another that has seen more."""
        if len(images) <= max(self._written, self._known - 1):
            return
        begun = self._clock()
        try:
            kept = self._store.write(self._facts, images, state())
        except OSError as error:
            self._tell(f"The samples could not be kept for another time: {error}")
        else:
            if not kept:
                self._tell(f"The samples are not kept for another time: more than {self._store.most_bytes / 1e9:g} GB.")
        self._written = len(images)
        self._took = self._clock() - begun
        self._next = self._clock() + TIMES_THE_WRITING * self._took
