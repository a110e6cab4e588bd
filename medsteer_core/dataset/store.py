"""Where a dataset's files lie: a local folder, or whatever fsspec reaches. Nobody ever sees half of a file.

Names are relative and written with `/`. In a local folder a file is written under a name of its own, fsynced and
renamed, then its folder is fsynced: a file that stands there after a crash is whole. Locks keep processes of one
machine apart; a killed one's are free again at once, and what it left half written goes when its lock is taken next.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path, PurePosixPath
from typing import Protocol

from ..errors import MedSteerError

# What only the store uses: locks and files that are being written. Hidden, so that loaders of datasets skip it.
WORK = ".medsteer"
LOCAL = ("file://", "local://")


class PairStore(Protocol):
    """Whole files by name. Everything raises OSError where the storage does not work."""

    def write_whole(self, name: str, data: bytes | Iterable[bytes], lock: str = "") -> None:
        """Write or replace a file; readers see the old one or the whole new one. `lock`: that is held meanwhile."""

    def read(self, name: str) -> bytes: ...
    def exists(self, name: str) -> bool: ...
    def list(self, folder: str) -> list[str]:
        """The names of all files under a folder, sorted; [] where there is no such folder. Hidden ones are left out."""

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""

    def locked(self, lock: str) -> AbstractContextManager[None]:
        """Only one writer at a time; where that can't be had, nothing. A lock is not taken twice by one thread."""


def store_at(root: str | Path) -> PairStore:
    """The store behind a folder's path or a URL such as `s3://bucket/pairs`. MedSteerError without fsspec."""
    text = str(root)
    for start in LOCAL:
        text = text.removeprefix(start)
    return RemoteStore(text) if "://" in text or "::" in text else LocalStore(Path(text))


class LocalStore:
    """A folder of this machine, or one that is mounted."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write_whole(self, name: str, data: bytes | Iterable[bytes], lock: str = "") -> None:
        path = self._path(name)
        _make_folder(self.root / WORK)
        _make_folder(path.parent)
        part = self.root / WORK / f"{lock}-{uuid.uuid4().hex}.part"
        try:
            # Opened by name and not by `tempfile`, whose files only their owner can read.
            with open(part, "xb") as file:
                for chunk in [data] if isinstance(data, bytes) else data:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        _sync_folder(path.parent)

    def read(self, name: str) -> bytes:
        return self._path(name).read_bytes()

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def list(self, folder: str) -> list[str]:
        return sorted(_files(self._path(folder), folder))

    def remove(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    @contextmanager
    def locked(self, lock: str) -> Iterator[None]:
        from filelock import FileLock  # PyTorch brings it

        _make_folder(self.root / WORK)
        with FileLock(self.root / WORK / f"{_checked(lock)}.lock"):
            for part in (self.root / WORK).glob(f"{lock}-*.part"):  # whoever wrote it is dead: we have its lock
                part.unlink(missing_ok=True)
            yield

    def _path(self, name: str) -> Path:
        return self.root / _checked(name)


class RemoteStore:
    """What an fsspec URL names. There are no locks: give each pair to one writer."""

    def __init__(self, url: str) -> None:
        try:
            import fsspec
        except ModuleNotFoundError as error:
            raise MedSteerError(
                f"fsspec is not installed; a dataset at '{url}' needs it. Install it for this Python: "
                "pip install fsspec, or write to a local folder."
            ) from error
        try:
            # An instance of our own: others that share it would end its transactions.
            self.files, root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            raise MedSteerError(
                f"The dataset's address '{url}' can't be opened: {error}. A folder, or a URL such as "
                "s3://bucket/pairs whose fsspec package is installed, was expected."
            ) from error
        self._url, self.root, self._one_at_a_time = url, root.rstrip("/"), threading.Lock()

    def __reduce__(self):
        return RemoteStore, (self._url,)  # to another process, where it connects anew

    def write_whole(self, name: str, data: bytes | Iterable[bytes], lock: str = "") -> None:
        path = self._path(name)
        self.files.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        # A transaction shows the file at its end, by whatever means the storage has for that.
        with self._one_at_a_time, self.files.transaction, self.files.open(path, "wb") as file:
            for chunk in [data] if isinstance(data, bytes) else data:
                file.write(chunk)
        self.files.invalidate_cache(path)

    def read(self, name: str) -> bytes:
        return self.files.cat_file(self._path(name))

    def exists(self, name: str) -> bool:
        self.files.invalidate_cache()  # others write too
        return self.files.isfile(self._path(name))

    def list(self, folder: str) -> list[str]:
        self.files.invalidate_cache()
        start = self._path(folder)
        if not self.files.isdir(start):
            return []
        names = (f"{folder}/{path.split(start, 1)[1].lstrip('/')}" for path in self.files.find(start))
        return sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))

    def remove(self, name: str) -> None:
        if self.exists(name):
            self.files.rm_file(self._path(name))

    def locked(self, lock: str) -> AbstractContextManager[None]:
        return nullcontext()

    def _path(self, name: str) -> str:
        return f"{self.root}/{_checked(name)}"


def _checked(name: str) -> str:
    """A relative name that stays inside; anything else is a mistake of the caller's."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or any(part == ".." or "\\" in part or "\0" in part for part in parts):
        raise MedSteerError(f"'{name}' is no name of a file in a dataset; a relative path without '..' was expected.")
    return name


def _files(folder: Path, name: str) -> Iterator[str]:
    try:
        entries = os.scandir(folder)
    except FileNotFoundError:
        return
    with entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            inside = f"{name}/{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield from _files(folder / entry.name, inside)
            else:
                yield inside


def _make_folder(folder: Path) -> None:
    """The folder and those above it, each of them durable."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows has no such thing
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
