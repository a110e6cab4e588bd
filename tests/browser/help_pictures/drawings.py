"""Pictures of what nodes make: images under captions, and the nodes' own drawings cut to the width of a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from medsteer_core.endophantom.phantom import CLASSES
from medsteer_core.endophantom.true_pairs import true_pairs
from medsteer_core.pictures import difference as drawn
from medsteer_core.pictures.drawing import Layout, new_figure, pixels, show_colour, write
from medsteer_core.pictures.panel import MAP_COLOURS
from medsteer_core.steering.recipes import IMAGE_RECIPES, REMOVE_FOCAL

from .graphs import CECUM, POLYPS, Phantom

if TYPE_CHECKING:
    from .studio import Studio

SEED, CLASSES_SEED, SCENE = 20004, 5000, 4
SCENES = ((POLYPS, CECUM, SCENE), ("dyed lifted polyps", POLYPS, 5), ("esophagitis", "normal z-line", 3))
JUDGED = {"judge": "EndoPhantom", "source_class": POLYPS, "target_class": CECUM}


def difference(studio: Studio) -> Image.Image:
    graph = Phantom()
    pair = graph.pair(graph.steered(graph.vector()), SEED, lock="none")
    images = dict(zip(("factual", "counterfactual"), map(graph.decoded, pair[:2]), strict=True))
    compared = graph.add("MedSteer_CounterfactualCompare", **images)[0]
    found = studio.images(graph, {**images, "difference": compared})
    below = of_width(520, found.pop("difference"))
    return stacked(tiles(found, 250, columns=2), tiles({"difference": below}, below.size, columns=1))


def panel(studio: Studio) -> Image.Image:
    """The node's panel, a row of four tiles, as two rows of two."""
    graph = Phantom()
    factual, steered, concept_map, mask, *_ = graph.pair(graph.steered(graph.vector()), SEED)
    images = {"factual": graph.decoded(factual), "counterfactual": graph.decoded(steered)}
    more = {"concept_map": concept_map, "mask": mask, "judge": "EndoPhantom"}
    whole = studio.images(graph, {"panel": graph.add("MedSteer_CounterfactualPanel", **images, **more)[0]})["panel"]
    parts = ((12, 0, 620, 352), (628, 0, 1236, 352), (308, 352, 940, 402), (0, 402, 560, 512), (644, 402, 1164, 512))
    return of_width(540, stacked(*map(whole.crop, parts)))


def outputs(studio: Studio) -> Image.Image:
    graph = Phantom()
    model = graph.steered(graph.vector())
    factual, steered, concept_map, *_ = graph.pair(model, SEED, lock="none")
    _, locked, _, mask, *_ = graph.pair(model, SEED)
    shown = {
        "factual": graph.decoded(factual),
        "counterfactual": graph.decoded(steered),
        "concept map": graph.add("MaskToImage", mask=concept_map)[0],
        "mask": graph.add("MaskToImage", mask=mask)[0],
        "locked": graph.decoded(locked),
    }
    found = studio.images(graph, shown)
    coloured = colormaps[MAP_COLOURS](numpy.asarray(found["concept map"].convert("L")), bytes=True)
    found["concept map"] = Image.fromarray(coloured).convert("RGB")
    for name in ("concept map", "mask"):  # of few cells, whose edges stay sharp
        found[name] = found[name].resize((166, 166), Image.Resampling.NEAREST)
    return tiles(found, 166, columns=3)


def strengths(studio: Studio) -> Image.Image:
    graph, given = Phantom(), ("0.2", "0.5", "1", "2")
    model = graph.steered(graph.vector(), **{"operator.strength": 1.0, "operator.focus": 2.0, "start_percent": 0.5})
    factual, steered, *_ = graph.pair(model, SEED, strengths=", ".join(given), lock="none")
    shown = {f"strength {strength}": graph.decoded(steered, place) for place, strength in enumerate(given)}
    return tiles(studio.images(graph, {"no steering": graph.decoded(factual), **shown}), 166, columns=3)


def sweep(studio: Studio) -> Image.Image:
    """The corner of a grid of many strengths, where words are large beside the tiles."""
    graph, given = Phantom(), "0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75"
    factual, steered, *_ = graph.pair(graph.steered(graph.vector()), SEED, batch=2, strengths=given)
    images = {"factual": graph.decoded(factual), "counterfactual": graph.decoded(steered)}
    grid = graph.add("MedSteer_StrengthSweep", **images, strengths=given, **JUDGED)[0]
    return of_width(540, studio.images(graph, {"grid": grid})["grid"].crop((0, 0, 576, 512)))


def report(studio: Studio) -> Image.Image:
    """The node's picture without its middle: the flip rates, and below them what was kept."""
    graph, count = Phantom(), 8
    vector = graph.vector()
    random = graph.add("MedSteer_RandomDirection", vector=vector, seed=0)[0]
    factual, both, *_ = graph.pair(graph.steered(vector), SEED, count, strengths="0, 1")
    arms = {
        "factual": graph.decoded(factual),
        "counterfactual": graph.decoded(both, count, count),
        "strength_0": graph.decoded(both, 0, count),
        "random_direction": graph.decoded(graph.pair(graph.steered(random), SEED, count)[1]),
        "reprompted": graph.sample(CECUM, SEED, count),
    }
    plot = studio.images(graph, {"plot": graph.add("MedSteer_EvaluatePairs", **arms, **JUDGED)[2]})["plot"]
    flips, kept = plot.crop((0, 0, 482, 488)), plot.crop((0, 46, 482, 488))
    kept.paste(plot.crop((768, 46, 1053, 488)), (197, 0))
    return of_width(460, stacked(flips, kept))


def vector(studio: Studio) -> Image.Image:
    graph = Phantom()
    inspected = graph.add("MedSteer_InspectVector", vector=graph.vector(noise="paired"))[0]
    return of_width(640, studio.images(graph, {"picture": inspected})["picture"])


def classes(studio: Studio) -> Image.Image:
    graph = Phantom()
    found = studio.images(graph, {name: graph.sample(name, CLASSES_SEED) for name in CLASSES})
    return tiles(found, 179, columns=4, words=14)


def own_image(studio: Studio) -> Image.Image:
    graph = Phantom()
    image, truth, *_ = graph.add(
        "MedSteer_PhantomImage", shows=POLYPS, truth_shows=CECUM, seed=SCENE, width=128, height=128, batch_size=1
    )
    links = {"image": image, "model": graph.model, "vae": graph.vae, "negative": graph.empty}
    prompts = {"positive": graph.prompt(POLYPS), "counterfactual": graph.prompt(CECUM)}
    others = {"steps": 20, "scheduler": "normal", "strengths": "1", "size": "the model's"}
    settings = {**links, **prompts, **others, "computed_tokens": "in the mask", **IMAGE_RECIPES[REMOVE_FOCAL]}
    changed = graph.add("MedSteer_CounterfactualOfImage", **settings)[1]
    found = studio.images(graph, {"your image": image, "counterfactual": changed, "the truth": truth})
    first, second, third = map(as_tensor, found.values())
    levels = drawn.luminance_difference(first[None], second[None])
    scale = drawn.difference_scale(levels)
    layout = Layout((200, 200), 1, 4, top=44, bottom=112)
    figure = new_figure(layout)
    for column, name in enumerate(("your image", "counterfactual", "difference", "the truth")):
        write(figure, layout, name, layout.at(0, column)[0] + 100, 23, 22, weight="bold", fit=200)
    for column, one in ((0, first), (1, second), (3, third)):
        show_colour(figure, layout, (0, column), one)
    drawn.show_levels(figure, layout, (0, 2), levels[0], scale)
    drawn.difference_legend(figure, layout, scale, (layout.width - 500) / 2, 500, 15)
    return as_image(pixels(figure))


def phantoms(_studio: Studio) -> Image.Image:
    pairs = [true_pairs(shows, truth, 1, seed) for shows, truth, seed in SCENES]
    rows = {name: torch.cat([getattr(pair, name) for pair in pairs]) for name in ("image", "truth", "mask")}
    return as_image(drawn.contact_sheet({**rows, "mask": rows["mask"][:, None].expand(-1, 3, -1, -1)}, 112))


# Those of one vector stand together: the server keeps what the run before had.
DRAWINGS: dict[str, Callable[[Studio], Image.Image]] = {
    "MedSteer_PhantomImage/phantoms.jpg": phantoms,
    "MedSteer_CounterfactualOfImage/own_image.jpg": own_image,
    "MedSteer_LoadEndoPhantom/classes.jpg": classes,
    "MedSteer_ExtractPathologyVector/vector.jpg": vector,
    "MedSteer_CounterfactualCompare/difference.jpg": difference,
    "MedSteer_CounterfactualPanel/panel.jpg": panel,
    "MedSteer_CounterfactualSampler/outputs.jpg": outputs,
    "MedSteer_Steer/strengths.jpg": strengths,
    "MedSteer_StrengthSweep/sweep.jpg": sweep,
    "MedSteer_EvaluatePairs/report.jpg": report,
}


def tiles(pictures: Mapping[str, Image.Image], size: int | tuple[int, int], columns: int, words: int = 18):
    """Pictures in rows, each at ``size`` below its name."""
    width, height = (size, size) if isinstance(size, int) else size
    rows = -(-len(pictures) // columns)
    layout = Layout((height, width), rows, columns, left=10, right=10, top=30, bottom=10, gap=10, row_gap=31)
    places = [layout.at(*divmod(number, columns)) for number in range(len(pictures))]
    figure = new_figure(layout)
    for name, (x, y) in zip(pictures, places, strict=True):
        write(figure, layout, name, x + width / 2, y - 14, words, weight="bold", fit=width)
    sheet = as_image(pixels(figure))
    for picture, (x, y) in zip(pictures.values(), places, strict=True):
        sheet.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (round(x), y))
    return sheet


def stacked(*pictures: Image.Image) -> Image.Image:
    """Pictures one below the other, in the middle, on white."""
    sheet = Image.new("RGB", (max(one.width for one in pictures), sum(one.height for one in pictures)), "white")
    top = 0
    for one in pictures:
        sheet.paste(one, ((sheet.width - one.width) // 2, top))
        top += one.height
    return sheet


def of_width(width: int, picture: Image.Image) -> Image.Image:
    return picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)


def as_image(picture: Tensor) -> Image.Image:
    """A picture ``(3, H, W)`` in 0..1."""
    return Image.fromarray((picture * 255).round().to(torch.uint8).movedim(0, -1).contiguous().numpy())


def as_tensor(image: Image.Image) -> Tensor:
    """The same the other way round."""
    return torch.from_numpy(numpy.array(image)).movedim(-1, 0).float() / 255
