"""A workflow with Calibrate Strength in the place of its Counterfactual Samplers."""

from __future__ import annotations

import copy
from typing import Any

from ..files.inside import shown
from .overrides import CALIBRATE, PAIR_SAMPLER, OverrideError, place
from .workflow import Workflow

DECODE = "VAEDecode"
ARROW = "->"
OWN = {"judge": "EndoPhantom", "passes": 5, "most": 2.0}
IMAGES = (0, 1)  # of a sampler's outputs, those that are latents


def with_calibration(workflow: Workflow, classes: str | None) -> Workflow:
    """A copy of the workflow in which every Counterfactual Sampler finds each image's least strength; None: as is.

    ``classes``: 'SOURCE -> TARGET', as the judge calls them. The VAE is that of the node that decodes the sampler's
    latents; judge, passes and most are the node's defaults, for ``--set`` to change. The ids stay, and with them all
    links and names. OverrideError where it can't be done.
    """
    if classes is None:
        return workflow
    source, arrow, target = (part.strip() for part in classes.partition(ARROW))
    if not (source and arrow and target):
        raise OverrideError(
            f"--calibrate '{shown(classes)}': 'SOURCE -> TARGET' was expected, such as 'polyps -> normal cecum'."
        )
    made = copy.deepcopy(workflow)
    samplers = [node_id for node_id, node in made.items() if node["class_type"] == PAIR_SAMPLER]
    if not samplers:
        raise OverrideError("the workflow has no Counterfactual Sampler, whose place Calibrate Strength could take.")
    for node_id in samplers:
        inputs = {key: value for key, value in made[node_id]["inputs"].items() if key != "strengths"}
        own = {**OWN, "source_class": source, "target_class": target, "vae": _vae_of(made, node_id)}
        made[node_id] = {**made[node_id], "class_type": CALIBRATE, "inputs": {**inputs, **own}}
    return made


def _vae_of(workflow: Workflow, sampler: str) -> Any:
    """The link to the VAE that decodes what a sampler gives."""
    for node in workflow.values():
        samples = node["inputs"].get("samples")
        if node["class_type"] == DECODE and samples in [[sampler, output] for output in IMAGES]:
            return node["inputs"]["vae"]
    raise OverrideError(
        f"{place(workflow, sampler, 'counterfactual')} is decoded by no VAE Decode, so that it is not known with which "
        "VAE the judge would see its images. Add one, or put Calibrate Strength into the workflow."
    )
