"""What is known of a pathology vector, as maps of blocks and steps and as two classes along one direction.

The numbers behind `vector_plot`. What a vector does not say is a sentence instead, never a guess.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..extraction.sample_report import AUROC, KEY, LEAST_SAMPLES, STABILITY, recorded, recorded_projections
from ..vectors.class_gap import gaps_in_spreads
from ..vectors.combined_facts import is_combined
from ..vectors.pathology_vector import PathologyVector
from ..vectors.reference_vectors import is_imported

# Of the numbers of a map this share has colours of its own.
_MOST = 0.95


@dataclass(frozen=True, eq=False)
class BlockMap:
    """One number for each block and step: values (blocks, steps), NaN where it is not known. Colours show `low` to
    `high`; numbers beyond look like these."""

    title: str
    values: Tensor
    low: float
    high: float


@dataclass(frozen=True)
class Missing:
    """What stands in the place of a map or a histogram: its title and why there is none."""

    title: str
    why: str


@dataclass(frozen=True)
class Along:
    """Both classes along one direction, from their midpoint, in the activations' units.

    present, absent: a number a sample, held out; or only the class mean where the vector has no samples, and then
    `spreads` are the roots of the classes' total variance (present, absent), None where not known
    """

    title: str
    site: str
    step: int
    present: tuple[float, ...]
    absent: tuple[float, ...]
    held_out: bool
    spreads: tuple[float, float] | None = None


def gap_map(vector: PathologyVector) -> BlockMap | Missing:
    """How far apart the class means are, over all directions; in spreads within a class where these are known."""
    if "gaps" in vector.unknown:
        return Missing("Class gap", _whole_why(vector))
    gaps = torch.stack([site.gaps.norm(dim=1) for site in vector.sites.values()])
    title = "Class gap (activation units)"
    in_spreads, _why = gaps_in_spreads(vector)
    if len(in_spreads) == len(vector.sites):
        gaps, title = torch.stack(list(in_spreads.values())), "Class gap / spread within a class"
    return BlockMap(title, gaps, 0.0, _reach(gaps))


def separability_map(vector: PathologyVector) -> BlockMap | Missing:
    """Held-out AUROC; for an affine map the share of the difference that it predicts at unseen images."""
    explained = _explained(vector)
    if explained is not None:
        return BlockMap("Difference predicted, unseen images", explained, 0.0, 1.0)
    return _reported(vector, AUROC, "AUROC at unseen samples", 0.5)


def stability_map(vector: PathologyVector) -> BlockMap | Missing:
    """|cos| between the directions of two halves of the samples."""
    if vector.has_readers and not is_combined(vector):
        return Missing(
            "Stability", "An affine map is fitted to token pairs of noise 'same state': it has no halves to compare."
        )
    return _reported(vector, STABILITY, "Stability: |cos| of two halves", 0.0)


def classes_along(vector: PathologyVector) -> Along | Missing:
    """Held-out projections of both classes at the best block and step, or else the class means at the widest gap."""
    found = recorded_projections(vector)
    if found is not None:
        return Along("Unseen samples", found.site, found.step, found.present, found.absent, held_out=True)
    if {"projections", "gaps"} & vector.unknown:
        return Missing("Both classes", _whole_why(vector))
    gaps = gap_map(vector).values
    index = int(gaps.argmax())
    site, step = vector.site_names[index // vector.steps], index % vector.steps
    values = vector.sites[site]
    first, second = values.projections[step, :, 0].tolist()
    middle = (first + second) / 2
    spreads = tuple(values.spreads[step].tolist()) if len(gaps_in_spreads(vector)[0]) == len(vector.sites) else None
    return Along("Class means", site, step, (first - middle,), (second - middle,), False, spreads)


def block_numbers(names: Sequence[str]) -> list[int] | None:
    """The blocks' own numbers where every site is one numbered block, in order; None for other models' sites."""
    found = [re.search(r"blocks\.(\d+)\.", name) for name in names]
    numbers = [int(match[1]) for match in found if match]
    fits = len(numbers) == len(names) and all(a < b for a, b in zip(numbers, numbers[1:], strict=False))
    return numbers if fits else None


def _reported(vector: PathologyVector, measure: str, title: str, low: float) -> BlockMap | Missing:
    values = recorded(vector, measure)
    if not values:
        return Missing(title, _report_why(vector))
    return BlockMap(title, torch.tensor(list(values.values()), dtype=torch.float32), low, 1.0)


def _explained(vector: PathologyVector) -> Tensor | None:
    """(blocks, steps): the shares in an affine map's provenance; None where it has no (sound) ones."""
    found = vector.provenance.get("explained_by_site")
    rows = [found.get(name) for name in vector.site_names] if isinstance(found, Mapping) else [None]
    if not all(isinstance(row, list) and len(row) == vector.steps and all(map(_share, row)) for row in rows):
        return None
    values = torch.tensor([[math.nan if share is None else share for share in row] for row in rows])
    return None if values.isnan().all() else values


def _reach(values: Tensor) -> float:
    """Where the colours end: at the largest number, unless a few are so large that the others would look alike."""
    largest, most = float(values.max()), float(values.flatten().quantile(_MOST))
    return (most if most > 0 and largest > 2 * most else largest) or 1.0


def _share(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and value <= 1)


def _whole_why(vector: PathologyVector) -> str:
    if is_imported(vector):
        return "Not known: the imported file holds directions only."
    return "Not known of a combined vector. Inspect its parts."


def _report_why(vector: PathologyVector) -> str:
    facts, samples = vector.provenance.get(KEY), vector.provenance.get("samples")
    if is_imported(vector) or is_combined(vector):
        return _whole_why(vector)
    if vector.has_readers:
        return "Not known: an affine map needs two images or more to be tried on an unseen one."
    if isinstance(facts, Mapping) and isinstance(facts.get("left_out"), str):
        return f"Left out: {facts['left_out']}"
    if isinstance(samples, int) and samples < LEAST_SAMPLES:
        return f"Not known: {samples} samples a prompt, and {LEAST_SAMPLES} or more are needed."
    return "This vector says nothing of it. Extract it again to know."
