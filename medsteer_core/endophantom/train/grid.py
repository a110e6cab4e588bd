"""A look at a run: a picture of every class from its last checkpoint, and the judges' agreement with the prompts."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from .. import judges as judging
from ..autoencoder import PatchAutoencoder
from ..phantom import CLASSES
from . import generator
from .files import load


@torch.no_grad()
def run(folder: Path, each: int = 8, shown: int = 6, cfg: float = 4.0) -> None:
    """Writes ``grid.png`` (one row a class) into the folder and prints the judged share of each class."""
    model, trained = generator.load_trained(folder)
    decoder = folder / "decoder.pt"
    state = load(decoder if decoder.exists() else folder / "encoder.pt")["model"]
    autoencoder = PatchAutoencoder(state["encoder.weight"].shape[0])
    autoencoder.load_state_dict(state)
    judges = None
    if (folder / "judges.pt").exists():
        saved = load(folder / "judges.pt")
        classifier, segmenter = judging.Classifier(), judging.Segmenter()
        classifier.load_state_dict(saved["classifier"])
        segmenter.load_state_dict(saved["segmenter"])
        judges = judging.Judges(classifier, segmenter)
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
