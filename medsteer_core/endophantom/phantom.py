"""Render procedural endoscopy phantoms: an image of a scene with or without a finding, and where the finding is.

The truth is factorised: the anatomy says what the scope sees, the class name says which finding lies on it. Two renders
of one anatomy as "polyps" and as "normal cecum" are equal except at the polyp.

    anatomy = Anatomy.sample(4, seed=0)
    with_polyp, without = render(anatomy, "polyps"), render(anatomy, "normal cecum")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import findings
from .anatomy import Anatomy, uniform
from .walls import Canvas, Wall, colon, esophagus, rgb, stomach

__all__ = ["CLASSES", "FINDINGS", "Anatomy", "Render", "render"]

CLASSES: tuple[str, ...] = (
    "dyed lifted polyps",
    "dyed resection margins",
    "esophagitis",
    "normal cecum",
    "normal pylorus",
    "normal z-line",
    "polyps",
    "ulcerative colitis",
)
FINDINGS: tuple[str, ...] = ("polyp", "dye", "resection", "erosions", "streaks")

_SENSOR_NOISE = 0.01
_SMALLEST = 16
# fields of this many pixels stay in a processor's cache, which is several times faster than one large batch
_PIXELS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Render:
    """image (n, 3, H, W) in [0, 1]; masks (n, len(FINDINGS), H, W), each pixel 0 or 1. Both float32."""

    image: Tensor
    masks: Tensor


def render(
    anatomy: Anatomy,
    finding: str | Sequence[str],
    size: int | tuple[int, int] = 128,
    noise_seed: int | None = 0,
) -> Render:
    """Draw ``anatomy`` as the class ``finding`` (one name for all, or one for each scene).

    ``size`` is the side, or (height, width), in pixels. ``noise_seed`` picks the sensor noise, which depends on it and
    on each scene's seed and not on the class; None leaves it out. ValueError for an unknown class, an empty batch, a
    wrong number of names, or a side below 16 pixels.
    """
    height, width = (size, size) if isinstance(size, int) else size
    names = _check(anatomy, finding, height, width)
    image = torch.empty(len(anatomy), 3, height, width)
    masks = torch.empty(len(anatomy), len(FINDINGS), height, width)
    for name in dict.fromkeys(names):
        index = torch.tensor([i for i, other in enumerate(names) if other == name])
        for part in index.split(max(1, _PIXELS_AT_ONCE // (height * width))):
            image[part], masks[part] = _render_class(anatomy[part], name, height, width)
    if noise_seed is not None:
        image = image + _SENSOR_NOISE * _sensor_noise(anatomy, noise_seed, height, width)
    return Render(image.clamp(0.0, 1.0), masks)


def _check(anatomy: Anatomy, finding: str | Sequence[str], height: int, width: int) -> list[str]:
    """The class name of each scene; ValueError where the request cannot be drawn."""
    if len(anatomy) == 0:
        raise ValueError(
            "render: the anatomy is an empty batch; expected at least one scene (Anatomy.sample(n, seed))."
        )
    names = [finding] * len(anatomy) if isinstance(finding, str) else list(finding)
    if len(names) != len(anatomy):
        raise ValueError(f"render: {len(names)} class names for {len(anatomy)} scenes; give one name, or one a scene.")
    for name in names:
        if name not in CLASSES:
            raise ValueError(f"render: unknown class {name!r}; expected one of: {', '.join(CLASSES)}.")
    if min(height, width) < _SMALLEST:
        raise ValueError(f"render: size was {height}x{width}; expected {_SMALLEST} pixels or more on each side.")
    return names


def _render_class(anatomy: Anatomy, name: str, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Noise-free image and masks of scenes that share one class."""
    canvas = Canvas.of(anatomy, height, width)
    found: dict[str, Tensor] = {}
    if name in ("normal z-line", "esophagitis"):
        wall, outward = esophagus(canvas)
        if name == "esophagitis":
            wall, found = findings.esophagitis(canvas, wall, outward)
    elif name == "normal pylorus":
        wall = stomach(canvas)
    elif name == "ulcerative colitis":
        wall, found = findings.ulcerative_colitis(canvas, colon(canvas, vessels=False))
    else:
        wall = colon(canvas)
        if name != "normal cecum":
            wall, found = _FOCAL[name](canvas, wall)
    view = canvas.field_of_view()
    masks = torch.zeros(len(anatomy), len(FINDINGS), height, width)
    for channel, key in enumerate(FINDINGS):
        if key in found:
            masks[:, channel] = (found[key] * view > 0.5).float()
    return _expose(anatomy, wall, view), masks


_FOCAL = {
    "polyps": findings.polyps,
    "dyed lifted polyps": findings.dyed_lifted_polyps,
    "dyed resection margins": findings.dyed_resection_margins,
}


def _expose(anatomy: Anatomy, wall: Wall, view: Tensor) -> Tensor:
    """What the camera records, (n, 3, H, W), pixel by pixel: there is no automatic exposure, so that a finding cannot
    change the image elsewhere. Tissue in the dark stays redder, since blood passes red light."""
    light = (wall.light * anatomy.gain.view(-1, 1, 1)).clamp(0.0, 1.35)[:, None]
    warm = torch.lerp(rgb(1.0, 0.62, 0.56), rgb(1.0, 1.0, 1.0), light.clamp(max=1.0))
    image = wall.albedo * light * warm
    image = image + wall.gloss[:, None] * (rgb(1.0, 0.98, 0.95) - image).clamp_min(0) * 0.9
    # a soft shoulder keeps bright tissue short of white
    image = image.clamp(max=1.2)
    image = image - 0.22 * (image - 0.75).clamp_min(0)
    return image * view[:, None] + 0.015 * (1 - view[:, None])


def _sensor_noise(anatomy: Anatomy, noise_seed: int, height: int, width: int) -> Tensor:
    """Unit normal noise (n, 3, H, W), item by item, so that it does not depend on the batch."""
    key = (uniform(anatomy.seed, 0x5EED + int(noise_seed), 2) * (1 << 24)).to(torch.int64)
    noise = torch.empty(len(anatomy), 3, height, width)
    for item, (high, low) in enumerate(key.tolist()):
        generator = torch.Generator().manual_seed((high << 24) | low)
        noise[item].normal_(generator=generator)
    return noise
