"""What the pictures share: cells in rows and columns at exact pixels, text, and the drawn figure as a tensor.

matplotlib's figure object alone, off screen: no window, no global figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import needs

DPI = 100
INK, FAINT, LINE = "#1c2126", "#5b636b", "#b9bfc6"


@dataclass(frozen=True)
class Layout:
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
    row_gap: int | None = None  # between rows; as `gap` where it is None

    @property
    def _between(self) -> int:
        return self.gap if self.row_gap is None else self.row_gap

    @property
    def content_width(self) -> int:
        return self.columns * self.cell[1] + (self.columns - 1) * self.gap

    @property
    def width(self) -> int:
        return max(self.least_width, self.left + self.content_width + self.right)

    @property
    def height(self) -> int:
        return self.top + self.rows * self.cell[0] + (self.rows - 1) * self._between + self.bottom

    def at(self, row: int, column: int) -> tuple[float, int]:
        """Left and top of a cell in pixels; a sheet wider than its cells has them in the middle."""
        spare = (self.width - self.left - self.right - self.content_width) / 2
        return (
            self.left + spare + column * (self.cell[1] + self.gap),
            self.top + row * (self.cell[0] + self._between),
        )


def fitted(size: Sequence[int], height: int) -> tuple[int, int]:
    """Height and width in pixels at which a picture of ``size`` is shown: ``height``, unless that is very wide."""
    scale = min(height / size[0], 2 * height / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def new_figure(layout: Layout):
    """A white figure of the layout's size. MedSteerError without matplotlib."""
    with needs("matplotlib"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(layout.width / DPI, layout.height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def axes_at(figure, layout: Layout, x: float, y: float, width: float, height: float):
    """Axes at pixels from the left and the top."""
    total = layout.height
    return figure.add_axes((x / layout.width, 1 - (y + height) / total, width / layout.width, height / total))


def show(figure, layout: Layout, place: tuple[int, int], picture, **options) -> None:
    """A picture as matplotlib takes it, in the cell at (row, column)."""
    x, y = layout.at(*place)
    axes = axes_at(figure, layout, x, y, layout.cell[1], layout.cell[0])
    axes.imshow(picture, aspect="auto", **options)
    axes.set_xticks([])
    axes.set_yticks([])
    for edge in axes.spines.values():
        edge.set(color=LINE, linewidth=0.8)


def show_colour(figure, layout: Layout, place: tuple[int, int], image: Tensor) -> None:
    """An image ``(3, H, W)`` in 0..1 in the cell at (row, column)."""
    show(figure, layout, place, image.movedim(0, -1).numpy(), interpolation="bicubic")


def write(
    figure, layout: Layout, words: str, x: float, y: float, size: int, align: str = "center", fit: float = 0, **style
) -> None:
    """Words whose middle is at ``y`` pixels from the top, ``size`` pixels tall; smaller where ``fit`` pixels of width
    are too few for them."""
    style = {"color": INK, "ha": align, "va": "center", "family": "DejaVu Sans", "fontsize": size * 72 / DPI, **style}
    # Prompts and names stand as they are: dollar signs would make formulas of them, which may not even parse.
    drawn = figure.text(x / layout.width, 1 - y / layout.height, words, parse_math=False, **style)
    wide = drawn.get_window_extent(figure.canvas.get_renderer()).width if fit else 0
    if wide > fit:
        drawn.set_fontsize(style["fontsize"] * fit / wide)


def colour_bar(figure, axes, colours: str, low: float, high: float, ticks: Mapping[float, str], size: int = 11) -> None:
    """A bar of a colour map's colours in ``axes``, lying where these are wider than tall, with the ticks' words."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    box = axes.get_window_extent()
    lying = box.width > box.height
    bar = figure.colorbar(
        ScalarMappable(Normalize(low, high), colours), cax=axes, orientation="horizontal" if lying else "vertical"
    )
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    bar.ax.tick_params(labelsize=size * 72 / DPI, length=3, colors=INK, pad=2)
    bar.outline.set(color=LINE, linewidth=0.8)


def pixels(figure) -> Tensor:
    """The drawn figure as ``(3, height, width)``."""
    import numpy

    figure.canvas.draw()
    drawn = torch.from_numpy(numpy.asarray(figure.canvas.buffer_rgba()).copy())
    return drawn[..., :3].movedim(-1, 0).float() / 255
