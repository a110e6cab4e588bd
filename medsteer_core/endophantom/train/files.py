"""Files of a training run: atomic checkpoints and shards of rendered phantoms."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def save_atomic(value: object, path: Path) -> None:
    """torch.save to a temporary file, then rename, so that a killed run leaves the former file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    torch.save(value, temporary)
    os.replace(temporary, path)


def load(path: Path) -> dict:
    """Read a file of `save_atomic`; tensors and plain containers only."""
    return torch.load(path, map_location="cpu", weights_only=True)


def shards(folder: Path) -> list[Path]:
    """The finished latent shards of a run, oldest first."""
    return sorted(folder.glob("latents_*.pt"))
