"""Step 5: put the trained parts into the two files that the pack ships, with their recipe in the metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .. import phantom, text
from ..autoencoder import PATCH, TinyAutoencoder
from ..bundle import FORMAT, PATH, VAE_PATH
from ..judges import LABELS
from . import data, decoder, generator, judges
from .files import load, shards

LIMIT, JUDGES_LIMIT = 18_000_000, 3_000_000
# The distance's whitening spans several orders of magnitude and stays in single precision.
HALF = ("generator", "text", "classifier", "segmenter", "regressor")
JUDGES = ("classifier", "segmenter", "regressor", "distance")
PREVIEW_SEED = 7_000_000


def run(folder: Path, path: Path = PATH, vae_path: Path = VAE_PATH) -> None:
    """Write both files; held-out numbers are measured with the stored (rounded) weights and go into the recipe."""
    model, trained = generator.load_trained(folder)
    judged = judges.load_trained(folder)
    autoencoder = rounded(decoder.load_trained(folder))
    parts: dict[str, nn.Module] = {
        "generator": model.model,
        "text": model.text,
        **{name: getattr(judged, name) for name in JUDGES},
    }
    for name in HALF:
        rounded(parts[name])
    recipe = {
        "generator": model.model.config.to_dict() | {"prediction": "v"} | trained,
        "text": {"vocabulary": text.VOCABULARY, "width": model.model.config.caption_channels},
        "autoencoder": {"steps": load(folder / "decoder.pt")["step"], "preview": preview_colours(autoencoder)}
        | {"held_out_psnr_db": round(decoder.psnr(autoencoder), 2)},
        "judges": {"labels": LABELS, "findings": phantom.FINDINGS, "factors": judged.factors}
        | judges.steps(folder)
        | {"held_out": judges.held_out(judged, autoencoder)},
        "data": {"phantoms": len(shards(folder)) * data.SHARD, "size": data.SIZE,
                 "confounding": load(shards(folder)[0]).get("confounding", 0.0)},
        "seeds": {"data": data.DATA_SEED, "encoder": data.ENCODER_SEED, "decoder": decoder.POOL_SEED,
                  "judges": judges.POOL_SEED, "judges_held_out": judges.HELD_OUT_SEED},
        "torch": torch.__version__,
    }  # fmt: skip
    tensors = {
        f"{name}.{key}": stored(value, name in HALF)
        for name, module in parts.items()
        for key, value in module.state_dict().items()
    }
    image_tensors = {key: stored(value, True) for key, value in autoencoder.state_dict().items()}
    size = sum(value.nbytes for value in (*tensors.values(), *image_tensors.values()))
    of_judges = sum(value.nbytes for key, value in tensors.items() if key.startswith(JUDGES))
    if size > LIMIT or of_judges > JUDGES_LIMIT:
        raise ValueError(f"the bundle has {size} bytes and its judges {of_judges}; at most {LIMIT} and {JUDGES_LIMIT}")
    write(image_tensors, vae_path, {})
    write(tensors, path, {"format": FORMAT, "version": "2", "recipe": json.dumps(recipe)})
    print(json.dumps(recipe, indent=1))
    print(f"{path.name} and {vae_path.name}: {size / 1e6:.2f} MB, judges {of_judges / 1e6:.2f} MB")


def rounded(module: nn.Module) -> Any:
    """The module with its weights as they are stored: rounded to half precision."""
    return module.half().float()


def stored(value: Tensor, half: bool) -> Tensor:
    return (value.half() if half and value.is_floating_point() else value).contiguous()


def write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata)
    temporary.chmod(0o644)  # safetensors writes files that only their owner can read
    os.replace(temporary, path)


@torch.no_grad()
def preview_colours(autoencoder: TinyAutoencoder, n: int = 64) -> dict[str, list]:
    """The linear map from latents to a patch's mean colour in -1..1: ``factors (channels, 3)``, ``bias (3)``."""
    images = data.render_batch(n, PREVIEW_SEED)[0] * 2 - 1
    latents = autoencoder.encode(images).movedim(1, -1).flatten(0, 2)
    colours = F.avg_pool2d(images, PATCH).movedim(1, -1).flatten(0, 2)
    with_one = torch.cat([latents, torch.ones(len(latents), 1)], 1)
    solution = torch.linalg.lstsq(with_one, colours).solution
    return {"factors": solution[:-1].tolist(), "bias": solution[-1].tolist()}
