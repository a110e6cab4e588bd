"""Draw pairs: where and how much a counterfactual differs from its factual, and both side by side.

Every function returns one picture ``(3, height, width)`` in 0..1, drawn off screen: no window, no global figure.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import MedSteerError
from ..scores.images import checked_pair
from .drawing import FAINT, Layout, axes_at, colour_bar, fitted, new_figure, pixels, show, show_colour, write

MOST_PAIRS = 8
# Smaller differences never fill the colours: sensor noise must not look like a finding.
LEAST_SCALE = 16
# Orange and purple stay apart for every kind of colour blindness; orange is the brighter side.
COLOURS = "PuOr_r"
CAPTIONS = ("factual", "counterfactual", "difference")
_REC709 = (0.2126, 0.7152, 0.0722)


def luminance_difference(factual: Tensor, counterfactual: Tensor) -> Tensor:
    """Counterfactual minus factual in luminance (Rec. 709), 8-bit levels: ``(n, 3, H, W)`` to ``(n, H, W)``."""
    weights = torch.tensor(_REC709).view(3, 1, 1)
    return ((counterfactual - factual) * weights).sum(1) * 255


def difference_image(factual: Tensor, counterfactual: Tensor) -> Tensor:
    """The signed difference of a pair ``(3, H, W)``, or of up to 8 pairs ``(n, 3, H, W)``, with a legend.

    One pair makes a picture 512 pixels tall (less for one wider than twice its height). The colours are symmetric about
    0, end at 16 levels or more, and mean the same for all pairs. MedSteerError for images that do not fit.
    """
    a, b = _pairs(factual, counterfactual)
    levels = luminance_difference(a, b)
    columns = min(len(a), 4)
    rows = math.ceil(len(a) / columns)
    cell = fitted(a.shape[-2:], 424 if rows == 1 else 300)
    layout = Layout(cell, rows, columns, bottom=76, least_width=448)
    figure, scale = new_figure(layout), difference_scale(levels)
    for item, picture in enumerate(levels):
        show_levels(figure, layout, divmod(item, columns), picture, scale)
    difference_legend(figure, layout, scale, (layout.width - 424) / 2, 424)
    return pixels(figure)


def pair_strip(factual: Tensor, counterfactual: Tensor, captions: Sequence[str] = CAPTIONS) -> Tensor:
    """Factual, counterfactual and signed difference side by side under three captions, a row for each of up to 8 pairs.

    Images are ``(3, H, W)`` or ``(n, 3, H, W)``. MedSteerError for images that do not fit or another count of captions.
    """
    if len(captions) != 3:
        raise MedSteerError(f"pair_strip got {len(captions)} captions; three were expected: one for each picture.")
    a, b = _pairs(factual, counterfactual)
    levels = luminance_difference(a, b)
    cell = fitted(a.shape[-2:], 392 if len(a) == 1 else 300)
    layout = Layout(cell, len(a), 3, top=44, bottom=76, least_width=3 * 300)
    figure, scale = new_figure(layout), difference_scale(levels)
    for row in range(len(a)):
        show_colour(figure, layout, (row, 0), a[row])
        show_colour(figure, layout, (row, 1), b[row])
        show_levels(figure, layout, (row, 2), levels[row], scale)
    for column, caption in enumerate(captions):
        x, _ = layout.at(0, column)
        write(figure, layout, caption, x + cell[1] / 2, 24, 13, weight="bold")
    centre = layout.at(0, 2)[0] + cell[1] / 2
    # under the differences, as wide as they are; the words need 344 pixels
    width = min(424, max(344, cell[1]))
    difference_legend(figure, layout, scale, min(centre - width / 2, layout.width - 12 - width), width)
    return pixels(figure)


def contact_sheet(rows: Mapping[str, Tensor], cell_height: int = 160) -> Tensor:
    """Labelled rows of pictures: label to images ``(n, 3, H, W)``; column i holds each row's image i."""
    shapes = {tuple(images.shape) for images in rows.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 4:
        raise MedSteerError(f"contact_sheet got shapes {sorted(shapes)}; one shape (n, 3, H, W) was expected.")
    count, _, height, width = shapes.pop()
    left = 30 + 12 * max(map(len, rows))
    layout = Layout(fitted((height, width), cell_height), len(rows), count, left=left)
    figure = new_figure(layout)
    for row, (label, images) in enumerate(rows.items()):
        middle = layout.at(row, 0)[1] + layout.cell[0] / 2
        write(figure, layout, label, left - 14, middle, 18, align="right", weight="bold", fit=left - 20)
        for column, image in enumerate(images.detach().float().cpu().clamp(0, 1)):
            show_colour(figure, layout, (row, column), image)
    return pixels(figure)


def png(image: Tensor) -> bytes:
    """A picture ``(3, H, W)`` in 0..1 as the bytes of a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    levels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    Image.fromarray(levels.movedim(0, -1).contiguous().numpy()).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _pairs(factual: Tensor, counterfactual: Tensor) -> tuple[Tensor, Tensor]:
    a, b = checked_pair(factual, counterfactual, batch=factual.ndim == 4)
    return a[:MOST_PAIRS], b[:MOST_PAIRS]


def difference_scale(levels: Tensor) -> int:
    """The level at which the colours end: nearly all pixels stay within, in steps of 8, 16 or more."""
    ranked = levels.abs().flatten().sort().values
    high = ranked[int(0.998 * (len(ranked) - 1))].item()
    return max(LEAST_SCALE, 8 * math.ceil(high / 8 - 1e-4))


def show_levels(figure, layout: Layout, place: tuple[int, int], levels: Tensor, scale: int) -> None:
    """A luminance difference ``(H, W)`` in the cell at (row, column), in colours that end at ``scale`` levels."""
    # no smoothing: each pixel shows its own value
    show(figure, layout, place, levels.numpy(), cmap=COLOURS, vmin=-scale, vmax=scale, interpolation="nearest")
    if not levels.any():
        (x, y), (height, width) = layout.at(*place), layout.cell
        write(figure, layout, "no difference", x + width / 2, y + height / 2, 12, color=FAINT)


def difference_legend(figure, layout: Layout, scale: int, x: float, width: float, size: int = 11) -> None:
    """The colour bar in the bottom band: what the colours mean, and their unit; words are ``size`` pixels tall."""
    top, unit = layout.height - layout.bottom, size / 11
    bar = axes_at(figure, layout, x + 24, top + 30 * unit, width - 48, 12 * unit)
    words = {
        -scale: f"\N{LESS-THAN OR EQUAL TO} \N{MINUS SIGN}{scale}",
        -scale // 2: f"\N{MINUS SIGN}{scale // 2}",
        0: "0",
        scale // 2: f"+{scale // 2}",
        scale: f"\N{GREATER-THAN OR EQUAL TO} +{scale}",
    }
    colour_bar(figure, bar, COLOURS, -scale, scale, words, size)
    left, right = "\N{BLACK LEFT-POINTING TRIANGLE}", "\N{BLACK RIGHT-POINTING TRIANGLE}"
    write(figure, layout, f"{left} darker", x, top + 18 * unit, size, align="left")
    write(figure, layout, f"brighter {right}", x + width, top + 18 * unit, size, align="right")
    write(
        figure,
        layout,
        "counterfactual minus factual, 8-bit levels",
        x + width / 2,
        top + 67 * unit,
        size - 1,
        color=FAINT,
    )
