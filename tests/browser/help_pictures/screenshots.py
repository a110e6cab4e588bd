"""Pictures of a node in ComfyUI's front end with the ends of its links, most of them after a run."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from PIL import Image

from medsteer_core.run.workflow import WorkflowError

from .graphs import CECUM, POLYPS, SMALL, Phantom

if TYPE_CHECKING:
    from .studio import Studio

DIT = "diffusion_models/PixArt-XL-2-512x512/transformer/diffusion_pytorch_model.safetensors"
LORA = "medsteer"
# What no run opens, and the lists of the nodes have to show.
LISTED = (
    DIT,
    *(f"loras/{LORA}/{part}_lora/{file}" for part in ("transformer", "text_encoder")
      for file in ("adapter_model.safetensors", "adapter_config.json")),
)  # fmt: skip
# The node of a class at the origin, those that it is linked to on its two sides, and no others.
LAY_OUT = """([kind, width, places]) => {
  const {_nodes: nodes, links} = app.graph, main = nodes.find(node => node.type === kind);
  const before = main.inputs.filter(input => input.link != null).map(input => links.get(input.link).origin_id);
  const after = main.outputs.flatMap(output => output.links ?? []).map(id => links.get(id).target_id);
  for (const [ids, x] of [[after, width + 150], [before, -500]])
    [...new Set(ids)].forEach((id, i) => { app.graph.getNodeById(id).pos = [x, 150 * i]; });
  main.pos = [0, 0];
  for (const [type, [x, y, width]] of Object.entries(places)) {
    const node = nodes.find(node => node.type === type);
    node.pos = [x, y]; node.setSize([width, node.size[1]]);
  }
  const kept = new Set([main.id, ...before, ...after, ...nodes.filter(n => n.type in places).map(n => n.id)]);
  [...nodes].filter(node => !kept.has(node.id)).forEach(node => app.graph.remove(node));
}"""
# No taller than it must be, with `more` for its pictures; its height then.
FIT = """([kind, width, more]) => { const node = app.graph._nodes.find(node => node.type === kind);
  node.setSize([width, node.size[1]]); node.setSize([width, node.computeSize()[1] + more]);
  node.setDirtyCanvas(true, true); return node.size[1]; }"""
NOTED = """kind => { const node = app.graph._nodes.find(node => node.type === kind);
  const note = node.widgets.find(widget => widget.name === 'medsteer_note')?.element;
  return note?.isConnected && note.clientHeight > 0 && note.scrollHeight === note.clientHeight
    && (node.imgs ?? []).every(image => image.naturalWidth > 0); }"""


def shot(
    studio: Studio, graph: Phantom, kind: str, width: int = 283, run: bool = True, more: int = 0, span: int = 400,
    scale: float = 1.2, places: Mapping[str, Sequence[int]] | None = None, frame: Sequence[int] | None = None,
) -> Image.Image:  # fmt: skip
    """The node of the class ``kind`` in the middle of ``span`` units of the canvas, or ``frame`` (x, y, width, height).

    ``places``: where other nodes lie and how wide they are, by their classes.
    """
    front, page = studio.front, studio.front.page
    front.clear()
    file = studio.server.base / "temp" / "graph.json"
    file.write_text(json.dumps(graph), encoding="utf-8")
    front.drop(file)
    if run:
        front.show(kind, scale)
        entry = front.run()
        if entry["status"]["status_str"] != "success":
            raise WorkflowError(f"{kind}: {dict(entry['status']['messages'])['execution_error']['exception_message']}")
    page.evaluate(LAY_OUT, [kind, width, places or {}])
    front.show(kind, scale)
    page.mouse.move(1900, 1300)
    if run:
        page.wait_for_function(NOTED, arg=kind)
    for _ in range(2):  # a note's height follows the width
        height = page.evaluate(FIT, [kind, width, more])
        page.wait_for_timeout(600)
    x, y = front.show(kind, scale)
    page.wait_for_timeout(600)
    left, top, wide, tall = frame or ((width - span) / 2, -37, span, height + 46)
    place = {"x": x + (left - 70) * scale, "y": y + (top + 14) * scale}
    taken = page.screenshot(clip={**place, "width": wide * scale, "height": tall * scale})
    return Image.open(io.BytesIO(taken)).convert("RGB")


def combine(studio: Studio) -> Image.Image:
    graph, kind = Phantom(), "MedSteer_CombineVectors"
    parts = {"a": graph.vector("dyed lifted polyps", **SMALL), "b": graph.vector(**SMALL)}
    graph.add("MedSteer_InspectVector", vector=graph.add(kind, **parts, how="subtract")[0])
    return shot(studio, graph, kind)


def saved(studio: Studio, kind: str) -> Image.Image:
    graph = Phantom()
    graph.add(kind, vector=graph.vector(**SMALL), filename_prefix=POLYPS)
    return shot(studio, graph, kind, 330)


def load(studio: Studio) -> Image.Image:
    graph, kind = Phantom(), "MedSteer_LoadPathologyVector"
    vector = graph.add(kind, vector_name=studio.vector_name("safetensors"))[0]
    steered = graph.steered(vector, preset="MedSteer (paper)", start_percent=0.0)
    graph.add("PreviewImage", images=graph.decoded(graph.pair(steered, seed=0, steps=1, lock="none")[0]))
    return shot(studio, graph, kind, 330)


def imported(studio: Studio) -> Image.Image:
    graph, kind = Phantom(), "MedSteer_ImportPathologyVector"
    read = {"file_name": studio.vector_name("npz"), "model": graph.model, "steps": SMALL["steps"]}
    graph.add("MedSteer_InspectVector", vector=graph.add(kind, **read, schedule="normal")[0])
    return shot(studio, graph, kind)


def random(studio: Studio) -> Image.Image:
    graph, kind = Phantom(), "MedSteer_RandomDirection"
    graph.add("MedSteer_InspectVector", vector=graph.add(kind, vector=graph.vector(**SMALL), seed=0)[0])
    return shot(studio, graph, kind)


def contexts(studio: Studio) -> Image.Image:
    graph, kind = Phantom(), "MedSteer_PromptContexts"
    texts = "An endoscopic image of {concept}\nA colonoscopy frame showing {concept}\nA picture of {concept}"
    present, absent, *_ = graph.add(kind, clip=graph.clip, present=POLYPS, absent=CECUM, templates=texts)
    few = {**SMALL, "samples": 3, "steps": 1}
    graph.add("MedSteer_InspectVector", vector=graph.vector(**few, present=present, absent=absent))
    return shot(studio, graph, kind)


def dit(studio: Studio) -> Image.Image:
    graph, kind = Phantom(), "MedSteer_LoadDiT"
    graph.model = graph.add(kind, model_name=DIT, family="PixArt-alpha")[0]
    graph.vector()
    return shot(studio, graph, kind, 330, run=False)


def lora(studio: Studio) -> Image.Image:
    graph, kind = Phantom(), "MedSteer_LoadPEFTLoRA"
    graph.model, graph.clip, *_ = graph.add(kind, model=graph.model, clip=graph.clip, lora_name=LORA)
    graph.vector()
    return shot(studio, graph, kind, run=False)


def sigmas(studio: Studio) -> Image.Image:
    graph, kind = Phantom(), "MedSteer_PixArtSigmas"
    chosen = {"sampler": graph.add("KSamplerSelect", sampler_name="dpmpp_2m")[0], "sigmas": graph.add(kind)[0]}
    graph.vector(**chosen)
    places = {"KSamplerSelect": (0, -115, 195), "MedSteer_ExtractPathologyVector": (257, -115, 250)}
    return shot(studio, graph, kind, 195, run=False, places=places, frame=(-18, -163, 400, 259))


def dataset(studio: Studio) -> Image.Image:
    graph, kind = Phantom(), "MedSteer_SaveCounterfactualPairs"
    pairs = graph.pair(graph.steered(graph.vector()), seed=35, batch=4)
    images = {"factual": graph.decoded(pairs[0]), "counterfactual": graph.decoded(pairs[1])}
    graph.add(kind, **images, record=pairs[5], boxes="COCO")
    return shot(studio, graph, kind, 268, more=125, span=290, scale=1.17)


SCREENSHOTS: dict[str, Callable[[Studio], Image.Image]] = {
    "MedSteer_SaveCounterfactualPairs/dataset.jpg": dataset,
    "MedSteer_CombineVectors/combine.jpg": combine,
    "MedSteer_ExportPathologyVector/export.jpg": partial(saved, kind="MedSteer_ExportPathologyVector"),
    "MedSteer_ImportPathologyVector/import.jpg": imported,
    "MedSteer_LoadDiT/dit.jpg": dit,
    "MedSteer_LoadPEFTLoRA/lora.jpg": lora,
    "MedSteer_LoadPathologyVector/load.jpg": load,
    "MedSteer_PixArtSigmas/sigmas.jpg": sigmas,
    "MedSteer_PromptContexts/contexts.jpg": contexts,
    "MedSteer_RandomDirection/random.jpg": random,
    "MedSteer_SavePathologyVector/save.jpg": partial(saved, kind="MedSteer_SavePathologyVector"),
}
