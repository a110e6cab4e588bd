"""A first pair from Python: one call starts a ComfyUI, runs the first template with two prompts, and ends it.

    from medsteer_core import pair
    factual, counterfactual = pair("An endoscopic image of polyps", "An endoscopic image of normal cecum", seed=7)

For more than a few pairs keep a server (`run.server.ComfyServer`) and a client (`run.client.ComfyClient`) of your own.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MedSteerError
from .client import ComfyClient
from .server import ComfyServer, comfyui_from_environment

if TYPE_CHECKING:
    from PIL.Image import Image

    from .workflow import Workflow

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "example_workflows" / "api" / "a_first_pair.json"
SAMPLER, DECODE = "MedSteer_CounterfactualSampler", "VAEDecode"


def pair(factual: str, counterfactual: str, seed: int = 20004, cpu: bool | None = None) -> tuple[Image, Image]:
    """The factual and the counterfactual image of two prompts, by EndoPhantom, as Pillow images of 128 x 128 pixels.

    ``COMFYUI_PATH`` names ComfyUI's folder; this Python runs it. ``cpu``: use the CPU although there is a GPU. Raises
    MedSteerError where there is no ComfyUI or the prompts are the same, and what `ComfyClient.run` raises.
    """
    from PIL import Image as images

    if factual == counterfactual:
        raise MedSteerError("Both prompts are the same, so there is nothing that the images could differ in.")
    with ComfyServer(comfyui_from_environment(), ROOT, cpu=cpu) as server:
        result = ComfyClient(server.address).run(workflow(factual, counterfactual, seed))
        return tuple(images.open(io.BytesIO(result.images(title)[0])).convert("RGB") for title in ("A", "B"))


def workflow(factual: str, counterfactual: str, seed: int) -> Workflow:
    """The first template with these prompts and this seed, and with two nodes that save its images."""
    nodes = json.loads(TEMPLATE.read_text(encoding="utf-8"))
    (sampler,) = (node for node in nodes.values() if node["class_type"] == SAMPLER)
    sampler["inputs"]["seed"] = seed
    for name, text in (("positive", factual), ("counterfactual", counterfactual)):
        nodes[sampler["inputs"][name][0]]["inputs"]["text"] = text
    decoders = {node["inputs"]["samples"][1]: i for i, node in nodes.items() if node["class_type"] == DECODE}
    for place, title in enumerate("AB"):
        inputs = {"images": [decoders[place], 0], "filename_prefix": "medsteer/pair"}
        nodes[f"save {title}"] = {"class_type": "SaveImage", "inputs": inputs, "_meta": {"title": title}}
    return nodes
