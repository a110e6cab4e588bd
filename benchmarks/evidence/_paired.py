"""Methods beside each other on the same seeds: the difference of each from ours, pair by pair, with intervals.

Both counterfactuals of a seed start from the same factual image, so that what makes one seed easy or hard drops out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medsteer_core.intervals import bootstrap, newcombe
from medsteer_core.scores.images import mean
from medsteer_core.scores.pair import PairScore

MEASURES = ("ssim_outside", "anatomy_drift")


def differences(methods: Mapping[str, Sequence[PairScore]], reference: str) -> dict[str, dict[str, Any]]:
    """Of each method but the ``reference`` what it does better or worse: its flip rate, SSIM outside and drift minus
    those of the reference, over the accepted pairs in which both have the number, with 95% intervals.

    Scores are in the seeds' order, of the same seeds.
    """
    if reference not in methods:
        return {}
    return {name: _difference(of, methods[reference]) for name, of in methods.items() if name != reference}


def _difference(scores: Sequence[PairScore], reference: Sequence[PairScore]) -> dict[str, Any]:
    pairs = [(one, other) for one, other in zip(scores, reference, strict=True) if one.accepted and other.accepted]
    flips = [one.flipped for one, _ in pairs], [other.flipped for _, other in pairs]
    record: dict[str, Any] = {
        "n": len(pairs),
        "flip": mean([float(one) - float(other) for one, other in zip(*flips, strict=True)]),
        "flip_ci": newcombe(*flips),
    }
    for measure in MEASURES:
        both = [(getattr(one, measure), getattr(other, measure)) for one, other in pairs]
        values = [one - other for one, other in both if one is not None and other is not None]
        record |= {measure: mean(values), f"{measure}_ci": bootstrap(values), f"{measure}_n": len(values)}
    return {name: _rounded(value) for name, value in record.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [round(item, 4) for item in value]
    return round(value, 4) if isinstance(value, float) else value
