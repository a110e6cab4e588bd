"""What a vector's provenance may hold where it is read from a file: each fact is of the kind that is expected.

Provenance is free JSON, and facts may be missing. But a file may come from anyone, and what describes, draws, combines
or steers with a vector reads some of the facts by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import MedSteerError
from ..files.inside import shown

DEEPEST = 100  # dicts and lists in each other; combining vectors adds four
_MAY_BE_NULL = ("model", "explained", "seed")
Fits = Callable[[Any], bool]


def check_provenance(facts: Mapping[str, Any]) -> None:
    """Raise MedSteerError that names the fact which is of another kind than MedSteer writes."""
    level, depth = [facts], 0
    while level:  # first, and without recursion: what reads the facts goes into their depth
        depth += 1
        if depth > DEEPEST:
            raise MedSteerError(f"Its provenance is nested more than {DEEPEST} times; facts of a vector were expected.")
        level = [part for value in level for part in (value.values() if isinstance(value, dict) else value)
                 if isinstance(part, dict | list)]  # fmt: skip
    _check(facts, "provenance")


def _check(facts: Mapping[str, Any], where: str) -> None:
    for name, (fits, expected) in _FACTS.items():
        if name in facts and not fits(facts[name]) and not (facts[name] is None and name in _MAY_BE_NULL):
            raise MedSteerError(f"Its {where} has {name} = {shown(facts[name], 60)}; {expected} was expected.")
    for side, prompt in facts.get("prompts", {}).items():
        if not _is_prompt(prompt):
            raise MedSteerError(f"Its {where} has the prompt {shown(side, 20)} = {shown(prompt, 60)}; text was wanted.")
    if "combined" in facts:
        _check_combined(facts["combined"], where)


def _check_combined(made: Any, where: str) -> None:
    parts, overlap = (made.get(key) if isinstance(made, dict) else None for key in ("parts", "overlap"))
    fits = (
        isinstance(made, dict)
        and isinstance(made.get("expression"), str)
        and _list_of(lambda part: isinstance(part, dict) and isinstance(part.get("provenance"), dict))(parts)
        and _list_of(_is_overlap)(overlap)
    )
    if not fits:
        raise MedSteerError(f"Its {where} has a damaged 'combined'; expression, parts and overlap were expected.")
    for part in parts:
        _check(part["provenance"], where)


def _is_overlap(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and _list_of(_is_count)(found.get("parts"))
        and len(found["parts"]) == 2
        and all(_is_number(found.get(key)) for key in ("mean", "max", "sigma"))
        and isinstance(found.get("site"), str)
        and "reported" in found
    )


def _is_prompt(value: Any) -> bool:
    if not isinstance(value, dict):
        return value is None
    text, texts, contexts = value.get("text"), value.get("texts", []), value.get("contexts", [])
    return (text is None or _is_text(text)) and _list_of(_is_text)(texts) and isinstance(contexts, list)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _list_of(fits: Fits) -> Fits:
    return lambda value: isinstance(value, list) and all(map(fits, value))


_FACTS: dict[str, tuple[Fits, str]] = {
    "prompts": (_is_dict, "an object"),
    "source": (_is_dict, "an object"),
    "model": (_is_dict, "an object"),
    "unknown": (_list_of(_is_text), "a list of names"),
    "dropped_sites": (_list_of(_is_text), "a list of sites"),
    "seeds": (_list_of(_is_count), "a list of whole numbers"),
    "seed": (_is_count, "a whole number"),
    "samples": (_is_count, "a whole number"),
    "degenerate": (_is_count, "a whole number"),
    "normalised": (_is_count, "a whole number"),
    "explained": (_is_number, "a number"),
    "noise": (_is_text, "text"),
    "estimator": (_is_text, "text"),
}
