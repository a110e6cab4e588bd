"""A small YAML file as plain values, with the line of every key, and nothing in it that could be more than it seems."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import MedSteerError
from ..files.inside import shown as one_line

LARGEST = 100_000  # bytes; a plan of a million pairs is a few hundred
DEEPEST = 12
Where = tuple[str | int, ...]


@dataclass(frozen=True)
class Source:
    """A file's values and the line (from 1) of each key and list item, by the way to it, such as ``("pairs", 0)``."""

    name: str
    values: Any
    lines: Mapping[Where, int] = field(default_factory=dict)

    def error(self, where: Where, text: str) -> MedSteerError:
        """An error about the value at ``where``: the file, its line, its key and what is wrong with it."""
        near = next((self.lines[where[:n]] for n in range(len(where), -1, -1) if where[:n] in self.lines), None)
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{one_line(part)}" for part in where).lstrip(".")
        line = "" if near is None else f", line {near}"
        return MedSteerError(f"{self.name}{line}: {key + ': ' if key else ''}{text}")

    def check_keys(self, where: Where, values: Any, known: Iterable[str]) -> None:
        """MedSteerError unless ``values`` is a mapping that has only ``known`` keys; names the nearest one."""
        if not isinstance(values, dict):
            raise self.error(where, f"{shown(values)} was found; keys and values were expected ({', '.join(known)}).")
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(str(key), list(known), n=1)
                meant = f"; did you mean '{close[0]}'?" if close else "."
                what = f"there is no key '{one_line(key)}' here{meant} Those there are: {', '.join(known)}."
                raise self.error((*where, key), what)


def shown(value: Any) -> str:
    """A value for an error message, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_yaml(path: Path) -> Source:
    """The YAML file at ``path``. MedSteerError for one that can't be read, is too large or is not plain YAML."""
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise MedSteerError(f"The plan {path} can't be read: {why}. Give the path of a YAML file.") from error
    if len(data) > LARGEST:
        raise MedSteerError(f"{path} is larger than {LARGEST:,} bytes; a plan says ranges such as seeds: 1..200.")
    return parse(data, str(path))


def parse(data: bytes, name: str) -> Source:
    """YAML text as a Source. MedSteerError for what is not plain YAML: tags, aliases, a key twice, depths."""
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise missing("pyyaml") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MedSteerError(f"{name} is no UTF-8 text (byte {error.start}). Save the plan as UTF-8.") from error
    try:
        _check_events(yaml, text, name)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise MedSteerError(f"{name}{line}: this is no YAML that can be read: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise MedSteerError(f"{name} is no YAML that can be read: {' '.join(str(error).split())}.") from error
    except (ValueError, TypeError, OverflowError) as error:  # a date such as 2026-99-99, a number of 5000 digits
        raise MedSteerError(f"{name} has a value that can't be read: {error}. Put texts in quotes.") from error
    lines: dict[Where, int] = {}
    _note_lines(yaml, node, (), lines, name)
    return Source(name, values, lines)


def missing(package: str) -> MedSteerError:
    """What to do about a package that only the scale part needs."""
    return MedSteerError(
        f"{package} is not installed; plans for many workers need it. Install it for this Python: "
        'pip install "comfyui-medsteer[scale]", or in the checkout: pip install ".[scale]".'
    )


def _check_events(yaml: Any, text: str, name: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise MedSteerError(f"{name}, line {line}: anchors and aliases (& and *) are not taken; write it out.")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST:
            raise MedSteerError(f"{name}, line {line}: nested deeper than {DEEPEST}; a plan needs four levels.")


def _note_lines(yaml: Any, node: Any, where: Where, lines: dict[Where, int], name: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise MedSteerError(f"{name}, line {key.start_mark.line + 1}: a key was expected to be a plain word.")
            inner = (*where, key.value)
            if inner in lines:
                line = key.start_mark.line + 1
                raise MedSteerError(
                    f"{name}, line {line}: '{one_line(key.value)}' stands twice (first in line {lines[inner]})."
                )
            lines[inner] = key.start_mark.line + 1
            _note_lines(yaml, value, inner, lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*where, i)] = value.start_mark.line + 1
            _note_lines(yaml, value, (*where, i), lines, name)
