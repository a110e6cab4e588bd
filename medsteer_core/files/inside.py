"""Names that a workflow gives to files: they stay in the folder that they are for, on every system.

A workflow may come from anyone. So a name is refused, and never mended, when it leads out of its folder (absolute, a
drive, `..`, a link), when a system has another use for it (`CON`, `a:b`), or when it does not look like what it is.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from ..errors import MedSteerError

MOST_PARTS = 8
# Bytes of UTF-8. A file's name has 255, of which a hash, a suffix and the name of a half-written file take a part.
LONGEST_PART = 120
# Windows opens a device under these names, whatever the folder and the ending are.
_DEVICE = re.compile(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|CLOCK\$|(COM|LPT)[0-9¹²³])\s*(\..*)?", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[<>:"|?*\\/]')
EXPECTED = (
    "a name such as 'polyps' or 'colon/polyps' was expected: inside the folder, without '..', a drive or a leading "
    "slash, a device's name such as CON, control characters, or any of < > : \" | ? *"
)


def name_parts(text: str, what: str) -> tuple[str, ...]:
    """The folders and the file's name in a relative name, split at `/` and `\\`, each in Unicode's composed form.

    ``what`` is the input that the text comes from. Raises MedSteerError for whatever is no plain name inside a folder.
    """
    parts = re.split(r"[\\/]", unicodedata.normalize("NFC", text.strip()))
    parts = parts if parts[-1] else parts[:-1]  # "colon/" is the name colon
    if not parts or len(parts) > MOST_PARTS or any(_problem(part) for part in parts):
        why = next(filter(None, map(_problem, parts)), f"it has {len(parts)} parts; {MOST_PARTS} at most are made")
        raise MedSteerError(f"{what} is '{shown(text)}': {why}; {EXPECTED}.")
    return tuple(parts)


def path_inside(root: Path, parts: Iterable[str], folder: str) -> Path:
    """``root`` joined with the parts of a name; ``folder`` is what the user calls ``root``.

    Nothing is made: the check stands before the first folder. Raises MedSteerError when a link leads out of ``root``.
    """
    parts = tuple(parts)
    path = root.joinpath(*parts)
    try:
        stays = path.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError):  # a null byte; a ring of links
        stays = False
    if not stays:
        raise MedSteerError(
            f"'{shown('/'.join(parts))}' leads out of {folder}, through a link; choose a name inside it."
        )
    return path


def shown(text: object, most: int = 80) -> str:
    """A text from outside, for a message: one line, cut, and with what can't be seen written as its code."""
    text = text if isinstance(text, str) else repr(text)
    seen = "".join(letter if letter.isprintable() else f"\\u{ord(letter):04x}" for letter in text[:most])
    return seen + ("..." if len(text) > most else "")


def _problem(part: str) -> str:
    """Why one part of a name is refused; "" when it is not."""
    if not part:
        return "it begins with a slash or has an empty part"
    if part in (".", ".."):
        return f"'{part}' is no name"
    if _FORBIDDEN.search(part):
        return "it has a character that file names can't have"
    if not part.isprintable():  # control characters, texts that run backwards, zero width, halves of characters
        return "it has a character that can't be seen"
    if part != part.strip() or part.endswith("."):
        return "a part begins with a space, or ends with a space or a dot, which Windows drops"
    if _DEVICE.fullmatch(part):
        return f"'{part}' is a device on Windows"
    if len(part.encode()) > LONGEST_PART:
        return f"a part has {len(part.encode())} bytes; {LONGEST_PART} at most are taken"
    return ""
