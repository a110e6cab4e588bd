"""Findings laid on a wall, each with its ground-truth mask.

A focal finding changes pixels only within ``HALO`` (half-image units) of its mask, give or take two pixels: every
edge is a smoothstep, which is exactly 0 outside, so that two renders of one anatomy are equal elsewhere, bit for bit.
Esophagitis is equal elsewhere but for stray slivers where the zigzag cuts a streak: 10 pixels in 320
scenes of 128 x 128.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .anatomy import uniform
from .walls import Canvas, Wall, column, mucosa, paint, rgb, smoothstep

HALO = 0.12


@dataclass(frozen=True)
class Dome:
    """A raised round thing in the image plane. rho (n, H, W) is 1 at its rim; qx, qy are its own unit coordinates;
    towards (n, 3) is the unit direction of the lamp; size (n,) its radius; level (n,) how much light reaches it."""

    rho: Tensor
    qx: Tensor
    qy: Tensor
    towards: Tensor
    size: Tensor
    level: Tensor


def _dome(canvas: Canvas, position: Tensor, size: Tensor, stream: int) -> Dome:
    anatomy = canvas.anatomy
    qx = (canvas.x_axis[None, None] - column(position[:, 0])) / column(size)
    qy = (canvas.y_axis[None, :, None] - column(position[:, 1])) / column(size)
    square = qx * qx + qy * qy
    length = square.sqrt().clamp_min(1e-4)
    cos1, sin1 = qx / length, qy / length
    lobe = uniform(anatomy.seed, stream, 4) * 2 - 1
    cos2, sin2 = cos1 * cos1 - sin1 * sin1, 2 * cos1 * sin1
    cos3, sin3 = cos2 * cos1 - sin2 * sin1, sin2 * cos1 + cos2 * sin1
    shape = 1 + 0.09 * (column(lobe[:, 0]) * cos2 + column(lobe[:, 1]) * sin2)
    shape = shape + 0.05 * (column(lobe[:, 2]) * cos3 + column(lobe[:, 3]) * sin3)
    aim = torch.cat((0.9 * (anatomy.light - position), torch.full_like(size[:, None], 0.62)), 1)
    deep = ((position - anatomy.lumen_centre).norm(dim=1) / anatomy.lumen_radius).clamp_min(0.1).log()
    level = 0.66 + 0.34 * torch.sigmoid((deep - 0.5) / 0.35)
    return Dome(length / shape, qx / shape, qy / shape, aim / aim.norm(dim=1, keepdim=True), size, level)


def _lambert(dome: Dome, flatness: float = 0.0) -> Tensor:
    """Cosine between the dome's surface and the lamp, clamped to 0 ... 1; ``flatness`` 1 is a flat plate."""
    up = (1 - dome.rho * dome.rho).clamp_min(0).sqrt()
    side = (dome.qx * column(dome.towards[:, 0]) + dome.qy * column(dome.towards[:, 1])) * (1 - flatness)
    return (side + torch.lerp(up, torch.ones_like(up), flatness) * column(dome.towards[:, 2])).clamp(0, 1)


def _cover(dome: Dome, soft: float = 0.02) -> Tensor:
    """1 on the dome, 0 outside, with a rim ``soft`` half-image units wide on either side."""
    width = soft / column(dome.size)
    return smoothstep(1 + width, 1 - width, dome.rho)


def _cast_shadow(dome: Dome, light: Tensor, width: float = HALO - 0.015) -> Tensor:
    """``light`` darkened beside the dome, most on the side away from the lamp, within ``width`` of its rim."""
    away = -(dome.qx * column(dome.towards[:, 0]) + dome.qy * column(dome.towards[:, 1])) / dome.rho.clamp_min(0.2)
    reach = smoothstep(width, 0.0, (dome.rho - 1) * column(dome.size))
    return light * (1 - reach * (0.30 + 0.75 * away.clamp_min(0)).clamp(max=0.8))


def _raise_polyp(canvas: Canvas, wall: Wall, dome: Dome, blue: float) -> Wall:
    """A polyp as a lit sphere with shadow, rim and highlight; ``blue`` is how far dye has crept over its rim."""
    tint = canvas.anatomy.finding_tint.view(-1, 1, 1, 1)
    red, pale = rgb(0.97, 0.60, 0.58), rgb(1.04, 1.08, 1.06)
    colour = mucosa(canvas.anatomy) * torch.where(
        tint > 0, torch.lerp(rgb(0.97, 0.80, 0.78), red, tint.abs()), torch.lerp(rgb(1.0, 0.98, 0.97), pale, tint.abs())
    )
    lobes = 1 + 0.05 * canvas.noise(20, 10)
    skin = paint(rgb(0.30, 0.42, 0.70), colour * lobes[:, None], blue * smoothstep(0.55, 1.0, dome.rho))
    shade = 0.26 + 0.86 * _lambert(dome)
    shade = shade * (1 - 0.30 * smoothstep(0.82, 1.0, dome.rho)) * column(dome.level)
    glint_x, glint_y = dome.qx - 0.5 * column(dome.towards[:, 0]), dome.qy - 0.5 * column(dome.towards[:, 1])
    glint = smoothstep(0.23, 0.10, (glint_x * glint_x + glint_y * glint_y).sqrt())
    cover = _cover(dome)
    return Wall(
        paint(skin, wall.albedo, cover),
        torch.lerp(_cast_shadow(dome, wall.light), shade, cover),
        torch.lerp(wall.gloss, 0.9 * glint, cover),
        wall.lumen,
    )


def _domes(canvas: Canvas) -> tuple[Dome, Dome]:
    """The polyp at the site, and its smaller companion, of size 0 ... where the anatomy has none."""
    anatomy = canvas.anatomy
    size = anatomy.site[:, 2]
    position = anatomy.site_position()
    present, angle, scale = anatomy.companion.unbind(1)
    # towards the middle of the image, so that the companion stays in view
    turn = torch.atan2(-position[:, 1], -position[:, 0]) + (angle - 0.5) * 1.6
    small = size * (0.48 + 0.20 * scale)
    there = position + torch.stack((turn.cos(), turn.sin()), 1) * (1.25 * (size + small))[:, None]
    small = torch.where(present > 0.65, small.clamp_min(0.12), torch.full_like(small, 1e-3))
    there = torch.where(present[:, None] > 0.65, there, torch.full_like(there, 9.0))
    return _dome(canvas, position, size, 130), _dome(canvas, there, small, 131)


def polyps(canvas: Canvas, wall: Wall) -> tuple[Wall, dict[str, Tensor]]:
    """One raised polyp at the site, sometimes a second one."""
    main, other = _domes(canvas)
    wall = _raise_polyp(canvas, _raise_polyp(canvas, wall, other, 0.0), main, 0.0)
    return wall, {"polyp": torch.maximum(_cover(main), _cover(other))}


def dyed_lifted_polyps(canvas: Canvas, wall: Wall) -> tuple[Wall, dict[str, Tensor]]:
    """The same polyps, the one at the site lifted on a cushion stained with indigo carmine."""
    main, other = _domes(canvas)
    ragged = (main.rho - 0.10 * canvas.noise(21, 7) - 0.05 * canvas.noise(22, 14)) / 1.62
    cushion = replace(main, rho=ragged, qx=main.qx / 1.62, qy=main.qy / 1.62, size=main.size * 1.62)
    cover = _cover(cushion, 0.035)
    stain = paint(
        rgb(0.36, 0.58, 0.86), rgb(0.13, 0.30, 0.66).expand_as(wall.albedo), smoothstep(-1, 1.5, canvas.noise(23, 6))
    )
    swell = (0.35 + 0.62 * _lambert(cushion, 0.35)) * column(main.level)
    gloss = smoothstep(1.6, 1.95, canvas.noise(24, 15)) * column(canvas.anatomy.moisture)
    wall = Wall(
        paint(stain, wall.albedo, 0.92 * cover),
        # narrower, since a ragged rim's rho overstates how near the rim is
        torch.lerp(_cast_shadow(cushion, wall.light, 0.06), swell, cover),
        torch.lerp(wall.gloss, gloss, cover),
        wall.lumen,
    )
    wall = _raise_polyp(canvas, _raise_polyp(canvas, wall, other, 0.0), main, 0.75)
    polyp = torch.maximum(_cover(main), _cover(other))
    return wall, {"polyp": polyp, "dye": cover * (1 - polyp)}


def dyed_resection_margins(canvas: Canvas, wall: Wall) -> tuple[Wall, dict[str, Tensor]]:
    """Where the polyp was: a flat pale bed with red spots, ringed by a blue margin."""
    main, _ = _domes(canvas)
    ragged = main.rho - 0.08 * canvas.noise(25, 7)
    bed = replace(main, rho=ragged / 1.12, size=main.size * 1.12)
    outer = replace(main, rho=(main.rho - 0.11 * canvas.noise(21, 7)) / 1.75, size=main.size * 1.75)
    ring, inside = _cover(outer, 0.04), _cover(bed, 0.02)
    stain = paint(
        rgb(0.34, 0.55, 0.84), rgb(0.14, 0.30, 0.64).expand_as(wall.albedo), smoothstep(-1, 1.5, canvas.noise(23, 6))
    )
    spots = smoothstep(0.55, 1.0, canvas.noise(26, 19))
    flesh = paint(rgb(0.82, 0.30, 0.26), rgb(0.98, 0.90, 0.72).expand_as(wall.albedo), 0.85 * spots)
    level = column(main.level)
    light = torch.lerp(wall.light, (0.66 + 0.05 * canvas.noise(24, 7)) * level, ring)
    sunken = (0.90 - 0.30 * smoothstep(0.72, 1.0, bed.rho)) * level
    albedo = paint(flesh, paint(stain, wall.albedo, 0.92 * ring), inside)
    wall = Wall(albedo, torch.lerp(light, sunken, inside), wall.gloss * (1 - ring), wall.lumen)
    return wall, {"resection": inside, "dye": ring * (1 - inside)}


def ulcerative_colitis(canvas: Canvas, wall: Wall) -> tuple[Wall, dict[str, Tensor]]:
    """The whole wall inflamed: red, granular, with white-yellow erosions in red rims and bleeding dots."""
    grain = canvas.noise(30, 20)
    patches = 0.75 * canvas.noise(31, 14) + 0.5 * canvas.noise(32, 9)
    visible = smoothstep(0.12, 0.38, wall.light)
    erosion = smoothstep(1.12, 1.32, patches) * visible
    albedo = wall.albedo * rgb(0.94, 0.56, 0.56)
    albedo = paint(rgb(0.62, 0.10, 0.11), albedo, 0.75 * smoothstep(0.6, 1.0, patches) * visible)
    albedo = paint(rgb(0.50, 0.03, 0.05), albedo, smoothstep(1.55, 1.8, canvas.noise(33, 18)) * visible * 0.85)
    albedo = paint(rgb(0.98, 0.90, 0.70), albedo, 0.9 * erosion)
    light = wall.light * (1 + 0.10 * grain * (1 - erosion))
    return Wall(albedo, light, wall.gloss, wall.lumen), {"erosions": erosion}


def esophagitis(canvas: Canvas, wall: Wall, outward: Tensor) -> tuple[Wall, dict[str, Tensor]]:
    """Three to five red erosive streaks with whitish edges, running outward from the z-line (``outward`` from it)."""
    drawn = uniform(canvas.anatomy.seed, 140, 26)
    count = (3 + 3 * drawn[:, 25]).floor().clamp(max=5)
    bend = 0.035 * canvas.noise(34, 6)
    inside = torch.full_like(outward, -1.0)
    for streak in range(5):
        place, long, wide = drawn[:, streak], drawn[:, 5 + streak], drawn[:, 10 + streak]
        angle = 2 * torch.pi * (streak + 0.7 * place) / count + canvas.anatomy.roll
        across = canvas.dy * column(angle.cos()) - canvas.dx * column(angle.sin()) + bend
        ahead = canvas.dx * column(angle.cos()) + canvas.dy * column(angle.sin())
        along = (outward + 0.05) / column(0.32 + 0.25 * long)
        half_width = column(0.045 + 0.035 * wide) * (1 - along * along).clamp_min(0).sqrt() * (along > 0)
        # the flush beside a streak fades in, since the zigzag may hide the streak's own beginning there
        inward = half_width - across.abs()
        inward = inward - 0.08 * smoothstep(0.35, 0.12, along) * smoothstep(0.0, -0.02, inward)
        signed = torch.where((ahead > 0) & (along > 0) & (along < 1), inward, -1.0)
        inside = torch.maximum(inside, torch.where(column(streak < count), signed, -1.0))
    core = smoothstep(-0.012, 0.008, inside)
    edge = smoothstep(-0.05, -0.012, inside)
    flush = smoothstep(-0.07, -0.02, inside)
    albedo = paint(wall.albedo * rgb(0.98, 0.80, 0.78), wall.albedo, flush)
    albedo = paint(rgb(0.99, 0.94, 0.86), albedo, 0.8 * edge)
    albedo = paint(rgb(0.78, 0.13, 0.12), albedo, core)
    return Wall(albedo, wall.light, wall.gloss * (1 - core), wall.lumen), {"streaks": core}
