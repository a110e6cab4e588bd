"""Small pairs for tests of datasets: flat pictures, records as Counterfactual Sampler gives them."""

import io

import numpy as np
import torch
from PIL import Image

from medsteer_core.dataset.boxes import boxes_of
from medsteer_core.dataset.records import finish, short_hash

SIZE = 32


def png(*colour: int, size: int = SIZE) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB" if len(colour) == 3 else "L", (size, size), colour if len(colour) == 3 else colour[0]).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def started(number: int, seed: int | None = None, index: int = 0, steering: list | None = None, **made) -> dict:
    """A sampler's record of noise ``number`` (or of a seed and index)."""
    seed = number if seed is None else seed
    facts = {
        "model": {"architecture": "Tiny", "weights": "ab" * 32, "patches": ""},
        "prompts": {"positive": {"text": "polyps"}, "negative": {"text": ""}},
        "seed": seed, "batch_index": index, "latent_shape": [1, 4, 4, 4], "noise": "seed",
        "steering": steering if steering is not None else [{"vector": {"vector": "0123456789", "made": {}}}],
        "multiple": 1.0, "lock": {"mask_source": "none"}, "versions": {"torch": "2"}, **made,
    }  # fmt: skip
    noise = short_hash({key: facts[key] for key in ("seed", "batch_index", "latent_shape", "noise")})
    return {"group_id": noise, "noise_id": noise, "made": facts}


def square_mask(*squares: tuple[int, int, int, int]) -> torch.Tensor:
    """A mask with rectangles x, y, width, height."""
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    for x, y, width, height in squares:
        mask[y : y + height, x : x + width] = True
    return mask


def mask_bytes(mask: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask.numpy().astype(np.uint8) * 255).save(buffer, "PNG")
    return buffer.getvalue()


def pair(number: int, split: str = "train", mask: torch.Tensor | None = None, source: str = "polyps", **known) -> tuple:
    """What `PairDataset.add` takes: record, factual, counterfactual, mask."""
    if mask is not None:
        known = {"mask_source": "user", "boxes": {"factual": boxes_of(mask, source), "counterfactual": []}, **known}
    record = finish(
        known.pop("started", None) or started(number), source=source, target=known.pop("target", "normal cecum"),
        split=split, has_mask=mask is not None, width=SIZE, height=SIZE, **known,
    )  # fmt: skip
    colour = number % 256
    return record, png(colour, 0, 0), png(0, colour, 0), None if mask is None else mask_bytes(mask)
