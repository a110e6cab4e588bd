"""What the operators benchmark counts: clean flips, the best row, and the difference of two rates of the same pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

from benchmarks.evidence._store import Result
from medsteer_core.intervals import wilson
from medsteer_core.scores import scorer as evaluate
from medsteer_core.scores.scorer import PairScore

# A flip is clean when the rest of the image stayed. SSIM outside a focal finding: what renders of one anatomy as both
# classes reach with new sensor noise (0.88 to 0.905, the benchmarks' ceiling). Drift, where a finding is diffuse: one
# and a half held-out errors of the anatomy regressor; re-prompting, which draws another anatomy, drifts by about 2.
LEAST_SSIM = 0.90
MOST_DRIFT = 1.5
WITHIN = 0.05  # what "within 5 points" means, of rates
EPSILON = 1e-9

Row = Mapping[str, Any]


def kept(score: PairScore) -> bool:
    """Whether a pair's structure stayed; what could not be measured has not been shown to."""
    if evaluate.structure_measure(score.source, score.target) == "anatomy_drift":
        return score.anatomy_drift is not None and score.anatomy_drift <= MOST_DRIFT
    return score.ssim_outside is not None and score.ssim_outside >= LEAST_SSIM


def numbers(found: Sequence[Result]) -> dict[str, Any]:
    """Chunks of scored pairs as the numbers of a row. Rates are of accepted factuals, intervals at 95%."""
    scores = [score for result in found for score in result.scores]
    accepted = [score for score in scores if score.accepted]
    summary = evaluate.summarise(scores)
    clean = sum(score.flipped and kept(score) for score in accepted)
    return {
        "n": len(scores),
        "accepted": len(accepted),
        "flips": summary["flips"],
        "flip": summary["flip_rate"],
        "flip_ci": summary["flip_rate_interval"],
        "clean": clean,
        "clean_flip": round(clean / len(accepted), 4) if accepted else None,
        "clean_flip_ci": [round(end, 4) for end in wilson(clean, len(accepted))],
        "structure": summary["structure"],
        "ssim_outside": summary["ssim_outside"],
        "ssim_outside_ci": summary["ssim_outside_interval"],
        "anatomy_drift": summary["anatomy_drift"],
        "anatomy_drift_ci": summary["anatomy_drift_interval"],
    }


def mean_known(values: Iterable[float | None]) -> float | None:
    """The mean of those that are numbers; None of none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def quality(rows: Sequence[Row]) -> tuple[float, float, float]:
    """What rows are compared by: mean clean flips, then mean SSIM outside (focal), then little drift (diffuse).

    Larger is better; what is unknown is worse than everything.
    """

    def known(rows: Iterable[Row], key: str, sign: float = 1.0) -> float:
        found = mean_known(row[key] for row in rows)
        return -math.inf if found is None else round(sign * found, 9)  # so that equal shares of pairs tie

    focal = [row for row in rows if row["structure"] != "anatomy_drift"]
    diffuse = [row for row in rows if row["structure"] == "anatomy_drift"]
    return (
        known(rows, "clean_flip"),
        known(focal, "ssim_outside"),
        known(diffuse, "anatomy_drift", sign=-1.0),
    )


def at_best_strengths(rows: Sequence[Row]) -> list[Row]:
    """Of one operator with one estimator, the rows at the strength that is best for each kind of pair."""
    chosen: list[Row] = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row for row in rows if row["kind"] == kind]
        swept = dict.fromkeys(row["strength"] for row in of_kind)
        groups = {strength: [row for row in of_kind if row["strength"] == strength] for strength in swept}
        chosen += groups[max(groups, key=lambda strength: quality(groups[strength]))]  # the first of equal ones
    return chosen


def ranking(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every operator with every estimator, each at its own best strength for each kind of pair; the best one first.

    The order is that of the mean over pairs of clean flips; equal ones by structure (see `quality`).
    """

    def name(row: Row) -> tuple[str, str]:
        return row["operator"], row["estimator"]

    ranked = []
    for (operator, estimator), group in groupby(sorted(rows, key=name), key=name):
        best = at_best_strengths(list(group))
        ranked.append((quality(best), {
            "operator": operator,
            "estimator": estimator,
            "strengths": {row["kind"]: row["strength"] for row in best},
            "pairs": {row["pair"]: row["clean_flip"] for row in best},
            "clean_flip": _rounded(mean_known(row["clean_flip"] for row in best)),
            "flip": _rounded(mean_known(row["flip"] for row in best)),
            "ssim_outside_focal": _rounded(mean_known(r["ssim_outside"] for r in best if not _diffuse(r))),
            "anatomy_drift_diffuse": _rounded(mean_known(r["anatomy_drift"] for r in best if _diffuse(r))),
        }))  # fmt: skip
    return [entry for _, entry in sorted(ranked, key=lambda one: one[0], reverse=True)]


def _diffuse(row: Row) -> bool:
    return row["structure"] == "anatomy_drift"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def paired_difference(one: Sequence[bool], other: Sequence[bool]) -> dict[str, Any]:
    """The share of ``one`` minus that of ``other``, two answers for each of the same n things, with a 95% interval.

    ``both``, ``only_one``, ``only_other`` and ``neither`` count the things. ``within`` says whether the difference
    itself is at most `WITHIN`, ``surely_within`` whether its whole interval is.
    """
    answers = list(zip(one, other, strict=True))
    both, only_one = answers.count((True, True)), answers.count((True, False))
    only_other, neither = answers.count((False, True)), answers.count((False, False))
    counts = {"n": len(answers), "both": both, "only_one": only_one, "only_other": only_other, "neither": neither}
    if not answers:
        return {**counts, "difference": None, "interval": [-1.0, 1.0], "within": None, "surely_within": None}
    difference = (only_one - only_other) / len(answers)
    low, high = newcombe(both, only_one, only_other, neither)
    return {
        **counts,
        "difference": round(difference, 4),
        "interval": [round(low, 4), round(high, 4)],
        "within": abs(difference) <= WITHIN + EPSILON,
        "surely_within": max(abs(low), abs(high)) <= WITHIN + EPSILON,
    }


def newcombe(both: int, only_one: int, only_other: int, neither: int) -> tuple[float, float]:
    """95% interval of the difference of two shares of the same things (Newcombe 1998, Stat. Med. 17, 2635, method 10).

    Wilson's intervals of the two shares are joined by the correlation of the answers, which is corrected for continuity
    where it is positive. There is at least one thing.
    """
    n = both + only_one + only_other + neither
    first, second = both + only_one, both + only_other
    share_1, share_2 = first / n, second / n
    (low_1, high_1), (low_2, high_2) = wilson(first, n), wilson(second, n)
    cross = both * neither - only_one * only_other
    scale = math.sqrt(first * (n - first) * second * (n - second))
    phi = (max(cross - n / 2, 0.0) if cross > 0 else cross) / scale if scale else 0.0

    def reach(down: float, up: float) -> float:
        return math.sqrt(max(0.0, down * down - 2 * phi * down * up + up * up))

    difference = share_1 - share_2
    low = difference - reach(share_1 - low_1, high_2 - share_2)
    return low, difference + reach(high_1 - share_1, share_2 - low_2)
