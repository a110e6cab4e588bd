"""A plan's tasks: each is one workflow to queue, with an id that follows from what it makes.

The plan's values go where the workflow has a place for them, found from its Save Counterfactual Pairs node: the seeds
(or real images) and strengths to the Counterfactual Sampler (of Image) that its record comes from, the concepts to the
prompts of that sampler's Extract Pathology Vector. Values under `set` go where their names say.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..dataset.records import short_hash
from ..errors import MedSteerError
from ..run.overrides import OverrideError, only_input, place
from ..run.workflow import Workflow, node_title
from .plan import Choice, Plan

SAVE, SAMPLER = "MedSteer_SaveCounterfactualPairs", "MedSteer_CounterfactualSampler"
OF_IMAGE = "MedSteer_CounterfactualOfImage"
EXTRACT, LOAD = "MedSteer_ExtractPathologyVector", "MedSteer_LoadPathologyVector"
KINDS = {"true or false": bool, "a text": str, "a number": int | float, "a value": object}
FOLDER = "medsteer/scale"  # of the workers' ComfyUI, in its output folder; below it one folder a task


@dataclass(frozen=True)
class Task:
    """One workflow to run. `group` is the same for tasks that differ in their seed only, `pairs` what it makes.

    image: the bytes of the real image's file and its name, where there is one; `load` is the node that loads it.
    """

    task_id: str
    group: int
    seed: int
    pairs: int
    images: int
    workflow: Workflow
    image: tuple[bytes, str] | None = None
    load: str = ""
    file_sha256: str = ""


class Tasks:
    """The tasks of a plan by their index, the seeds innermost; made when asked for. MedSteerError for a workflow
    that has no place for the plan's values."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        axes = [plan.choices, plan.prompts, *plan.settings.values()]
        self._groups = list(itertools.islice(itertools.product(*axes), plan.groups))
        self._resolved = lru_cache(maxsize=16)(self._resolve)
        for group in range(min(plan.groups, 1000)):
            self._resolved(group)

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def boxes(self) -> str:
        """Which files of boxes Save Counterfactual Pairs is asked to write; for the whole dataset, once it is whole."""
        boxes = self.plan.workflow[only(self.plan.workflow, SAVE)]["inputs"].get("boxes", "none")
        return boxes if isinstance(boxes, str) else "none"

    def group_of(self, index: int) -> int:
        return index // self.plan.innermost

    def id_of(self, index: int) -> str:
        """The task's id: 16 hex digits of a hash of its workflow."""
        group, place = divmod(index, self.plan.innermost)
        if self.plan.images:
            image = self.plan.images[place]
            return short_hash([self._resolved(group)[1], image.digest, image.group])
        return short_hash([self._resolved(group)[1], self.plan.seeds[place]])

    def __getitem__(self, index: int) -> Task:
        if not 0 <= index < len(self):
            raise IndexError(index)
        group, place = divmod(index, self.plan.innermost)
        base, _, images, strengths = self._resolved(group)
        task_id, workflow = self.id_of(index), json.loads(base)
        save, sampler = only(workflow, SAVE), sampler_of(workflow)
        workflow[save]["inputs"]["folder"] = f"{FOLDER}/{task_id}"
        if self.plan.images:
            return self._of_image(task_id, group, place, images * strengths, workflow)
        seed = self.plan.seeds[place]
        workflow[sampler]["inputs"]["seed"] = seed
        return Task(task_id, group, seed, images * strengths, images, workflow)

    def _of_image(self, task_id: str, group: int, place: int, pairs: int, workflow: dict[str, Any]) -> Task:
        image, sampler = self.plan.images[place], sampler_of(workflow)
        load = workflow[sampler]["inputs"]["image"][0]
        workflow[load]["inputs"]["image"] = f"medsteer_{image.digest[:16]}.png"  # says nothing of whose it is
        if image.group:
            workflow[sampler]["inputs"]["group"] = short_hash({"group": image.group})
        told = (image.read(), image.path.name)
        return Task(task_id, group, place, pairs, 1, workflow, told, load, image.digest)

    def __iter__(self) -> Iterator[Task]:
        return (self[index] for index in range(len(self)))

    def _resolve(self, group: int) -> tuple[str, str, int, int]:
        """A group's workflow as JSON, its hash without what does not count, images a task, strengths."""
        plan = self.plan
        choice, prompt, *values = self._groups[group]
        workflow = json.loads(json.dumps(plan.workflow))
        settings = [(("set", name), value) for name, value in zip(plan.settings, values, strict=True)]
        at = plan.choices.index(choice)
        settings += [(("pairs", at, "set", name), value) for name, value in choice.values.items()]
        for where, value in settings:
            try:
                put(workflow, str(where[-1]), value)
            except OverrideError as error:
                raise plan.source.error(where, str(error)) from error
        save, sampler = only(workflow, SAVE), sampler_of(workflow)
        if plan.strengths:
            workflow[sampler]["inputs"]["strengths"] = ", ".join(f"{value:g}" for value in plan.strengths)
        if choice.present is not None:
            _put_concepts(workflow, save, sampler, choice, prompt)
        for key, share in (("validation_fraction", plan.validation), ("test_fraction", plan.test)):
            if share is not None:
                workflow[save]["inputs"][key] = share
        if workflow[sampler]["class_type"] == OF_IMAGE or plan.images:
            images = _put_loader(plan, workflow, sampler)
        else:
            images = _put_chunk(workflow, sampler, plan.chunk)
            check_unseen_seeds(plan, workflow, save, sampler)
        inputs = workflow[sampler]["inputs"]
        counted = {**workflow, sampler: {**workflow[sampler], "inputs": {**inputs, "seed": None}}}
        counted[save] = {**workflow[save], "inputs": {**workflow[save]["inputs"], "folder": None}}
        counted = {number: {k: v for k, v in node.items() if k != "_meta"} for number, node in counted.items()}
        strengths = inputs.get("strengths")
        many = len([part for part in strengths.split(",") if part.strip()]) if isinstance(strengths, str) else 1
        return json.dumps(workflow), short_hash(counted), images, max(1, many)


def only(workflow: Workflow, class_type: str) -> str:
    """The id of the workflow's one node of a class. MedSteerError when there is none, or more than one."""
    found = [number for number, node in workflow.items() if node["class_type"] == class_type]
    if len(found) != 1:
        what = "Save Counterfactual Pairs" if class_type == SAVE else class_type
        raise MedSteerError(f"The workflow has {len(found)} nodes of {what}; exactly one was expected.")
    return found[0]


def sampler_of(workflow: Workflow) -> str:
    """The id of the Counterfactual Sampler, or Counterfactual of Image, that the saved record comes from."""
    link = workflow[only(workflow, SAVE)]["inputs"].get("record")
    node = workflow.get(link[0]) if isinstance(link, list) and link else None
    if node is None or node["class_type"] not in (SAMPLER, OF_IMAGE):
        raise MedSteerError(
            "Connect 'record' of Save Counterfactual Pairs straight to a Counterfactual Sampler or a Counterfactual of "
            "Image."
        )
    for name in ("seed", "noise"):
        if isinstance(node["inputs"].get(name), list):
            raise MedSteerError(f"The plan's seeds go to Counterfactual Sampler; leave its '{name}' unconnected.")
    return link[0]


def put(workflow: Workflow, name: str, value: Any) -> None:
    """Set the input that a name means, as `--set` of the headless command names it.

    OverrideError where it means none or several, a connected one, or one that holds a value of another type.
    """
    number, key = only_input(workflow, name)
    inputs = workflow[number]["inputs"]
    if isinstance(inputs[key], list):
        raise OverrideError(f"{place(workflow, number, key)} is connected to another node; set an input of that one.")
    if _kind(inputs[key]) != _kind(value):
        was = f"{place(workflow, number, key)} is set to {value!r}"
        raise OverrideError(f"{was}; {_kind(inputs[key])} such as {inputs[key]!r} was expected.")
    if (workflow[number]["class_type"], key) in ((SAMPLER, "seed"), (SAVE, "folder")):
        raise OverrideError(f"{place(workflow, number, key)} is the plan's own: it says 'seeds' and 'output'.")
    inputs[key] = value


def _kind(value: Any) -> str:
    return next(name for name, kind in KINDS.items() if isinstance(value, kind))


def upstream(workflow: Workflow, start: str) -> Iterator[str]:
    """The ids of all nodes that the inputs of ``start`` come from, however far back."""
    waiting, seen = [start], {start}
    while waiting:
        for value in workflow[waiting.pop()]["inputs"].values():
            link = value[0] if isinstance(value, list) and len(value) == 2 else None
            if isinstance(link, str) and link in workflow and link not in seen:
                seen.add(link)
                waiting.append(link)
                yield link


def _put_concepts(workflow: Workflow, save: str, sampler: str, choice: Choice, prompt: str | None) -> None:
    """Both concepts into the prompts, and into the labels where those are not linked."""
    extracts = [n for n in upstream(workflow, sampler) if workflow[n]["class_type"] == EXTRACT]
    if len(extracts) > 1:
        raise MedSteerError(
            f"The workflow extracts {len(extracts)} vectors, so it is open which one 'present' and 'absent' are for; "
            "leave 'pairs' out and give the prompts under 'set'."
        )
    positive = _text_node(workflow, sampler, "positive")
    places = {"present": positive}
    if extracts:
        places = {role: _text_node(workflow, extracts[0], role) for role in ("present", "absent")}
    elif "counterfactual" in workflow[sampler]["inputs"]:
        places["absent"] = _text_node(workflow, sampler, "counterfactual")
    template = prompt or "An endoscopic image of {concept}"
    words = {"present": choice.present, "absent": choice.absent}
    for role, number in places.items():
        workflow[number]["inputs"]["text"] = template.replace("{concept}", words[role])
    # The factual image shows what the sampler's prompt says.
    source, target = ("absent", "present") if positive == places.get("absent") else ("present", "absent")
    for key, role in (("source_class", source), ("target_class", target)):
        if not isinstance(workflow[save]["inputs"].get(key), list):
            workflow[save]["inputs"][key] = words[role]


def _text_node(workflow: Workflow, number: str, role: str) -> str:
    """The id of the node whose `text` is behind an input."""
    link = workflow[number]["inputs"].get(role)
    node = workflow.get(link[0]) if isinstance(link, list) and link else None
    if node is None or not isinstance(node["inputs"].get("text"), str):
        raise MedSteerError(
            f"'pairs' needs a text prompt right at '{role}' of {node_title(workflow, number)}; leave 'pairs' out and "
            "give the prompts under 'set'."
        )
    return link[0]


def _put_loader(plan: Plan, workflow: dict[str, Any], sampler: str) -> int:
    """A Load Image node in the place of whatever gives Counterfactual of Image its image; returns 1, the images a task.

    MedSteerError where a plan of images has another sampler, or a plan of seeds this one.
    """
    if not plan.images or workflow[sampler]["class_type"] != OF_IMAGE:
        raise plan.source.error(
            ("images",) if plan.images else ("seeds",),
            "real 'images' go with Counterfactual of Image, and 'seeds' with Counterfactual Sampler; the workflow's "
            f"record comes from {node_title(workflow, sampler)}.",
        )
    given = workflow[sampler]["inputs"].get("image")
    own = str(max((int(number) for number in workflow if number.isdecimal()), default=0) + 1)
    workflow[own] = {"class_type": "LoadImage", "inputs": {"image": ""}, "_meta": {"title": "Load Image"}}
    for node in workflow.values():
        node["inputs"] |= {name: [own, 0] for name, value in node["inputs"].items() if value == given}
    workflow[sampler]["inputs"]["image"] = [own, 0]
    return 1


def _put_chunk(workflow: dict[str, Any], sampler: str, chunk: int | None) -> int:
    """Set how many images are sampled of each seed; returns it."""
    link = workflow[sampler]["inputs"].get("latent_image")
    node = workflow.get(link[0]) if isinstance(link, list) and link else None
    size = None if node is None else node["inputs"].get("batch_size")
    if chunk is None:
        return size if isinstance(size, int) else 1
    if not isinstance(size, int):
        raise MedSteerError(
            "'chunk' needs Empty Latent Image (or another with 'batch_size') at Counterfactual Sampler."
        )
    if sum(link == value for other in workflow.values() for value in other["inputs"].values()) > 1:
        # The vector's extraction takes its size from there too, and is to stay as it is.
        own = str(max((int(number) for number in workflow if number.isdecimal()), default=0) + 1)
        workflow[own] = {**node, "inputs": dict(node["inputs"])}
        workflow[sampler]["inputs"]["latent_image"] = [own, link[1]]
        node = workflow[own]
    node["inputs"]["batch_size"] = chunk
    return chunk


def check_unseen_seeds(plan: Plan, workflow: Workflow, save: str, sampler: str) -> None:
    """MedSteerError when a seed that a vector is extracted from could reach validation or test."""
    inputs: Mapping[str, Any] = workflow[save]["inputs"]
    split = inputs.get("split", "auto")
    shares = [inputs.get(f"{name}_fraction", 0.1) for name in ("validation", "test")]
    if split == "train" or (split == "auto" and not any(isinstance(s, list) or s > 0 for s in shares)):
        return
    for number in upstream(workflow, sampler):
        seed = workflow[number]["inputs"].get("seed")
        if workflow[number]["class_type"] == EXTRACT and isinstance(seed, int) and seed in plan.seeds:
            what = f"{seed} is the seed that {node_title(workflow, number)} makes the vector from"
            raise plan.source.error(
                ("seeds",),
                f"{what}, so its pairs may not be evaluated on. Take it out, give the node another seed, or set "
                "splits to {validation: 0, test: 0}.",
            )
