"""Several strengths of each factual image: the judge's scores of all, as records, as a table and as a labelled grid."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import MedSteerError
from ..judges.judge import Judge, doubt_about
from ..scores.images import checked_pair, compare
from ..scores.pair import PairScore
from ..scores.scorer import score_pairs, summarise
from .drawing import FAINT, Layout, fitted, new_figure, pixels, show_colour, write

MOST_ROWS, MOST_COLUMNS = 6, 8
_TITLE, _WORDS, _SMALL = 22, 19, 17
_TABLE = ("image", "strength", "flipped", "misses", "label", "target_probability", "ssim", "changed_fraction")


@dataclass(frozen=True)
class Sweep:
    """The pairs of a sweep: `cells[image][strength]` is a PairScore, or `compare`'s numbers without a judge."""

    strengths: tuple[float, ...]
    cells: tuple[tuple[Any, ...], ...]
    source: str = ""
    target: str = ""
    judge: str = ""
    doubt: str = ""  # about the judge


def by_strength(factuals: Tensor, counterfactuals: Tensor, strengths: Sequence[float]) -> Tensor:
    """Counterfactuals ``(K * B, 3, H, W)``, all images of the first strength first, as ``(B, K, 3, H, W)``.

    MedSteerError for a count that is not strengths times factual images.
    """
    images, wanted = len(factuals), len(factuals) * len(strengths)
    if len(counterfactuals) != wanted:
        raise MedSteerError(
            f"counterfactual has {len(counterfactuals)} images; {wanted} were expected: {len(strengths)} strengths "
            f"({', '.join(f'{s:g}' for s in strengths)}) of {images} factual images. Give the strengths that "
            "Counterfactual Sampler has."
        )
    return counterfactuals.unflatten(0, (len(strengths), images)).transpose(0, 1)


def sweep(
    factuals: Tensor,
    counterfactuals: Tensor,
    strengths: Sequence[float],
    source: str,
    target: str,
    judge: Judge | None,
    name: str = "",
) -> Sweep:
    """The score of every strength of every factual image ``(B, 3, H, W)``, from class ``source`` to ``target``.

    ``judge`` None measures pixels alone. MedSteerError for images that do not fit and classes that the judge lacks.
    """
    grid = by_strength(factuals, counterfactuals, strengths)
    first = factuals.repeat_interleave(len(strengths), 0)
    a, b = checked_pair(first, grid.flatten(0, 1), batch=True)
    if judge is None:
        found: list[Any] = [compare(*pair) for pair in zip(a, b, strict=True)]
        source = target = ""
    else:
        found = score_pairs(a, b, source, target, judge)
        source, target = found[0].source, found[0].target
    width = len(strengths)
    rows = tuple(tuple(found[start : start + width]) for start in range(0, len(found), width))
    return Sweep(tuple(strengths), rows, source, target, name, doubt_about(judge))


def records(found: Sweep) -> dict[str, Any]:
    """A sweep for JSON: each strength's summary, where a judge scored it, and every pair."""
    pairs = [
        {"image": image + 1, "strength": strength, **(cell.to_dict() if isinstance(cell, PairScore) else cell)}
        for image, row in enumerate(found.cells)
        for strength, cell in zip(found.strengths, row, strict=True)
    ]
    judged = isinstance(found.cells[0][0], PairScore)
    columns = list(zip(*found.cells, strict=True)) if judged else []
    summaries = [{"strength": s, **summarise(cells)} for s, cells in zip(found.strengths, columns, strict=False)]
    return {
        "judge": found.judge or None,
        **({"warning": found.doubt} if found.doubt else {}),
        "source": found.source or None,
        "target": found.target or None,
        "strengths": list(found.strengths),
        "by_strength": summaries,
        "pairs": pairs,
    }


def table(found: Sweep) -> str:
    """A sweep as CSV, a row for each image and strength; what was not judged is empty."""
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(_TABLE)
    for image, row in enumerate(found.cells):
        for strength, cell in zip(found.strengths, row, strict=True):
            writer.writerow([image + 1, f"{strength:g}", *_columns(cell)])
    return written.getvalue()


def sweep_picture(factuals: Tensor, counterfactuals: Tensor, found: Sweep) -> Tensor:
    """A grid ``(3, H, W)``: a row for each factual image, which stands first, and a column for each strength.

    The judge's answer stands under each tile; without a judge, SSIM. The first `MOST_ROWS` images and `MOST_COLUMNS`
    strengths are drawn, and the picture says what was left out.
    """
    grid = by_strength(factuals, counterfactuals, found.strengths)[:MOST_ROWS, :MOST_COLUMNS]
    rows, columns = grid.shape[:2]
    cell = fitted(grid.shape[-2:], max(168, min(250, 1250 // (columns + 1))))
    cell = cell[0], max(cell[1], 120)
    layout = Layout(cell, rows, columns + 1, left=48, top=52, bottom=158, row_gap=66, least_width=760)
    figure = new_figure(layout)
    words = ["factual", *(f"strength × {strength:g}" for strength in found.strengths[:columns])]
    for column, heading in enumerate(words):
        x = layout.at(0, column)[0] + cell[1] / 2
        write(figure, layout, heading, x, 27, _TITLE, weight="bold", fit=cell[1])
    for row in range(rows):
        x, y = layout.at(row, 0)
        write(figure, layout, str(row + 1), x - 22, y + cell[0] / 2, _TITLE, weight="bold", color=FAINT)
        images = torch.cat([factuals[row : row + 1], grid[row]]).detach().float().cpu().clamp(0, 1)
        lines = [_factual_lines(found, row), *(_lines(score) for score in found.cells[row][:columns])]
        for column, (image, (upper, lower)) in enumerate(zip(images, lines, strict=True)):
            show_colour(figure, layout, (row, column), image)
            x, y = layout.at(row, column)[0] + cell[1] / 2, layout.at(row, column)[1] + cell[0]
            write(figure, layout, upper, x, y + 18, _WORDS, fit=cell[1])
            write(figure, layout, lower, x, y + 42, _SMALL, fit=cell[1], color=FAINT)
    for line, footnote in enumerate(_footnotes(found, rows, columns)):
        y = layout.height - layout.bottom + 84 + 25 * line
        write(figure, layout, footnote, 16, y, _SMALL, align="left", color=FAINT, fit=layout.width - 32)
    return pixels(figure)


def _lines(cell: Any) -> tuple[str, str]:
    """The verdict and the number under a counterfactual."""
    if not isinstance(cell, PairScore):
        return f"SSIM {cell['ssim']:.3f}", f"{cell['changed_fraction']:.1%} changed"
    if cell.flipped:
        verdict = "\N{CHECK MARK} flipped"
    elif cell.counterfactual_label != cell.target:
        verdict = f"\N{BALLOT X} {cell.counterfactual_label}"
    else:
        verdict = f"\N{BALLOT X} {cell.misses[0]}"
    return verdict, f"{cell.target} {_probability(cell.target_probability[1])}"


def _factual_lines(found: Sweep, row: int) -> tuple[str, str]:
    cell = found.cells[row][0]
    if not isinstance(cell, PairScore):
        return "", ""
    verdict = cell.factual_label if cell.accepted else f"not counted: {cell.factual_label}"
    return verdict, f"{cell.target} {_probability(cell.target_probability[0])}"


def _probability(value: float) -> str:
    # what is nearly sure is not shown as sure
    return "<0.01" if value < 0.005 else ">0.99" if value >= 0.995 else f"{value:.2f}"


def _footnotes(found: Sweep, rows: int, columns: int) -> list[str]:
    """What the words mean, by whom, and what was left out."""
    images, strengths = len(found.cells), len(found.strengths)
    notes = ["No judge: structural similarity to the factual, and the share of pixels that changed."]
    if found.source:
        notes = [
            f"Judge: {found.judge}. Below each tile: its verdict, and its probability of '{found.target}'.",
            f"\N{CHECK MARK} flipped: '{found.target}' is seen and no criterion is missed; "
            "\N{BALLOT X}: the class seen, or the criterion.",
        ]
    if rows < images or columns < strengths:
        notes.append(f"Drawn: {rows} of {images} images and {columns} of {strengths} strengths; scores have all.")
    return notes


def _columns(cell: Any) -> list[Any]:
    if not isinstance(cell, PairScore):
        return ["", "", "", "", cell["ssim"], cell["changed_fraction"]]
    return [
        int(cell.flipped), " + ".join(cell.misses), cell.counterfactual_label, f"{cell.target_probability[1]:.4f}",
        f"{cell.ssim:.4f}", f"{cell.changed_fraction:.4f}",
    ]  # fmt: skip
