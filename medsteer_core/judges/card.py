"""The JSON beside a judge's weights: what it must and may say, as checked values.

Everything that changes a judge's answers must be written out; there are few defaults. `docs/real-judge.md` describes
the format.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import MedSteerError
from ..files.inside import shown
from .preprocessing import CROP_MODES, INTERPOLATIONS, Preprocessing

ACTIVATIONS = ("softmax", "sigmoid", "none")
HEADS = ("linear", "unet")
_LARGEST_SIDE = 4096
_LONGEST_NAME = 200  # characters
_MOST_NAMES = 10_000


@dataclass(frozen=True)
class Card:
    """What is said of one network. ``labels`` are of its outputs, in order; ``reserved`` is the one that is no class
    ("none of these") or no finding ("background"). ``input`` and ``output`` name those of an ONNX graph."""

    path: Path
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    activation: str
    reserved: str | None = None
    architecture: str | None = None
    input: str | None = None
    output: str | None = None

    @property
    def named(self) -> tuple[str, ...]:
        """The labels that are classes, or findings."""
        return tuple(label for label in self.labels if label != self.reserved)


@dataclass(frozen=True)
class SegmenterCard(Card):
    """A segmenter's card: also how its masks are read, and the ``head`` on a timm encoder."""

    findings_of: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    threshold: float = 0.5
    diffuse: tuple[str, ...] = ()
    left_limit: float = 0.003
    found_limit: float = 0.01
    head: str = "unet"
    head_width: int = 64


def read_classifier(path: Path) -> Card:
    """A classifier's JSON. MedSteerError names the file and what does not fit."""
    values = _checked(path, _NETWORK | _CLASSIFIER)
    labels, reserved = values["labels"], values.get("none_of_these")
    _demand(path, len(labels) - (reserved is not None) >= 2, "labels", labels, "two classes or more")
    _demand(path, reserved is None or reserved in labels, "none_of_these", reserved, "one of the labels")
    return Card(path, reserved=reserved, **_network(values))


def read_segmenter(path: Path, classes: tuple[str, ...]) -> SegmenterCard:
    """A segmenter's JSON; ``classes`` are those of the classifier: ``findings_of`` must say of each what it shows."""
    values = _checked(path, _NETWORK | _SEGMENTER)
    # a mask must lie on the whole picture, so the network sees all of it
    network = _network(values | {"crop_pct": 1.0, "crop_mode": "squash"})
    labels, reserved = values["labels"], values.get("background")
    _demand(path, reserved is None or reserved in labels, "background", reserved, "one of the labels")
    alone = values["activation"] == "softmax" and len(labels) == 1
    _demand(path, not alone, "activation", "softmax", "sigmoid, since a softmax over one label is always 1")
    findings = tuple(label for label in labels if label != reserved)
    _demand(path, bool(findings), "labels", labels, "a finding beside the background")
    of = values["findings_of"]
    _demand(path, set(of) == set(classes), "findings_of", sorted(of), f"the classifier's classes: {', '.join(classes)}")
    unknown = sorted({name for shown in of.values() for name in shown or ()} - set(findings))
    _demand(path, not unknown, "findings_of", unknown, f"findings among the labels: {', '.join(findings)}")
    strange = sorted(set(values.get("diffuse", ())) - set(findings))
    _demand(path, not strange, "diffuse", strange, f"findings among the labels: {', '.join(findings)}")
    reading = {
        key: values[key] for key in ("threshold", "left_limit", "found_limit", "head", "head_width") if key in values
    }
    return SegmenterCard(
        path,
        reserved=reserved,
        findings_of={name: None if shown is None else tuple(shown) for name, shown in of.items()},
        diffuse=tuple(values.get("diffuse", ())),
        **reading,
        **network,
    )


def _network(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Card` that classifiers and segmenters share."""
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    given = {key: values[key] for key in keys if key in values}
    preprocessing = Preprocessing(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    optional = {key: values.get(key) for key in ("architecture", "input", "output")}
    return {
        "labels": tuple(values["labels"]),
        "preprocessing": preprocessing,
        "activation": values["activation"],
        **optional,
    }


# What a value may be, and the words for it.
_Rule = tuple[bool, Callable[[Any], bool], str]


def _number(value: Any) -> bool:
    # Also false for NaN, and for a whole number that no float can hold.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable() and len(value) <= _LONGEST_NAME


def _texts(value: Any) -> bool:
    fits = isinstance(value, list) and len(value) <= _MOST_NAMES and all(map(_text, value))
    return fits and len(set(value)) == len(value)


def _three(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_number, value))


def _size(value: Any) -> bool:
    whole = isinstance(value, list) and all(isinstance(side, int) and not isinstance(side, bool) for side in value)
    return whole and len(value) == 2 and all(1 <= side <= _LARGEST_SIDE for side in value)


def _one_of(*names: str) -> _Rule:
    return True, lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}"


def _share(value: Any) -> bool:
    return _number(value) and 0 < value < 1


def _maybe(rule: _Rule) -> _Rule:
    return False, rule[1], rule[2]


_TEXT: _Rule = (True, _text, "text")
_NETWORK: dict[str, _Rule] = {
    "labels": (True, lambda value: _texts(value) and bool(value), "a list of different names"),
    "input_size": (True, _size, f"[height, width] in whole pixels, each 1 to {_LARGEST_SIDE}"),
    "mean": (True, _three, "three numbers, for images in 0..1"),
    "std": (True, lambda value: _three(value) and min(value) > 0, "three numbers above 0, for images in 0..1"),
    "interpolation": _one_of(*INTERPOLATIONS),
    "activation": _one_of(*ACTIVATIONS),
    "architecture": _maybe(_TEXT),
    "input": _maybe(_TEXT),
    "output": _maybe(_TEXT),
    "description": (False, lambda value: isinstance(value, str), "text"),
}
_CLASSIFIER: dict[str, _Rule] = {
    "crop_pct": (True, lambda value: _number(value) and 0.1 <= value <= 1, "a number from 0.1 to 1"),
    "crop_mode": _maybe(_one_of(*CROP_MODES)),
    "none_of_these": _maybe(_TEXT),
}
_SEGMENTER: dict[str, _Rule] = {
    "findings_of": (
        True,
        lambda value: isinstance(value, dict) and all(shown is None or _texts(shown) for shown in value.values()),
        "for each class a list of its findings, or null where the segmenter does not mark what it shows",
    ),
    "threshold": (True, _share, "a number between 0 and 1"),
    "background": _maybe(_TEXT),
    "diffuse": (False, _texts, "a list of findings"),
    "left_limit": (False, _share, "a share of the picture between 0 and 1"),
    "found_limit": (False, _share, "a share of the picture between 0 and 1"),
    "head": _maybe(_one_of(*HEADS)),
    "head_width": (
        False,
        lambda value: isinstance(value, int) and not isinstance(value, bool) and 8 <= value <= 1024 and value % 8 == 0,
        "a multiple of 8 from 8 to 1024",
    ),
}


def _checked(path: Path, rules: Mapping[str, _Rule]) -> dict[str, Any]:
    """The file's values, each of a kind that fits, none unknown and none missing."""
    values = _read(path)
    for name in values:
        if name not in rules:
            near = get_close_matches(name[:80], rules, 1)
            hint = f" Was '{near[0]}' meant?" if near else ""
            raise MedSteerError(f"'{path}' has the key '{shown(name)}'; expected were {', '.join(rules)}.{hint}")
    missing = [name for name, (required, _, _) in rules.items() if required and name not in values]
    if missing:
        raise MedSteerError(f"'{path}' lacks {', '.join(missing)}. Add what the network was trained with.")
    for name, value in values.items():
        _demand(path, rules[name][1](value), name, value, rules[name][2])
    return values


def _read(path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = sorted(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        if twice:
            raise MedSteerError(f"'{path}' has the key '{shown(twice[0])}' twice; once was expected.")
        return dict(pairs)

    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except FileNotFoundError as error:
        raise MedSteerError(f"There is no file '{path}'; it should say what the weights beside it are.") from error
    except MedSteerError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        words = " ".join(str(error).split())
        raise MedSteerError(f"'{path}' is not readable JSON ({words:.120}). Write it anew.") from error
    if not isinstance(values, dict):
        raise MedSteerError(f"'{path}' holds a JSON {type(values).__name__}; an object with labels was expected.")
    return values


def _demand(path: Path, fits: bool, name: str, value: Any, expected: str) -> None:
    if not fits:
        raise MedSteerError(f"'{path}' says {name}: {json.dumps(value):.120}; {shown(expected, 600)} was expected.")
