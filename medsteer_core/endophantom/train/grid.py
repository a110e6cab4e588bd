"""A look at a run: a picture of every class from its last checkpoint, and the judges' agreement with the prompts."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F

from .. import phantom
from ..phantom import CLASSES
from . import decoder, generator
from . import judges as judging

TILES_SEED = 9_500_000


@torch.no_grad()
def run(folder: Path, each: int = 8, shown: int = 6, cfg: float = 4.0) -> None:
    """Writes ``grid.png`` (one row a class) into the folder and prints the judged share of each class."""
    model, trained = generator.load_trained(folder)
    autoencoder = decoder.load_trained(folder)
    judges = judging.load_trained(folder) if (folder / "distance.pt").exists() else None
    config = model.model.config
    noise = torch.randn(each, config.in_channels, 16, 16, generator=torch.Generator().manual_seed(99))
    rows = []
    print(f"step {trained['steps']}, cfg {cfg}")
    for name in CLASSES:
        latents = generator.sample(model, [f"An endoscopic image of {name}"] * each, noise, cfg)
        images = ((autoencoder.decode(latents) + 1) / 2).clamp(0, 1)
        rows.append(torch.cat(list(images[:shown]), dim=2))
        if judges is not None:
            labels = judges(images).labels
            print(f"  {name}: {sum(label == name for label in labels)}/{each} {sorted(set(labels) - {name})}")
    sheet = torch.cat(rows, dim=1)
    Image.fromarray((sheet.permute(1, 2, 0) * 255).byte().numpy()).save(folder / "grid.png")


@torch.no_grad()
def tiles(folder: Path, seed: int = 0, cfg: float = 4.0) -> None:
    """Writes ``tiles.png``: a render and a generated image of each class in random order; prints which are renders.

    Can a stranger tell them apart at a glance?
    """
    model, _ = generator.load_trained(folder)
    autoencoder = decoder.load_trained(folder)
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(CLASSES), model.model.config.in_channels, 16, 16, generator=draw)
    prompts = [f"An endoscopic image of {name}" for name in CLASSES]
    made = ((autoencoder.decode(generator.sample(model, prompts, noise, cfg)) + 1) / 2).clamp(0, 1)
    drawn = phantom.render(phantom.Anatomy.sample(len(CLASSES), TILES_SEED + seed), CLASSES).image
    order = torch.randperm(2 * len(CLASSES), generator=draw)
    shown = F.interpolate(torch.cat([drawn, made])[order], scale_factor=2, mode="nearest")
    sheet = torch.cat([torch.cat(list(row), 2) for row in shown.split(4)], 1)
    Image.fromarray((sheet.permute(1, 2, 0) * 255).round().byte().numpy()).save(folder / "tiles.png")
    print("renders are the tiles", sorted((order < len(CLASSES)).nonzero().flatten().add(1).tolist()), "row by row")
