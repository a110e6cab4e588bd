"""Draw pairs as a panel: factual, counterfactual, signed difference and concept map, with legends and the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..errors import MedSteerError
from ..scores.images import checked_pair, compare_pairs
from .difference import difference_legend, difference_scale, luminance_difference, show_levels
from .drawing import FAINT, Layout, axes_at, colour_bar, fitted, new_figure, pixels, show, show_colour, write

MOST_ROWS = 4
CAPTIONS = ("factual", "counterfactual", "difference", "concept map")
MAP_COLOURS = "viridis"
_TITLE, _WORDS, _SMALL = 25, 23, 20


def pair_panel(factuals: Tensor, counterfactuals: Tensor, concept_map: Tensor | None = None) -> Tensor:
    """A picture ``(3, H, W)`` of pairs ``(n, 3, H, W)``: a row for each of the first `MOST_ROWS`, its numbers below.

    ``concept_map`` (n or 1, h, w) in 0..1 is the Counterfactual Sampler's, one a factual. MedSteerError for images and
    maps that do not fit.
    """
    a, b = checked_pair(factuals, counterfactuals, batch=True)
    count, shown = len(a), min(len(a), MOST_ROWS)
    maps = None if concept_map is None else fitted_maps(concept_map, count, a.shape[-2:])[:shown]
    a, b = a[:shown], b[:shown]
    levels, compared = luminance_difference(a, b), compare_pairs(a, b)
    columns = 3 if maps is None else 4
    layout = Layout(fitted(a.shape[-2:], 224), shown, columns, top=52, bottom=216, row_gap=52, least_width=968)
    figure, scale = new_figure(layout), difference_scale(levels)
    for column, caption in enumerate(CAPTIONS[:columns]):
        x = layout.at(0, column)[0] + layout.cell[1] / 2
        write(figure, layout, caption, x, 27, _TITLE, weight="bold", fit=layout.cell[1])
    for row in range(shown):
        show_colour(figure, layout, (row, 0), a[row])
        show_colour(figure, layout, (row, 1), b[row])
        show_levels(figure, layout, (row, 2), levels[row], scale)
        if maps is not None:
            show(figure, layout, (row, 3), maps[row].numpy(), cmap=MAP_COLOURS, vmin=0, vmax=1, interpolation="nearest")
        words = _numbers(compared.get("pairs", [compared])[row])
        below = layout.at(row, 0)[1] + layout.cell[0] + 24
        write(figure, layout, words, layout.width / 2, below, _WORDS, fit=layout.width - 24)
    _legends(figure, layout, scale, maps)
    if count > shown:
        words = f"first {shown} of {count} pairs; {count - shown} left out"
        write(figure, layout, words, layout.width / 2, layout.height - 16, _SMALL, color=FAINT)
    return pixels(figure)


def fitted_maps(maps: Tensor, count: int, size: tuple[int, int], name: str = "concept_map") -> Tensor:
    """Maps ``(1 or count, h, w)`` in 0..1 as ``(count, *size)``; ``name`` is the input that MedSteerError speaks of."""
    if maps.ndim != 3 or len(maps) not in (1, count):
        raise MedSteerError(
            f"{name} has shape {tuple(maps.shape)}; (1 or {count}, height, width) was expected: one for each "
            "factual image. Connect the Counterfactual Sampler's output of that name."
        )
    sized = F.interpolate(maps[:, None].detach().float().cpu(), size=tuple(size), mode="nearest-exact")[:, 0]
    return sized.clamp(0, 1).expand(count, -1, -1)


def _numbers(compared: Mapping[str, Any]) -> str:
    if compared["identical"]:
        return "identical images"
    return (
        f"SSIM {compared['ssim']:.3f}    PSNR {compared['psnr_db']:.1f} dB    "
        f"{compared['changed_fraction']:.1%} of pixels changed"
    )


def _legends(figure, layout: Layout, scale: int, maps: Tensor | None) -> None:
    """Below the last row's numbers: what the difference's colours mean, and beside it those of the concept map."""
    lowered = Layout(**{**vars(layout), "bottom": layout.bottom - 46})
    half = (layout.width - 24) / 2
    width = min(520.0, half - 20)
    if maps is None:
        difference_legend(figure, lowered, scale, (layout.width - width) / 2, width, _SMALL)
        return
    difference_legend(figure, lowered, scale, 28, width - 16, _SMALL)
    left, top, unit = 12 + half + 20, layout.height - lowered.bottom, _SMALL / 11
    bar = axes_at(figure, layout, left + 24, top + 30 * unit, width - 48, 12 * unit)
    colour_bar(figure, bar, MAP_COLOURS, 0, 1, {0: "0", 0.5: "0.5", 1: "1"}, _SMALL)
    words = "concept map: where it acts most" if bool(maps.any()) else "concept map: empty, no lock asked for one"
    write(figure, layout, words, left + width / 2, top + 18 * unit, _SMALL, fit=width)
    write(figure, layout, "share of its largest value", left + width / 2, top + 67 * unit, _SMALL, color=FAINT)
