"""How well vectors of one concept pair agree, and how many extraction samples follow from that and from flip rates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence.quality import named
from medsteer_core.errors import MedSteerError
from medsteer_core.scores.scorer import PairScore, summarise
from medsteer_core.vectors.pathology_vector import PathologyVector, SiteDirections

PAIRED, UNPAIRED, SAME_STATE = NOISES = ("paired", "unpaired", "same state")
# The preset that steers with a mode's vectors: ours is affine, which takes none but those of "same state".
PRESET_OF = {PAIRED: "medsteer", UNPAIRED: "medsteer", SAME_STATE: "ours"}
REPEATS = 3  # extractions that differ in nothing but their noise
TOLERANCE = {"stability": 0.05, "flip": 0.05}
RULE = (
    "A number of samples is enough for a noise mode when at this and every larger number measured, for every pair, "
    f"the stability is at most {TOLERANCE['stability']} and the flip rate of the mode's preset at most "
    f"{TOLERANCE['flip']} below that of the same mode at the largest number. Recommended is the smallest such number; "
    "where there is none (no factual image was accepted), the largest."
)
NUMBERS = ("n", "accepted", "flips", "flip", "flip_ci", "ssim_outside", "ssim_outside_ci", "anatomy_drift")
MEANING = {
    "stability": "cosine between two of the three extractions, averaged over sites and steps; its range is of "
    "the three couples. Paired, unpaired: of the directions, with the class gaps of the largest number of "
    "samples as weights. Same state: Frobenius's of the affine maps, with their norms at the largest number; "
    "another measure, so those numbers are not to be compared with the other modes'",
    "samples": "paired, unpaired: of each prompt; same state: in all, half follow each prompt",
    "flip": f"of the preset that is named, pooled over the {REPEATS} extractions, with Wilson's interval; the "
    "same images are steered by each vector, so the interval is of vectors for these images",
    "ours": "the same numbers where the preset is ours, null where its operator does not take the vectors",
    "seconds": "of one extraction, the median of three",
}
Cell = Mapping[str, Any]
Cells = Mapping[str, Mapping[str, Mapping[str, Cell]]]  # pair, noise, samples (as text): numbers


def stability(vectors: Sequence[PathologyVector], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """How well vectors agree: cosines of any two (see `cosines`), averaged with ``weights`` (steps, rank or 1).

    ``stability`` is over all sites, steps and couples of vectors, its range that of the couples; the least stable site
    has the smallest average over steps and couples. MedSteerError when a vector lacks a site.
    """
    for vector in vectors:
        if set(vector.site_names) != set(weights):
            missing = sorted(set(weights) ^ set(vector.site_names))
            raise MedSteerError(f"The vectors differ in their sites ({', '.join(missing)}); the same were expected.")
    couples = list(combinations(vectors, 2))
    sums = {
        name: [float((weight * cosines(a.sites[name], b.sites[name])).sum()) for a, b in couples]
        for name, weight in weights.items()
    }
    total = {name: float(weight.sum()) for name, weight in weights.items()}
    each = [sum(of_couple) / sum(total.values()) for of_couple in zip(*sums.values(), strict=True)]
    sites = {name: fmean(sums[name]) / total[name] for name in sums if total[name] > 0}
    least = min(sites, key=sites.__getitem__)
    return {
        "stability": round(fmean(each), 4),
        "stability_range": [round(min(each), 4), round(max(each), 4)],
        "least_stable_site": {"name": least, "stability": round(sites[least], 4)},
    }


def cosines(a: SiteDirections, b: SiteDirections) -> Tensor:
    """How alike two vectors are at the steps of a site: 1 the same, 0 nothing in common, -1 the opposite.

    Without readers ``(steps, rank)``: `d_A . d_B` of the unit directions. With readers ``(steps, 1)``: the directions
    are then a basis that any rotation leaves as good, so what is compared is what it does. The change predicted for an
    activation `a` is `M [a; 1]` with `M = D^T [W | o]` of shape (C, C + 1), where `D` (R, C) are the directions, `W`
    (R, C) the readers and `o` (R,) the offsets; the cosine is Frobenius's,

        <M_A, M_B> / (|M_A| |M_B|),   <M_A, M_B> = sum_ij (d_Ai . d_Bj) (w_Ai . w_Bj + o_Ai o_Bj).

    It is the cosine of the changes over activations of mean 0 and covariance 1. Real ones vary more in some channels
    than in others, and readers are least certain where activations hardly vary; so changes agree better than maps.
    """
    if a.readers is None or b.readers is None:
        return (a.directions * b.directions).sum(-1)
    lengths = map_norms(a) * map_norms(b)
    return _map_product(a, b) / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)


def map_norms(site: SiteDirections) -> Tensor:
    """``(steps, 1)`` float64: the Frobenius norm of a site's maps (see `cosines`)."""
    return _map_product(site, site).clamp_min(0).sqrt()


def _map_product(a: SiteDirections, b: SiteDirections) -> Tensor:
    """``(steps, 1)``: the inner product of two maps, without making them."""
    along = a.directions.double() @ b.directions.double().mT
    read = a.readers.double() @ b.readers.double().mT
    offset = a.offsets.double()[:, :, None] * b.offsets.double()[:, None, :]
    return (along * (read + offset)).sum(dim=(1, 2))[:, None]


def mean_weights(vectors: Iterable[PathologyVector]) -> dict[str, Tensor]:
    """What each site and step counts, averaged over vectors of the same sites.

    Without readers the class gaps ``(steps, rank)``, with readers the norms of the maps ``(steps, 1)``.
    """
    vectors = list(vectors)
    return {
        name: torch.stack([_weight(vector.sites[name]) for vector in vectors]).mean(0) for name in vectors[0].site_names
    }


def _weight(site: SiteDirections) -> Tensor:
    return site.gaps if site.readers is None else map_norms(site)


def pooled(repeats: Sequence[Sequence[PairScore]]) -> dict[str, Any]:
    """The scorer's summary over all repeats, and each repeat's flip rate (None where no factual was accepted)."""
    record = named(summarise([score for scores in repeats for score in scores]))
    each = [named(summarise(scores))["flip"] for scores in repeats]
    return {**{name: record[name] for name in NUMBERS}, "flip_each": each}


def recommended(cells: Cells, noise: str) -> dict[str, Any]:
    """The number of samples that follows from the numbers by `RULE` for a noise mode; ``enough`` is every mode's."""
    enough = {mode: _enough(cells, mode) for mode in NOISES}
    largest = int(list(next(iter(cells.values()))[noise])[-1])
    met = enough[noise] is not None
    return {
        "noise": noise, "samples": enough[noise] if met else largest, "largest": largest, "rule_met": met,
        "enough": enough, "tolerance": TOLERANCE, "rule": RULE,
    }  # fmt: skip


def _enough(cells: Cells, noise: str) -> int | None:
    """The smallest number of samples from which on ``noise`` is within the tolerance; None when there is none."""
    found = None
    for n in reversed(list(next(iter(cells.values()))[noise])):
        if not all(_within(pair[noise], n) for pair in cells.values()):
            break
        found = int(n)
    return found


def _within(mode: Mapping[str, Cell], n: str) -> bool:
    """Whether a cell is within the tolerance of its mode's at the largest number. An unknown rate is not."""
    last = mode[list(mode)[-1]]
    couples = [(mode[n][kind], last[kind], tolerance) for kind, tolerance in TOLERANCE.items()]
    return all(
        value is not None and wanted is not None and value >= wanted - tolerance - 1e-9
        for value, wanted, tolerance in couples
    )


def said(choice: Mapping[str, Any]) -> str:
    """A recommendation as a sentence."""
    what = f"recommended, {choice['noise']} noise: {choice['samples']} sample{'s' * (choice['samples'] > 1)}"
    if not choice["rule_met"]:
        return f"{what}; no number was enough: the largest"
    return f"{what}, the largest measured" if choice["samples"] == choice["largest"] else what
