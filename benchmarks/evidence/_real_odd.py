"""`bench real --odd`: images out of the range of the training, by what endoscopes and exports add to a picture.

Each takes images ``(n, 3, H, W)`` in 0..1 and gives them changed, in steps of 1/255; the same change goes to the truth.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.evidence._real_case import SEEDS, SHOWN, Case, row_of
from benchmarks.evidence._real_methods import CHOSEN, OPEN, Methods, label_of
from benchmarks.shared.command import aligned, as_saved, with_interval
from benchmarks.shared.lab import Lab, comfyui_version, start_comfyui
from benchmarks.shared.presets import PAIRS
from benchmarks.shared.record import machine
from benchmarks.shared.sheet import sheet


def as_they_are(images: Tensor) -> Tensor:
    return images


def shifted_colours(images: Tensor) -> Tensor:
    """Another light: less red, more blue and green."""
    return as_saved(images * torch.tensor([0.75, 1.1, 1.35])[None, :, None, None])


def specular_glare(images: Tensor) -> Tensor:
    """White spots with soft edges where a wet wall mirrors the light."""
    height, width = images.shape[-2:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    spots = torch.zeros(height, width)
    for centre_x, centre_y, size in ((-0.35, -0.3, 0.1), (0.4, -0.45, 0.07), (0.1, 0.5, 0.12), (-0.55, 0.35, 0.06)):
        spots = torch.maximum(spots, torch.exp(-((((x - centre_x) ** 2 + (y - centre_y) ** 2) / size**2) ** 2)))
    return as_saved(images * (1 - spots) + spots)


def device_mask(images: Tensor) -> Tensor:
    """The round black frame of a scope."""
    height, width = images.shape[-2:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return as_saved(images * ((x**2 + y**2) < 0.9).float())


def text_overlay(images: Tensor) -> Tensor:
    """A date, a time and a green field, as processors burn them in."""
    return as_saved(torch.where(_text(*images.shape[-2:])[1], _text(*images.shape[-2:])[0], images))


def text_pixels(height: int, width: int) -> Tensor:
    """Where the overlay is, ``(height, width)`` bool."""
    return _text(height, width)[1]


def _text(height: int, width: int) -> tuple[Tensor, Tensor]:
    picture = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((2, height - 30, 28, height - 4), fill=(20, 110, 60))
    draw.text((3, 2), "12.04.2026", fill=(255, 255, 255))
    draw.text((3, 12), "10:42 C7", fill=(255, 255, 255))
    drawn = torch.from_numpy(np.array(picture)).movedim(-1, 0).float() / 255
    return drawn, drawn.amax(0) > 0


ODD: Mapping[str, Callable[[Tensor], Tensor]] = {
    "as they are": as_they_are,
    "shifted colours": shifted_colours,
    "specular glare": specular_glare,
    "device mask": device_mask,
    "text overlay": text_overlay,
}


@torch.no_grad()
def run(chosen: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    """Polyps taken out of changed images by the chosen setting of ours; the truth is changed in the same way."""
    start_comfyui(chosen.cpu)
    lab, pair = Lab(), PAIRS[0]
    methods = Methods(lab, lambda _: None)
    way, rows, columns = CHOSEN[pair.name]["ours_prompt"], {}, []
    for name, change in ODD.items():
        case = Case(lab, pair, chosen.n, SEEDS[chosen.split], change)
        images = case.edited(methods.run("ours_prompt", case.real(), way), way.lock != OPEN)
        row = row_of(case.scores(images), methods.rows, 0.0)
        nothing = case.edited(case.latents, True)
        row["same_bytes_at_0"] = bool(torch.equal(nothing, case.image))
        row["psnr_of_nothing"] = row_of(case.scores(case.image), 0, 0)["psnr"]
        if name == "text overlay":
            changed = ((images - case.image).abs().amax(1) > 0)[:, text_pixels(*images.shape[-2:])]
            row["text_changed"] = float(changed.float().mean())
        rows[name] = row
        columns.append(torch.stack([case.image[:SHOWN], images[:SHOWN], case.truth[:SHOWN]], dim=1))
    record = {
        "settings": {"n": chosen.n, "split": chosen.split, "pair": pair.name, "setting": label_of("ours_prompt", way)},
        "machine": machine(lab.model.load_device), "comfyui": comfyui_version(), "images": rows,
    }  # fmt: skip
    return record, sheet(["real", "ours", "truth"], dict(zip(ODD, columns, strict=True)))


def table(record: Mapping[str, Any]) -> str:
    lines = [("images", "flip [95%]", "PSNR to truth", "of nothing", "SSIM outside", "same bytes at 0", "text changed")]
    for name, row in record["images"].items():
        numbers = [with_interval(row[key], row.get(f"{key}_ci")) for key in ("psnr", "ssim_outside")]
        text = f"{row['text_changed']:.3f}" if "text_changed" in row else "-"
        told = (numbers[0], f"{row['psnr_of_nothing']:.2f}", numbers[1], str(row["same_bytes_at_0"]), text)
        lines.append((name, with_interval(row["flip"], row["flip_ci"]), *told))
    return "\n".join([f"{record['settings']['pair']}, n = {record['settings']['n']}", *aligned(lines)])
