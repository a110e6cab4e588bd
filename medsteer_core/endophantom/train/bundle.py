"""Step 5: put the trained parts into the one file that the pack ships, with their recipe in its metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import phantom, text
from ..autoencoder import PatchAutoencoder
from ..bundle import FORMAT, PATH
from ..judges import LABELS, Classifier, Segmenter
from . import data, decoder, generator, judges
from .files import load, shards

LIMIT, JUDGES_LIMIT = 18_000_000, 3_000_000
HALF = ("generator", "text", "classifier", "segmenter")


def run(folder: Path, path: Path = PATH) -> None:
    """Write the bundle; held-out numbers are measured with the stored (rounded) weights and go into the recipe."""
    model, trained = generator.load_trained(folder)
    saved = load(folder / "judges.pt")
    classifier, segmenter = Classifier(), Segmenter()
    classifier.load_state_dict(saved["classifier"])
    segmenter.load_state_dict(saved["segmenter"])
    autoencoder_state = load(folder / "decoder.pt")
    autoencoder = PatchAutoencoder(autoencoder_state["model"]["encoder.weight"].shape[0])
    autoencoder.load_state_dict(autoencoder_state["model"])
    parts: dict[str, nn.Module] = {
        "generator": model.model,
        "text": model.text,
        "autoencoder": autoencoder,
        "classifier": classifier,
        "segmenter": segmenter,
    }
    for name in HALF:
        parts[name].half().float()
    recipe = {
        "generator": model.model.config.to_dict() | {"prediction": "v"} | trained,
        "text": {"vocabulary": text.VOCABULARY, "width": model.model.config.caption_channels},
        "autoencoder": {"steps": autoencoder_state["step"], "held_out_psnr_db": round(decoder.psnr(autoencoder), 2)},
        "judges": {"labels": LABELS, "findings": phantom.FINDINGS, "steps": saved["step"]}
        | {"held_out": {k: round(v, 4) for k, v in judges.held_out(classifier, segmenter).items()}},
        "data": {"phantoms": len(shards(folder)) * data.SHARD, "mirrored": True, "size": data.SIZE,
                 "confounding": load(shards(folder)[0]).get("confounding", 0.0)},
        "seeds": {"data": data.DATA_SEED, "encoder": data.ENCODER_SEED, "decoder": decoder.POOL_SEED,
                  "judges": judges.POOL_SEED, "judges_held_out": judges.HELD_OUT_SEED},
        "torch": torch.__version__,
    }  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for name, module in parts.items():
        for key, value in module.state_dict().items():
            tensors[f"{name}.{key}"] = (value.half() if name in HALF else value).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, {"format": FORMAT, "version": "1", "recipe": json.dumps(recipe)})
    size = temporary.stat().st_size
    judged = sum(v.nbytes for k, v in tensors.items() if k.startswith(("classifier.", "segmenter.")))
    if size > LIMIT or judged > JUDGES_LIMIT:
        raise ValueError(f"the bundle has {size} bytes and its judges {judged}; at most {LIMIT} and {JUDGES_LIMIT}")
    temporary.chmod(0o644)  # safetensors writes files that only their owner can read
    os.replace(temporary, path)
    print(json.dumps(recipe, indent=1))
    print(f"{path}: {size / 1e6:.2f} MB, judges {judged / 1e6:.2f} MB")
