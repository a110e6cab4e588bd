"""Draw pairs: where and how much a counterfactual differs from its factual, and both side by side.

Every function returns one picture ``(3, height, width)`` in 0..1, drawn off screen: no window, no global figure.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import MedSteerError, needs
from .image_pairs import checked_pair

MOST_PAIRS = 8
# Smaller differences never fill the colours: sensor noise must not look like a finding.
LEAST_SCALE = 16
# Orange and purple stay apart for every kind of colour blindness; orange is the brighter side.
COLOURS = "PuOr_r"
CAPTIONS = ("factual", "counterfactual", "difference")
_REC709 = (0.2126, 0.7152, 0.0722)
_DPI = 100
_INK, _FAINT, _LINE = "#1c2126", "#5b636b", "#b9bfc6"


@dataclass(frozen=True)
class _Layout:
    """Pixels of a sheet: cells in rows and columns, and the bands around them."""

    cell: tuple[int, int]
    rows: int
    columns: int
    left: int = 12
    top: int = 12
    bottom: int = 12
    gap: int = 8
    least_width: int = 0
    right: int = 12

    @property
    def content_width(self) -> int:
        return self.columns * self.cell[1] + (self.columns - 1) * self.gap

    @property
    def width(self) -> int:
        return max(self.least_width, self.left + self.content_width + self.right)

    @property
    def height(self) -> int:
        return self.top + self.rows * self.cell[0] + (self.rows - 1) * self.gap + self.bottom

    def at(self, row: int, column: int) -> tuple[float, int]:
        """Left and top of a cell in pixels; a sheet wider than its cells has them in the middle."""
        spare = (self.width - self.left - self.right - self.content_width) / 2
        return (
            self.left + spare + column * (self.cell[1] + self.gap),
            self.top + row * (self.cell[0] + self.gap),
        )


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
    cell = _fitted(a.shape[-2:], 424 if rows == 1 else 300)
    layout = _Layout(cell, rows, columns, bottom=76, least_width=448)
    figure, scale = _figure(layout), _scale(levels)
    for item, picture in enumerate(levels):
        _show_levels(figure, layout, divmod(item, columns), picture, scale)
    _legend(figure, layout, scale, (layout.width - 424) / 2, 424)
    return _pixels(figure)


def pair_strip(factual: Tensor, counterfactual: Tensor, captions: Sequence[str] = CAPTIONS) -> Tensor:
    """Factual, counterfactual and signed difference side by side under three captions, a row for each of up to 8 pairs.

    Images are ``(3, H, W)`` or ``(n, 3, H, W)``. MedSteerError for images that do not fit or another count of captions.
    """
    if len(captions) != 3:
        raise MedSteerError(f"pair_strip got {len(captions)} captions; three were expected: one for each picture.")
    a, b = _pairs(factual, counterfactual)
    levels = luminance_difference(a, b)
    cell = _fitted(a.shape[-2:], 392 if len(a) == 1 else 300)
    layout = _Layout(cell, len(a), 3, top=44, bottom=76, least_width=3 * 300)
    figure, scale = _figure(layout), _scale(levels)
    for row in range(len(a)):
        _show_colour(figure, layout, (row, 0), a[row])
        _show_colour(figure, layout, (row, 1), b[row])
        _show_levels(figure, layout, (row, 2), levels[row], scale)
    for column, caption in enumerate(captions):
        x, _ = layout.at(0, column)
        _text(figure, layout, caption, x + cell[1] / 2, 24, 13, weight="bold")
    centre = layout.at(0, 2)[0] + cell[1] / 2
    # under the differences, as wide as they are; the words need 344 pixels
    width = min(424, max(344, cell[1]))
    _legend(figure, layout, scale, min(centre - width / 2, layout.width - 12 - width), width)
    return _pixels(figure)


def contact_sheet(rows: Mapping[str, Tensor], cell_height: int = 160) -> Tensor:
    """Labelled rows of pictures: label to images ``(n, 3, H, W)``; column i holds each row's image i."""
    shapes = {tuple(images.shape) for images in rows.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 4:
        raise MedSteerError(f"contact_sheet got shapes {sorted(shapes)}; one shape (n, 3, H, W) was expected.")
    count, _, height, width = shapes.pop()
    left = 30 + 9 * max(map(len, rows))
    layout = _Layout(_fitted((height, width), cell_height), len(rows), count, left=left)
    figure = _figure(layout)
    for row, (label, images) in enumerate(rows.items()):
        middle = layout.at(row, 0)[1] + layout.cell[0] / 2
        _text(figure, layout, label, left - 14, middle, 12, align="right", weight="bold")
        for column, image in enumerate(images.detach().float().cpu().clamp(0, 1)):
            _show_colour(figure, layout, (row, column), image)
    return _pixels(figure)


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


def _fitted(size: Sequence[int], height: int) -> tuple[int, int]:
    """Height and width in pixels at which a picture of ``size`` is shown: ``height``, unless that is very wide."""
    scale = min(height / size[0], 2 * height / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _scale(levels: Tensor) -> int:
    """The level at which the colours end: nearly all pixels stay within, in steps of 8, 16 or more."""
    ranked = levels.abs().flatten().sort().values
    high = ranked[int(0.998 * (len(ranked) - 1))].item()
    return max(LEAST_SCALE, 8 * math.ceil(high / 8 - 1e-4))


def _figure(layout: _Layout):
    with needs("matplotlib"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(layout.width / _DPI, layout.height / _DPI), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _axes(figure, layout: _Layout, x: float, y: float, width: float, height: float):
    """Axes at pixels from the left and the top."""
    total = layout.height
    return figure.add_axes((x / layout.width, 1 - (y + height) / total, width / layout.width, height / total))


def _show(figure, layout: _Layout, place: tuple[int, int], picture, **options) -> None:
    x, y = layout.at(*place)
    axes = _axes(figure, layout, x, y, layout.cell[1], layout.cell[0])
    axes.imshow(picture, aspect="auto", **options)
    axes.set_xticks([])
    axes.set_yticks([])
    for edge in axes.spines.values():
        edge.set(color=_LINE, linewidth=0.8)


def _show_colour(figure, layout: _Layout, place: tuple[int, int], image: Tensor) -> None:
    _show(figure, layout, place, image.movedim(0, -1).numpy(), interpolation="bicubic")


def _show_levels(figure, layout: _Layout, place: tuple[int, int], levels: Tensor, scale: int) -> None:
    # no smoothing: each pixel shows its own value
    _show(figure, layout, place, levels.numpy(), cmap=COLOURS, vmin=-scale, vmax=scale, interpolation="nearest")
    if not levels.any():
        (x, y), (height, width) = layout.at(*place), layout.cell
        _text(figure, layout, "no difference", x + width / 2, y + height / 2, 12, color=_FAINT)


def _text(figure, layout: _Layout, text: str, x: float, y: float, size: int, align: str = "center", **style) -> None:
    style = {"color": _INK, "ha": align, "va": "center", "family": "DejaVu Sans", "fontsize": size * 72 / _DPI, **style}
    figure.text(x / layout.width, 1 - y / layout.height, text, **style)


def _legend(figure, layout: _Layout, scale: int, x: float, width: float) -> None:
    """The colour bar in the bottom band: what the colours mean, and their unit."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    top = layout.height - layout.bottom
    axes = _axes(figure, layout, x + 24, top + 30, width - 48, 12)
    bar = figure.colorbar(ScalarMappable(Normalize(-scale, scale), COLOURS), cax=axes, orientation="horizontal")
    ticks = [-scale, -scale // 2, 0, scale // 2, scale]
    bar.set_ticks(ticks, labels=[f"≤ −{scale}", f"−{scale // 2}", "0", f"+{scale // 2}", f"≥ +{scale}"])
    bar.ax.tick_params(labelsize=11 * 72 / _DPI, length=3, colors=_INK, pad=2)
    bar.outline.set(color=_LINE, linewidth=0.8)
    _text(figure, layout, "◀ darker in counterfactual", x, top + 18, 11, align="left")
    _text(figure, layout, "brighter in counterfactual ▶", x + width, top + 18, 11, align="right")
    _text(figure, layout, "luminance, 8-bit levels", x + width / 2, top + 67, 10, color=_FAINT)


def _pixels(figure) -> Tensor:
    """The drawn figure as ``(3, height, width)``."""
    import numpy

    figure.canvas.draw()
    pixels = torch.from_numpy(numpy.asarray(figure.canvas.buffer_rgba()).copy())
    return pixels[..., :3].movedim(-1, 0).float() / 255
