"""One picture of many pairs: a block for each concept pair, a row for each factual, a column for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

GAP, HEAD, TITLE, MARGIN, DPI = 4, 40, 30, 12, 100


def sheet(columns: Sequence[str], blocks: Mapping[str, Tensor]) -> Tensor:
    """``blocks``: title to images ``(rows, columns, 3, H, W)`` of one size; a picture ``(3, height, width)``.

    The columns' names stand once, at the top.
    """
    mosaics = {title: mosaic(images) for title, images in blocks.items()}
    cell = next(iter(blocks.values())).shape[-1] + GAP
    width = max(mosaic.shape[-1] for mosaic in mosaics.values()) + 2 * MARGIN
    height = HEAD + sum(TITLE + mosaic.shape[-2] for mosaic in mosaics.values()) + MARGIN
    figure = _figure(width, height)
    for place, name in enumerate(columns):
        x = MARGIN + place * cell + (cell - GAP) / 2
        figure.text(x / width, 1 - HEAD / 2 / height, name, size=9, ha="center", va="center", weight="bold")
    top = HEAD
    for title, picture in mosaics.items():
        figure.text(MARGIN / width, 1 - (top + TITLE / 2) / height, title, size=11, va="center", weight="bold")
        top += TITLE
        box = (MARGIN / width, 1 - (top + picture.shape[-2]) / height)
        axes = figure.add_axes((*box, picture.shape[-1] / width, picture.shape[-2] / height))
        axes.imshow(picture.movedim(0, -1).numpy(), interpolation="nearest")
        axes.axis("off")
        top += picture.shape[-2]
    return pixels(figure)


def mosaic(images: Tensor) -> Tensor:
    """``(rows, columns, 3, H, W)`` as one white-gapped picture ``(3, height, width)``."""
    spaced = F.pad(images.detach().float().cpu().clamp(0, 1), (0, GAP, 0, GAP), value=1.0)
    return torch.cat([torch.cat(list(row), dim=-1) for row in spaced], dim=-2)[:, :-GAP, :-GAP]


def pixels(figure: Any) -> Tensor:
    """A drawn figure as ``(3, height, width)`` in 0..1."""
    import numpy
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    drawn = torch.from_numpy(numpy.asarray(figure.canvas.buffer_rgba()).copy())
    return drawn[..., :3].movedim(-1, 0).float() / 255


def _figure(width: int, height: int) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
