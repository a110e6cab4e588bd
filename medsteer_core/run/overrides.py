"""Workflow files in API format, and other values for their inputs: `--set NAME=VALUE` of the headless command."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.inside import shown
from ..steering.recipes import IMAGE_RECIPES, RECIPES, SAMPLER_RECIPES, STEER_RECIPES
from .workflow import Workflow, WorkflowError, node_title

SEEDS = ("seed", "noise_seed")
CALIBRATE = "MedSteer_CalibrateStrength"
STEER, PAIR_SAMPLER, OF_IMAGE = "MedSteer_Steer", "MedSteer_CounterfactualSampler", "MedSteer_CounterfactualOfImage"


class OverrideError(WorkflowError):
    """A `--set` that fits no input, or more than one, or whose value does not fit its input."""


@dataclass(frozen=True)
class Change:
    """One input and its new value."""

    node_id: str
    input: str
    old: Any
    new: Any

    def text(self, workflow: Workflow) -> str:
        """The change as a line for people."""
        return f"{place(workflow, self.node_id, self.input)}: {_short(self.old)} -> {_short(self.new)}"


def read_workflow(path: Path) -> Workflow:
    """A workflow file in API format; WorkflowError when it is none."""
    try:
        workflow = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise WorkflowError(f"{path} is not JSON: {error}") from None
    if not isinstance(workflow, dict) or not workflow or not all(map(_is_node, workflow.values())):
        canvas = isinstance(workflow, dict) and isinstance(workflow.get("nodes"), list)
        what = "is a workflow as the canvas saves it, not in API format" if canvas else "is no workflow in API format"
        raise WorkflowError(f"{path} {what}. Open the workflow in ComfyUI and choose File, Export (API).")
    return workflow


def _is_node(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)


def with_seed(workflow: Workflow, seed: int | None) -> Workflow:
    """A copy of the workflow whose samplers use `seed`; the extraction's own seed stays."""
    if seed is None:
        return workflow
    return applied(workflow, [Change(*where, None, seed) for where in sampling_seeds(workflow)])


def with_recipe(workflow: Workflow, name: str | None) -> Workflow:
    """A copy of the workflow with a recipe (`steering.recipes`) in every node that takes one; None: as is.

    Raises OverrideError for a name that there is not, for a workflow without such a node, and for linked inputs.
    """
    if name is None:
        return workflow
    if name not in RECIPES:
        raise OverrideError(f"there is no recipe '{shown(name)}'; one of {', '.join(RECIPES)} was expected.")
    of_pair = dict.fromkeys((PAIR_SAMPLER, CALIBRATE), SAMPLER_RECIPES[name])
    of_class = {STEER: STEER_RECIPES[name], **of_pair, OF_IMAGE: IMAGE_RECIPES[name]}
    copy = json.loads(json.dumps(workflow))
    nodes = {i: node for i, node in copy.items() if node["class_type"] in of_class}
    if not nodes:
        raise OverrideError(
            "the workflow has none of Steer, Counterfactual Sampler and Counterfactual of Image, whose inputs a recipe "
            "sets."
        )
    for node_id, node in nodes.items():
        values = of_class[node["class_type"]]
        for key in values:
            if _is_link(node["inputs"].get(key), workflow):
                raise OverrideError(f"{place(workflow, node_id, key)} is linked, so that no recipe can set it.")
        # what belongs to another operator goes with it
        kept = {key: value for key, value in node["inputs"].items() if not key.startswith("operator.")}
        node["inputs"] = {**kept, **values, "recipe": name}
    return copy


def sampling_seeds(workflow: Workflow) -> list[tuple[str, str]]:
    """The inputs (node id, name) that seed sampled images."""
    others = ("RandomNoise", CALIBRATE)
    samplers = {i: n for i, n in workflow.items() if "Sampler" in n["class_type"] or n["class_type"] in others}
    return [(i, name) for i, node in samplers.items() for name in SEEDS if name in node["inputs"]]


def changes_for(workflow: Workflow, settings: Iterable[str]) -> list[Change]:
    """What `NAME=VALUE` settings change. NAME is `#id.input`, `Title.input`, `Class.input` or `input`.

    A bare `seed` means the sampler's, if there is one sampler. Raises OverrideError for a name that fits no input or
    several (it lists them), for a linked input, for a value of another type, and for an input that is set twice.
    """
    changes: dict[tuple[str, str], Change] = {}
    for setting in settings:
        name, value = _split(workflow, setting)
        node_id, key = only_input(workflow, name)
        old = workflow[node_id]["inputs"][key]
        if (node_id, key) in changes:
            raise OverrideError(f"{place(workflow, node_id, key)} is set twice; one value was expected.")
        if _is_link(old, workflow):
            source = f"{node_title(workflow, old[0])} (#{old[0]})"
            raise OverrideError(f"{place(workflow, node_id, key)} comes from {source}; set an input of that node.")
        changes[node_id, key] = Change(node_id, key, old, parsed(value, old, name))
    return list(changes.values())


def applied(workflow: Workflow, changes: Iterable[Change]) -> Workflow:
    """A copy of the workflow with the new values."""
    copy = json.loads(json.dumps(workflow))
    for change in changes:
        copy[change.node_id]["inputs"][change.input] = change.new
    return copy


def only_input(workflow: Workflow, name: str) -> tuple[str, str]:
    """The one input (node id, its name) that a name means; OverrideError when there is none, or more than one."""
    found = _meant(workflow, name)
    if not found:
        raise OverrideError(f"no input is named '{shown(name)}'. {_known(workflow, name)}")
    if len(found) > 1:
        which = ", ".join(f"'{exact(i, key)}' ({node_title(workflow, i)})" for i, key in found)
        raise OverrideError(f"'{shown(name)}' means {len(found)} inputs; name one of {which}.")
    return found[0]


def _meant(workflow: Workflow, name: str) -> list[tuple[str, str]]:
    """The inputs that a name means, by the first way of naming that fits any."""
    inputs = [(i, key) for i, node in workflow.items() for key in node["inputs"]]
    ways: tuple[Callable[[str, str], str], ...] = (
        exact,
        lambda i, key: f"{node_title(workflow, i)}.{key}",
        lambda i, key: f"{workflow[i]['class_type']}.{key}",
    )
    for way in ways:
        if found := [where for where in inputs if way(*where) == name]:
            return found
    seeds = [where for where in sampling_seeds(workflow) if where[1] == name]
    return seeds or [where for where in inputs if where[1] == name]


def parsed(text: str, old: Any, name: str) -> Any:
    """A value's text as the type of what stands there: bool, number, text; JSON for the rest. OverrideError."""

    def wrong(expected: str) -> OverrideError:
        return OverrideError(f"'{shown(name)}' is set to '{shown(text)}'; {expected} was expected.")

    if isinstance(old, bool):
        if text.lower() not in ("true", "false"):
            raise wrong("true or false")
        return text.lower() == "true"
    if isinstance(old, (int, float)):
        for kind in (int, float) if isinstance(old, int) else (float,):
            try:
                value = kind(text)
            except (ValueError, OverflowError):
                continue
            if math.isfinite(value):
                return value
        raise wrong("a number")
    if isinstance(old, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise wrong("JSON, as stands there now,") from None


def refuse_fractions(workflow: Workflow, changes: Iterable[Change], nodes: Callable[[str], Mapping]) -> None:
    """OverrideError for a fraction where the node takes whole numbers only: ComfyUI would cut it off unsaid.

    An API file writes the cfg 4.0 as 4, so the file does not tell; `nodes` gives ComfyUI's description of a class.
    """
    for change in changes:
        if isinstance(change.old, int) and isinstance(change.new, float):
            described = nodes(workflow[change.node_id]["class_type"])
            kinds = {**described.get("input", {}).get("required", {}), **described.get("input", {}).get("optional", {})}
            if kinds.get(change.input, [None])[0] == "INT":
                where = place(workflow, change.node_id, change.input)
                raise OverrideError(f"{where} is set to {change.new}; a whole number was expected.")


def exact(node_id: str, name: str) -> str:
    """The name that means this input whatever else the workflow holds."""
    return f"#{node_id}.{name}"


def place(workflow: Workflow, node_id: str, name: str) -> str:
    """An input for people: its node's title and id, and its name."""
    return f"{node_title(workflow, node_id)} (#{node_id}), {name}"


def _split(workflow: Workflow, setting: str) -> tuple[str, str]:
    """NAME and VALUE; a title or a value may hold an equals sign too."""
    if "=" not in setting:
        raise OverrideError(f"--set '{shown(setting)}': NAME=VALUE was expected, such as seed=7.")
    cuts = [i for i, letter in enumerate(setting) if letter == "="]
    cut = next((i for i in cuts if _meant(workflow, setting[:i])), cuts[0])
    return setting[:cut], setting[cut + 1 :]


def _known(workflow: Workflow, name: str) -> str:
    """The name nearest to one that is none; the inputs of the node that it begins with, else all that can be set."""
    free = [(i, k) for i, n in workflow.items() for k, value in n["inputs"].items() if not _is_link(value, workflow)]
    named = [w for w in free if name.startswith((f"#{w[0]}.", *(f"{part}." for part in _names_of(workflow, w[0]))))]
    listed = [f"'{exact(i, key)}'" if named else f"'{node_title(workflow, i)}.{key}'" for i, key in named or free]
    names = [part for i, key in free for part in (f"{node_title(workflow, i)}.{key}", key)]
    near = difflib.get_close_matches(name, names, n=1)
    meant = f"Did you mean '{shown(near[0])}'? " if near else ""
    return f"{meant}Those that can be set: {', '.join(dict.fromkeys(listed)) or 'none'}."


def _names_of(workflow: Workflow, node_id: str) -> tuple[str, str]:
    return node_title(workflow, node_id), workflow[node_id]["class_type"]


def _is_link(value: Any, workflow: Workflow) -> bool:
    return isinstance(value, list) and len(value) == 2 and str(value[0]) in workflow and isinstance(value[1], int)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
