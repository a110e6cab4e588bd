"""Real images as a plan's innermost axis: which files, whose they are, and what a server is given of them."""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import MedSteerError
from ..files.picture_file import read_picture
from .yaml_file import Source, Where, shown

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
COLUMNS = ("file", "group")


@dataclass(frozen=True)
class RealImage:
    """An image file, and the patient or case that it belongs to ("": nobody said)."""

    path: Path
    group: str = ""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file's bytes, as 64 hex digits. MedSteerError where it can't be read."""
        return hashlib.sha256(self.read()).hexdigest()

    def read(self) -> bytes:
        """The file's bytes."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise MedSteerError(f"'{self.path}' can't be read: {error.strerror}.") from error


def upright_png(content: bytes, name: str) -> bytes:
    """An image file's pixels as an 8-bit RGB PNG, upright and without anything that the file says of itself.

    MedSteerError names what is no image, or none of one frame.
    """
    buffer = io.BytesIO()
    read_picture(content, name).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def real_images(source: Source, folder: Path) -> tuple[RealImage, ...]:
    """The images that a plan's ``images`` names: a folder, or ``{folder: ..., list: ...}`` with a CSV of the columns
    file and, where it has one, group. Paths are relative to the plan's ``folder``; by name, or in the list's order.

    MedSteerError names the key, line or file that does not fit; two files of equal bytes are one image twice.
    """
    given = source.values["images"]
    if isinstance(given, str):
        place, listed = _folder(source, ("images",), given, folder), None
    else:
        source.check_keys(("images",), given, ("folder", "list"))
        if "folder" not in given:
            raise source.error(("images",), "'folder' is missing: where the images are.")
        place = _folder(source, ("images", "folder"), given["folder"], folder)
        listed = given.get("list")
    if listed is None:
        found = tuple(RealImage(path) for path in sorted(place.iterdir()) if path.suffix.lower() in SUFFIXES)
    else:
        found = _listed(source, ("images", "list"), listed, folder, place)
    if not found:
        raise source.error(("images",), f"there is no image in {place}; {', '.join(SUFFIXES)} were looked for.")
    known: dict[str, RealImage] = {}
    for image in found:
        if (other := known.setdefault(image.digest, image)) is not image:
            raise source.error(
                ("images",), f"{image.path.name} and {other.path.name} are the same image. Take one of them away."
            )
    return found


def _folder(source: Source, where: Where, given: Any, folder: Path) -> Path:
    if not isinstance(given, str) or not given.strip():
        raise source.error(where, f"{shown(given)} was found; a folder of images was expected.")
    place = folder / Path(given).expanduser()
    if not place.is_dir():
        raise source.error(where, f"there is no folder {place}.")
    return place


def _listed(source: Source, where: Where, given: Any, folder: Path, place: Path) -> tuple[RealImage, ...]:
    if not isinstance(given, str):
        raise source.error(where, f"{shown(given)} was found; a CSV file was expected.")
    path = folder / Path(given).expanduser()
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise source.error(where, f"{path} can't be read as CSV in UTF-8: {error}.") from error
    columns = set(rows[0]) if rows else set()
    if COLUMNS[0] not in columns:
        raise source.error(where, f"{path.name} has no column 'file'; the columns file and group were expected.")
    images = []
    for line, row in enumerate(rows, start=2):
        name, group = ((row.get(column) or "").strip() for column in COLUMNS)
        file = place / name
        if not name or ".." in Path(name).parts or not file.is_file():
            raise source.error(where, f"{path.name}, line {line}: there is no file {shown(name)} in {place}.")
        images.append(RealImage(file, group))
    return tuple(images)
