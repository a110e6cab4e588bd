"""The walls that a scope sees, without a finding: colon, esophagus and stomach, as albedo and light.

All fields are (n, H, W) float32 and analytic in half-image units, so that every image size shows the same scene.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .anatomy import Anatomy, uniform

_RINGS = 6


def column(value: Tensor) -> Tensor:
    """(n,) -> (n, 1, 1), to meet an image field."""
    return value[:, None, None]


def smoothstep(low: float | Tensor, high: float | Tensor, value: Tensor) -> Tensor:
    """0 at ``low``, 1 at ``high`` (which may lie below ``low``), cubic between, constant beyond: of finite support."""
    t = ((value - low) / (high - low)).clamp(0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def paint(colour: Tensor, over: Tensor, alpha: Tensor) -> Tensor:
    """``over`` (n, 3, H, W) with ``colour`` (n, 3, H, W or 1, 1) laid on it where ``alpha`` (n, H, W) is 1."""
    return torch.lerp(over, colour.expand_as(over), alpha[:, None].expand_as(over))


def rgb(red: float, green: float, blue: float) -> Tensor:
    """A constant colour as (1, 3, 1, 1)."""
    return torch.tensor((red, green, blue), dtype=torch.float32).view(1, 3, 1, 1)


@dataclass(frozen=True)
class Canvas:
    """Pixel coordinates of a batch: axes (W,), (H,), and polar ones about the lumen, (n, H, W)."""

    anatomy: Anatomy
    x_axis: Tensor
    y_axis: Tensor
    dx: Tensor
    dy: Tensor
    radius: Tensor

    @staticmethod
    def of(anatomy: Anatomy, height: int, width: int) -> Canvas:
        half = min(height, width) / 2
        x_axis = (torch.arange(width, dtype=torch.float32) + 0.5 - width / 2) / half
        y_axis = (torch.arange(height, dtype=torch.float32) + 0.5 - height / 2) / half
        shape = (len(anatomy), height, width)
        dx = (x_axis[None, None] - column(anatomy.lumen_centre[:, 0])).expand(shape)
        dy = (y_axis[None, :, None] - column(anatomy.lumen_centre[:, 1])).expand(shape)
        return Canvas(anatomy, x_axis, y_axis, dx, dy, (dx * dx + dy * dy).sqrt().clamp_min(1e-4))

    def noise(self, stream: int, cells: int) -> Tensor:
        """Smooth noise (n, H, W) of about unit variance: a hashed grid, ``cells`` to the short side, B-spline."""
        size = cells + 3
        grid = uniform(self.anatomy.seed, 1000 + stream, size * size).view(-1, size, size) * 2 - 1
        across, down = _spline(self.x_axis, cells, size), _spline(self.y_axis, cells, size)
        return 3.6 * (down @ grid @ across.T)

    def harmonics(self, orders: int) -> Tensor:
        """1, cos, sin, cos 2, sin 2 ... of the angle about the lumen after the roll, (n, 1 + 2 orders, H, W)."""
        cos_roll, sin_roll = column(self.anatomy.roll.cos()), column(self.anatomy.roll.sin())
        cos1 = (self.dx * cos_roll + self.dy * sin_roll) / self.radius
        sin1 = (self.dy * cos_roll - self.dx * sin_roll) / self.radius
        terms = [torch.ones_like(cos1), cos1, sin1]
        for _ in range(orders - 1):
            cos_m, sin_m = terms[-2], terms[-1]
            terms += [cos_m * cos1 - sin_m * sin1, sin_m * cos1 + cos_m * sin1]
        return torch.stack(terms, 1)

    def field_of_view(self) -> Tensor:
        """1 inside the scope's round or eight-sided field, 0 in its black surround."""
        x, y = self.x_axis[None, None].abs(), self.y_axis[None, :, None].abs()
        circle = (x * x + y * y).sqrt()
        octagon = torch.maximum(torch.maximum(x, y), (x + y) * 0.665)
        edge = torch.lerp(circle, octagon, smoothstep(0.4, 0.6, column(self.anatomy.octagon)))
        limit = column(self.anatomy.vignette)
        return smoothstep(limit, limit - 0.05, edge)


def _spline(axis: Tensor, cells: int, size: int) -> Tensor:
    """Cubic B-spline weights (len(axis), size) of a periodic grid."""
    place = (axis + 1) / 2 * cells
    base = place.floor()
    t = place - base
    weights = torch.stack(((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3), 1) / 6
    index = (base.long()[:, None] + torch.arange(4)) % size
    return torch.zeros(len(axis), size).scatter_add_(1, index, weights)


@dataclass(frozen=True)
class Wall:
    """albedo (n, 3, H, W); light (n, H, W); gloss (n, H, W) white highlights; lumen (n, H, W) 1 in the opening."""

    albedo: Tensor
    light: Tensor
    gloss: Tensor
    lumen: Tensor


def mucosa(anatomy: Anatomy) -> Tensor:
    """The wall's mean colour, (n, 3, 1, 1): pink to orange by ``hue``, pale to red by ``saturation``."""
    hue, saturation = anatomy.hue.view(-1, 1, 1, 1), anatomy.saturation.view(-1, 1, 1, 1)
    colour = torch.lerp(rgb(0.95, 0.60, 0.54), rgb(0.96, 0.61, 0.40), hue)
    return colour * torch.lerp(rgb(1.0, 1.06, 1.06), rgb(0.95, 0.74, 0.70), saturation)


def _mottled(canvas: Canvas, colour: Tensor, strength: float = 1.0) -> Tensor:
    """``colour`` with slow changes of redness over the wall, (n, 3, H, W)."""
    tone = (canvas.noise(1, 4) + 0.5 * canvas.noise(2, 9)) * column(canvas.anatomy.mottle) * strength
    return colour * (1 + tone[:, None] * rgb(0.025, 0.075, 0.08))


def _falloff(canvas: Canvas, tilt: float = 0.14) -> Tensor:
    """The lamp's own shading over the image: brighter on its side, a little darker at the border."""
    light = canvas.anatomy.light
    x, y = canvas.x_axis[None, None], canvas.y_axis[None, :, None]
    return 1 + tilt * (x * column(light[:, 0]) + y * column(light[:, 1])) / 0.45 - 0.13 * (x * x + y * y)


def _coefficients(anatomy: Anatomy, stream: int, rows: int, orders: int) -> Tensor:
    """Random harmonic coefficients in [-1, 1], (n, rows, 1 + 2 orders), the constant one 0."""
    count = 1 + 2 * orders
    drawn = uniform(anatomy.seed, stream, rows * count).view(-1, rows, count) * 2 - 1
    drawn[:, :, 0] = 0
    return drawn


def _combine(coefficients: Tensor, harmonics: Tensor) -> Tensor:
    """(n, rows, terms) and (n, terms, H, W) -> (n, rows, H, W)."""
    height, width = harmonics.shape[-2:]
    return torch.bmm(coefficients, harmonics.flatten(2)).view(-1, coefficients.shape[1], height, width)


def colon(canvas: Canvas, vessels: bool = True) -> Wall:
    """A tube with haustral folds: rings about the lumen, lit on the near edge, shadowing the wall behind."""
    anatomy = canvas.anatomy
    basis = canvas.harmonics(3)
    shape = _coefficients(anatomy, 100, _RINGS, 3) * torch.tensor((0, 0.05, 0.05, 0.045, 0.045, 0.03, 0.03))
    common = _coefficients(anatomy, 101, 1, 3) * torch.tensor((0, 0.05, 0.05, 0.10, 0.10, 0, 0))
    common[:, :, 5] = anatomy.fold_triangularity[:, None]
    shape = shape + common
    ring = torch.arange(_RINGS, dtype=torch.float32)[None]
    shape[:, :, 0] = anatomy.lumen_radius.log()[:, None] + 0.30 + ring * anatomy.fold_spacing[:, None]
    depth = _coefficients(anatomy, 102, _RINGS, 3) * 0.30
    depth[:, :, 0] = 0.8
    present = (ring < anatomy.fold_count[:, None]).float() * anatomy.fold_depth[:, None]

    wobble = 0.045 * canvas.noise(3, 5)
    log_radius = canvas.radius.log() + wobble
    beyond = log_radius[:, None] - _combine(shape, basis)
    amount = _combine(depth, basis).clamp(0.0, 1.2) * present[:, :, None, None]
    edge = torch.sigmoid(beyond / 0.035)
    # the lit crest is narrow, the shadow behind it long and soft
    decay = torch.exp(-beyond.abs() / 0.15)
    lit = (amount * edge * decay).sum(1).clamp(max=1.2)
    shadow = (amount * (1 - edge) * decay.sqrt()).sum(1)

    inner = beyond[:, 0] + 0.30
    tube = torch.sigmoid((inner - 0.36) / 0.27)
    light = tube * (1.06 + 0.48 * lit - 0.80 * shadow.clamp(max=1.1)).clamp_min(0.12) * _falloff(canvas)
    light = light * (1 + 0.045 * canvas.noise(4, 6))
    # flesh between the folds is redder where less light falls, as in deep mucosa
    albedo = _mottled(canvas, mucosa(anatomy)) * (1 - 0.25 * shadow.clamp(max=1.0)[:, None] * rgb(0.0, 0.8, 0.7))
    if vessels:
        albedo = paint(albedo * rgb(0.70, 0.30, 0.34), albedo, _vessels(canvas))
    blobs = smoothstep(1.15, 1.6, canvas.noise(5, 13) + 0.9 * lit) * smoothstep(0.35, 0.6, lit)
    return Wall(albedo, light, blobs * column(anatomy.moisture), smoothstep(0.25, -0.15, inner))


def _vessels(canvas: Canvas) -> Tensor:
    """Thin curved branching lines: zero crossings of smooth noise, wide trunks and finer twigs, (n, H, W) in [0, 1]."""
    trunk = (1 - (canvas.noise(6, 4) / 0.13).abs()).clamp_min(0)
    twig = (1 - (canvas.noise(7, 7) / 0.19).abs()).clamp_min(0) * smoothstep(-0.3, 0.9, canvas.noise(8, 4))
    where = smoothstep(-0.9, 0.6, canvas.noise(9, 3))
    return (torch.maximum(trunk, 0.75 * twig) * where * column(canvas.anatomy.vessels)).clamp(max=1)


def esophagus(canvas: Canvas) -> tuple[Wall, Tensor]:
    """Pale squamous wall, salmon columnar mucosa about the lumen, a zigzag between. Also the signed distance (n, H, W)
    outward from that z-line, in half-image units."""
    anatomy = canvas.anatomy
    basis = canvas.harmonics(9)
    size = torch.tensor([0.0] + [s for m in range(1, 10) for s in (_ZIGZAG[m], _ZIGZAG[m])])
    border = column(anatomy.lumen_radius * 1.15 + 0.20)
    zigzag = _combine(_coefficients(anatomy, 110, 1, 9) * size, basis)[:, 0]
    outward = canvas.radius - border * (1 + zigzag) + 0.012 * canvas.noise(3, 12)

    folds = _combine(_coefficients(anatomy, 111, 1, 9) * _PLEATS, basis)[:, 0]
    log_depth = (canvas.radius / column(anatomy.lumen_radius)).log()
    pleat = folds * torch.exp(-(((log_depth - 0.4) / 0.95) ** 2))
    tube = torch.sigmoid((log_depth + 0.28 + 0.30 * pleat) / 0.26)
    light = tube * (1 + 0.26 * column(anatomy.fold_depth) * pleat).clamp_min(0.2) * _falloff(canvas)
    light = light * (1 + 0.03 * canvas.noise(4, 5))

    tone = mucosa(anatomy)
    squamous = _mottled(canvas, torch.lerp(tone, rgb(0.97, 0.81, 0.76), 0.75), 0.5)
    columnar = _mottled(canvas, tone * rgb(0.94, 0.64, 0.60), 0.8)
    albedo = paint(columnar, squamous, smoothstep(0.02, -0.02, outward))
    blobs = smoothstep(1.9, 2.2, canvas.noise(5, 15) + 0.6 * pleat) * smoothstep(0.4, 0.7, tube)
    return Wall(albedo, light, blobs * column(anatomy.moisture) * 0.8, smoothstep(0.1, -0.4, log_depth)), outward


_ZIGZAG = (0.0, 0.04, 0.07, 0.09, 0.10, 0.11, 0.10, 0.09, 0.07, 0.06)
_PLEATS = torch.tensor([0.0] + [s for m in range(1, 10) for s in ((0.15,) * 2 if m < 4 else (0.5,) * 2)])


def stomach(canvas: Canvas) -> Wall:
    """Pale smooth antrum; a small dark pylorus with a thick bright rim, on which radial folds converge."""
    anatomy = canvas.anatomy
    basis = canvas.harmonics(7)
    opening = column(0.05 + 0.42 * anatomy.lumen_radius)
    shape = _combine(_coefficients(anatomy, 120, 1, 7)[:, :, :7] * 0.06, basis[:, :7])[:, 0]
    place = canvas.radius / (opening * (1 + shape))
    rim = torch.exp(-(((place - 1.75) / 0.55) ** 2))
    groove = torch.exp(-(((place - 3.1) / 0.55) ** 2))
    size = torch.tensor([0.0] + [s for m in range(1, 8) for s in ((0.1,) * 2 if m < 4 else (0.55,) * 2)])
    radial = _combine(_coefficients(anatomy, 121, 1, 7) * size, basis)[:, 0] + 0.25 * canvas.noise(3, 4)
    folds = radial * smoothstep(2.4, 3.6, place) * torch.exp(-place / 9.0)
    light = 0.92 + 0.22 * rim - 0.22 * groove + 0.40 * column(anatomy.fold_depth) * folds
    hole = smoothstep(1.12, 0.86, place)
    light = light * (1 - 0.94 * hole) * _falloff(canvas, 0.2) * (1 + 0.04 * canvas.noise(4, 3))
    tone = torch.lerp(mucosa(anatomy), rgb(1.0, 0.82, 0.64), 0.65)
    albedo = paint(mucosa(anatomy), _mottled(canvas, tone, 0.6), 0.35 * rim)
    blobs = smoothstep(1.9, 2.2, canvas.noise(5, 14) + 0.8 * rim) * (1 - hole)
    return Wall(albedo, light, blobs * column(anatomy.moisture) * 0.9, hole)
