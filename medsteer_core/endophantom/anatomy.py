"""What a phantom scene is made of: the factors of one view through a scope, and their sampling.

A scene's anatomy is a value apart from its finding, so that two renders of one anatomy differ in the finding alone. It
is drawn independently of the class, or leaning with it (`confounding.py`).
Positions are in half-image units: x to the right and y down, both in [-1, 1] over the image's shorter side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .confounding import lean

_MASK32 = 0xFFFFFFFF

# name -> (number of values, low, high). The order is part of the format: it numbers the random streams.
_RANGES: dict[str, tuple[int, float, float]] = {
    "lumen_centre": (2, -0.42, 0.42),
    "lumen_radius": (1, 0.15, 0.30),
    "fold_count": (1, 3.0, 6.99),
    "fold_spacing": (1, 0.34, 0.50),
    "fold_depth": (1, 0.55, 1.0),
    "fold_triangularity": (1, 0.03, 0.15),
    "roll": (1, -math.pi, math.pi),
    "hue": (1, 0.0, 1.0),
    "saturation": (1, 0.0, 1.0),
    "mottle": (1, 0.3, 1.0),
    "vessels": (1, 0.15, 1.0),
    "moisture": (1, 0.25, 1.0),
    "light": (2, -0.45, 0.45),
    "gain": (1, 0.88, 1.10),
    "vignette": (1, 1.02, 1.16),
    "octagon": (1, 0.0, 1.0),
    "site": (3, 0.0, 1.0),
    "companion": (3, 0.0, 1.0),
    "finding_tint": (1, -1.0, 1.0),
}


def uniform(seed: Tensor, stream: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1) hashed from integers: ``seed`` (n,) int64 -> (n, count) float32.

    A hash and not a generator, so that item i's numbers depend on its own seed alone, on every device.
    """
    value = (
        seed[:, None] * 0x9E3779B1 + torch.arange(count, device=seed.device)[None] * 0x85EBCA6B + stream * 0xC2B2AE35
    )
    value = (value ^ (value >> 32)) & _MASK32
    for _ in range(3):
        value = ((value ^ (value >> 16)) * 0x45D9F3B) & _MASK32
    value = value ^ (value >> 16)
    return (value >> 8).to(torch.float32) / float(1 << 24)


@dataclass(frozen=True)
class Anatomy:
    """A batch of n scenes. Every field is float32 with leading dimension n; ``seed`` is (n,) int64.

    lumen_centre (n, 2), lumen_radius (n,), light (n, 2) are in half-image units; roll in radians; ``site`` (n, 3) is
    where a focal finding sits: angle about the lumen (radians), distance from its centre, and radius of the finding;
    ``companion`` (n, 3) is a second, smaller polyp: presence (above 0.65), angle offset fraction, size fraction.
    """

    lumen_centre: Tensor
    lumen_radius: Tensor
    fold_count: Tensor
    fold_spacing: Tensor
    fold_depth: Tensor
    fold_triangularity: Tensor
    roll: Tensor
    hue: Tensor
    saturation: Tensor
    mottle: Tensor
    vessels: Tensor
    moisture: Tensor
    light: Tensor
    gain: Tensor
    vignette: Tensor
    octagon: Tensor
    site: Tensor
    companion: Tensor
    finding_tint: Tensor
    seed: Tensor

    def __len__(self) -> int:
        return int(self.seed.shape[0])

    def __getitem__(self, index: int | slice | Tensor | list[int]) -> Anatomy:
        """The chosen scenes, always as a batch (an integer gives a batch of one)."""
        if isinstance(index, int):
            index = [index]
        return Anatomy(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    @staticmethod
    def sample(n: int, seed: int, labels: Tensor | None = None, confounding: float = 0.0) -> Anatomy:
        """n scenes from ``seed``; scene i is the same whatever n is.

        With class ids ``labels (n,)`` and ``confounding`` above 0 the anatomy leans with the class. ValueError for
        n < 1 or labels that do not fit.
        """
        item = scene_seeds(n, seed)
        draws = uniform_draws(item)
        if confounding:
            if labels is None or labels.shape != (n,):
                shape = None if labels is None else tuple(labels.shape)
                raise ValueError(f"Anatomy.sample: confounding needs labels of shape ({n},), got {shape}.")
            draws = lean(draws, labels, confounding)
        values: dict[str, Tensor] = {}
        for name, (count, low_end, high_end) in _RANGES.items():
            drawn = low_end + (high_end - low_end) * draws[name]
            values[name] = drawn[:, 0] if count == 1 else drawn
        values["fold_count"] = values["fold_count"].floor()
        values["site"] = _place_site(values["site"], values["lumen_centre"], values["lumen_radius"])
        return Anatomy(seed=item, **values)

    def site_position(self) -> Tensor:
        """Centre of the focal finding, (n, 2) in half-image units."""
        angle, distance = self.site[:, 0], self.site[:, 1]
        return self.lumen_centre + torch.stack((angle.cos(), angle.sin()), 1) * distance[:, None]

    def factors(self) -> dict[str, Tensor]:
        """Scalar factors by name, each (n,): what a regressor or a probe of the anatomy is asked for."""
        scalars: dict[str, Tensor] = {}
        parts = {"lumen_centre": ("x", "y"), "light": ("x", "y"), "site": ("angle", "distance", "size")}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in parts:
                scalars.update({f"{field.name}_{part}": value[:, i] for i, part in enumerate(parts[field.name])})
            elif field.name not in ("seed", "companion"):
                scalars[field.name] = value
        return scalars


def uniform_draws(seeds: Tensor) -> dict[str, Tensor]:
    """The uniform numbers behind each factor of the scenes ``seeds (n,)``: name -> ``(n, values)``."""
    return {name: uniform(seeds, 10 + number, count) for number, (name, (count, _, _)) in enumerate(_RANGES.items())}


def scene_seeds(n: int, seed: int) -> Tensor:
    """The seeds ``(n,)`` of the scenes that `Anatomy.sample` draws; scene i's is the same whatever n is."""
    if n < 1:
        raise ValueError(f"Anatomy.sample: n was {n}, expected 1 or more scenes.")
    base = torch.full((1,), int(seed) & _MASK32, dtype=torch.int64)
    # 48 bits for each scene, so that two of many thousand scenes do not share a seed
    high, low = ((uniform(base, stream, n)[0] * (1 << 24)).to(torch.int64) for stream in (1, 2))
    return (high << 24) | low


def _place_site(drawn: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """Turn three uniform numbers (n, 3) into angle, distance and size, with the finding in view beside the lumen."""
    offset = centre.norm(dim=1)
    towards_middle = torch.atan2(-centre[:, 1], -centre[:, 0])
    # the further the lumen is off-centre, the narrower the sector in which there is wall to see
    spread = math.pi * (1 - 1.25 * offset).clamp(0.25, 1.0)
    angle = towards_middle + (2 * drawn[:, 0] - 1) * spread
    size = 0.18 + 0.20 * drawn[:, 2]
    distance = torch.maximum(0.42 + 0.30 * drawn[:, 1], radius + 0.75 * size)
    position = centre + torch.stack((angle.cos(), angle.sin()), 1) * distance[:, None]
    # pull back what would leave the field of view
    reach = (0.95 - 0.75 * size) / position.norm(dim=1).clamp_min(1e-6)
    relative = position * reach.clamp(max=1.0)[:, None] - centre
    return torch.stack((torch.atan2(relative[:, 1], relative[:, 0]), relative.norm(dim=1), size), 1)
