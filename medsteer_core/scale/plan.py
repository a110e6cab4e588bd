"""A plan file: which pairs are to be made, of what workflow, and where they go."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..run.overrides import read_workflow
from ..run.workflow import Workflow, WorkflowError
from .images import RealImage, real_images
from .yaml_file import Source, Where, read_yaml, shown

KEYS = ("workflow", "output", "pairs", "prompts", "seeds", "images", "strengths", "set", "chunk", "splits", "limits")
CONCEPTS = ("present", "absent")
LARGEST_SEED = 2**64 - 1
MOST_TASKS, MOST_IMAGES = 2_000_000, 256
_RANGE = re.compile(r"\s*(\d+)\s*\.\.\s*(\d+)\s*")


@dataclass(frozen=True)
class Limits:
    """When a task is given up. retries: how often one that failed in a node is tried again; crashes: how many
    crashes, hangs and losses of its worker it may see; timeout: seconds for one task; start: for ComfyUI to start."""

    retries: int = 2
    crashes: int = 5
    timeout: float = 1800.0
    start: float = 300.0


@dataclass(frozen=True)
class Choice:
    """One of the plan's `pairs`: the two concepts (None: the workflow's own) and values that go with them."""

    present: str | None = None
    absent: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A checked plan. `settings`: name -> the values to try; `seeds`, `strengths`, `prompts` are what to combine.

    With real `images` these are in the place of seeds, and there are none.
    """

    workflow: Workflow
    output: str
    seeds: Sequence[int]
    choices: Sequence[Choice] = (Choice(),)
    prompts: Sequence[str | None] = (None,)
    strengths: Sequence[float] = ()
    settings: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    chunk: int | None = None
    validation: float | None = None
    test: float | None = None
    limits: Limits = Limits()
    images: Sequence[RealImage] = ()
    source: Source = Source("the plan", {})

    @property
    def innermost(self) -> int:
        """How many seeds or images each group has."""
        return len(self.images) or len(self.seeds)

    @property
    def groups(self) -> int:
        """How many workflows there are that differ in more than their seed."""
        return len(self.choices) * len(self.prompts) * math.prod(len(values) for values in self.settings.values())

    def __len__(self) -> int:
        """The number of tasks."""
        return self.groups * self.innermost


def read_plan(path: Path) -> Plan:
    """The plan in a YAML file; the workflow's path in it is relative to the file. MedSteerError says what is wrong."""
    return plan_of(read_yaml(path), path.parent)


def plan_of(source: Source, folder: Path) -> Plan:
    """The plan that a file's values tell. MedSteerError names the line and the key of whatever does not fit."""
    values = source.values
    source.check_keys((), values, KEYS)
    real = "images" in values
    for key in ("workflow", "output", *(() if real else ("seeds",))):
        if key not in values:
            raise source.error((), f"the key '{key}' is missing. A plan needs workflow, output, and seeds or images.")
    for key in ("seeds", "chunk") if real else ():
        if key in values:
            raise source.error((key,), f"'{key}' goes with images that are drawn; this plan has real 'images'.")
    validation, test = _splits(source)
    plan = Plan(
        workflow=_workflow(source, folder),
        output=_output(source),
        seeds=() if real else _seeds(source),
        choices=_choices(source),
        prompts=_prompts(source),
        strengths=_strengths(source),
        settings=_settings(source, ("set",), values.get("set"), lists=True),
        chunk=_whole(source, ("chunk",), values["chunk"], 1, MOST_IMAGES) if "chunk" in values else None,
        validation=validation,
        test=test,
        limits=_limits(source),
        images=real_images(source, folder) if real else (),
        source=source,
    )
    if len(plan) > MOST_TASKS:
        raise source.error((), f"it has {len(plan):,} tasks; at most {MOST_TASKS:,} were expected. Make several plans.")
    return plan


def _workflow(source: Source, folder: Path) -> Workflow:
    name = _text(source, ("workflow",), source.values["workflow"])
    path = Path(name).expanduser()
    path = path if path.is_absolute() else folder / path
    try:
        return read_workflow(path)
    except (OSError, ValueError, WorkflowError) as error:
        why = f"{path} can't be read: {error.strerror}." if isinstance(error, OSError) else error
        raise source.error(("workflow",), str(why)) from error


def _output(source: Source) -> str:
    output = _text(source, ("output",), source.values["output"])
    remote = "://" in output
    if ".." in re.split(r"[\\/]", output) or (remote and re.match(r"\w[\w+.-]*://[^/]*@", output)):
        what = "a path without '..', or a URL such as s3://bucket/pairs without a password, was expected"
        raise source.error(("output",), f"{shown(output)} was found; {what}.")
    return output if remote else str(Path(output).expanduser())


def _seeds(source: Source) -> Sequence[int]:
    where: Where = ("seeds",)
    given = source.values["seeds"]
    seeds: list[int] | range = []
    if isinstance(given, str):
        return _seed_range(source, where, given)
    for i, item in enumerate(given if isinstance(given, list) else [given]):
        at = (*where, i) if isinstance(given, list) else where
        many = isinstance(item, str)
        seeds += _seed_range(source, at, item) if many else [_whole(source, at, item, 0, LARGEST_SEED)]
        if len(seeds) > MOST_TASKS:
            raise source.error(at, f"more than {MOST_TASKS:,} seeds were found; make several plans.")
    return _distinct(source, where, seeds)


def _seed_range(source: Source, where: Where, text: str) -> range:
    found = _RANGE.fullmatch(text)
    if not found or max(map(len, found.groups())) > 20:
        raise source.error(where, f"{shown(text)} was found; seeds such as 7, [1, 2, 3] or 1..200 were expected.")
    first, last = (int(number) for number in found.groups())
    if not first <= last <= LARGEST_SEED:
        raise source.error(where, f"{shown(text)} was found; first..last with first <= last < 2**64 was expected.")
    if last - first >= MOST_TASKS:
        raise source.error(where, f"{shown(text)} has more than {MOST_TASKS:,} seeds; make several plans.")
    return range(first, last + 1)


def _choices(source: Source) -> Sequence[Choice]:
    if "pairs" not in source.values:
        return (Choice(),)
    choices = []
    for i, item in enumerate(_list(source, ("pairs",), source.values["pairs"])):
        at: Where = ("pairs", i)
        source.check_keys(at, item, (*CONCEPTS, "set"))
        for key in CONCEPTS:
            if key not in item:
                raise source.error(at, f"'{key}' is missing; a pair has a concept that is present and one of absent.")
        names = [_text(source, (*at, key), item[key], most=200) for key in CONCEPTS]
        if names[0] == names[1]:
            raise source.error(at, f"present and absent are both {shown(names[0])}; two that differ were expected.")
        own = _settings(source, (*at, "set"), item.get("set"), lists=False)
        choices.append(Choice(*names, {name: values[0] for name, values in own.items()}))
    return _distinct(source, ("pairs",), choices)


def _prompts(source: Source) -> Sequence[str | None]:
    if "prompts" not in source.values:
        return (None,)
    given = source.values["prompts"]
    texts = [given] if isinstance(given, str) else _list(source, ("prompts",), given)
    for i, item in enumerate(texts):
        text = _text(source, ("prompts", i), item, most=10_000)
        if "{concept}" not in text:
            raise source.error(("prompts", i), f"{shown(text)} lacks {{concept}}, the place of the pair's concept.")
    if "pairs" not in source.values:
        raise source.error(("prompts",), "prompts are worded around the concepts of 'pairs', which is missing.")
    return _distinct(source, ("prompts",), texts)


def _strengths(source: Source) -> Sequence[float]:
    if "strengths" not in source.values:
        return ()
    given = source.values["strengths"]
    items = _list(source, ("strengths",), given if isinstance(given, list) else [given])
    numbers = [_number(source, ("strengths", i), item, -100, 100) for i, item in enumerate(items)]
    return _distinct(source, ("strengths",), numbers)


def _settings(source: Source, where: Where, given: Any, lists: bool) -> dict[str, list[Any]]:
    if given is None:
        return {}
    if not isinstance(given, dict) or not given:
        raise source.error(where, f"{shown(given)} was found; NAME: VALUE was expected, such as KSampler.steps: 20.")
    settings = {}
    for name, value in given.items():
        at = (*where, name)
        if not isinstance(name, str):
            raise source.error(at, f"{shown(name)} is no input's name; quote it.")
        if isinstance(value, list) and not lists:
            raise source.error(at, "one value was expected; lists stand in the plan's own 'set'.")
        values = _list(source, at, value) if isinstance(value, list) else [value]
        for one in values:
            if not isinstance(one, bool | int | float | str) or (isinstance(one, float) and not math.isfinite(one)):
                raise source.error(at, f"{shown(one)} was found; a number, a text or true/false was expected.")
        settings[name] = _distinct(source, at, values)
    return settings


def _splits(source: Source) -> tuple[float | None, float | None]:
    if "splits" not in source.values:
        return None, None
    given = source.values["splits"]
    source.check_keys(("splits",), given, ("validation", "test"))
    parts = [_number(source, ("splits", key), given.get(key, 0), 0, 1) for key in ("validation", "test")]
    if sum(parts) > 1:
        raise source.error(("splits",), f"validation and test add up to {sum(parts):g}; at most 1 was expected.")
    return parts[0], parts[1]


def _limits(source: Source) -> Limits:
    given = source.values.get("limits", {})
    source.check_keys(("limits",), given, ("retries", "crashes", "timeout", "start"))
    known: dict[str, Any] = {}
    for key, value in given.items():
        where = ("limits", key)
        known[key] = (
            _whole(source, where, value, 0, 1000)
            if key in ("retries", "crashes")
            else _number(source, where, value, 0.1, 1e6)
        )
    return Limits(**known)


def _text(source: Source, where: Where, value: Any, most: int = 4096) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > most or not value.isprintable():
        raise source.error(where, f"{shown(value)} was found; a text of one line was expected.")
    return value


def _list(source: Source, where: Where, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise source.error(where, f"{shown(value)} was found; a list was expected.")
    if not value:
        raise source.error(where, "the list is empty, so nothing would be made; give at least one value.")
    return value


def _whole(source: Source, where: Where, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise source.error(where, f"{shown(value)} was found; a whole number from {least} to {most} was expected.")
    return value


def _number(source: Source, where: Where, value: Any, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise source.error(where, f"{shown(value)} was found; a number from {least:g} to {most:g} was expected.")
    return value


def _distinct(source: Source, where: Where, values: list[Any]) -> list[Any]:
    """The values, when no two are equal (True and 1 are two, in JSON)."""
    keys = [json.dumps(v, default=lambda c: [c.present, c.absent, dict(c.values)], sort_keys=True) for v in values]
    if not values:
        raise source.error(where, "the list is empty, so nothing would be made; give at least one value.")
    if len(set(keys)) != len(keys):
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise source.error(where, f"{shown(twice)} stands twice; every pair is made once. Take one away.")
    return values
