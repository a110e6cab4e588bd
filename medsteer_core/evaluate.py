"""Score pairs of a factual and a counterfactual image: the one place, for node, benchmark and dataset report alike.

`score_pair` asks EndoPhantom's judges whether the finding went (or came) and the picture is still like a render, and
measures how well the rest was kept; `summarise` makes one record of many pairs, with intervals; `noise_ceiling` is what
true counterfactuals get. `pair_score` has the criteria, `image_pairs` what needs no judge and fits any two images.

    score = score_pair(factual, counterfactual, "polyps", "normal cecum")
    score.flipped, score.ssim_outside
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .endophantom.judges import Verdict
from .endophantom.phantom import CLASSES, Anatomy, render
from .errors import MedSteerError
from .image_pairs import checked_pair, mean
from .intervals import bootstrap, wilson
from .pair_score import (
    CRITERIA,
    DIFFUSE,
    DISTANCE_LIMIT,
    FINDING_FOUND_LIMIT,
    FINDING_LEFT_LIMIT,
    FINDINGS_OF,
    MASK_LIMIT,
    PairScore,
    only_in,
    rounded,
    scores_of,
    structure_measure,
)

__all__ = [
    "CRITERIA",
    "DIFFUSE",
    "DISTANCE_LIMIT",
    "FINDINGS_OF",
    "FINDING_FOUND_LIMIT",
    "FINDING_LEFT_LIMIT",
    "MASK_LIMIT",
    "PairScore",
    "class_of",
    "embedded_judges",
    "noise_ceiling",
    "score_pair",
    "score_pairs",
    "structure_measure",
    "summarise",
    "wilson",
]

JudgesLike = Callable[[Tensor], Verdict]


def score_pair(
    factual: Tensor, counterfactual: Tensor, source: str, target: str, judges: JudgesLike | None = None
) -> PairScore:
    """Score one pair of images ``(3, H, W)`` in 0..1 that should go from class ``source`` to class ``target``.

    ``judges`` default to EndoPhantom's own. MedSteerError for images or classes that do not fit.
    """
    checked_pair(factual, counterfactual, batch=False)
    return score_pairs(factual[None], counterfactual[None], source, target, judges)[0]


def score_pairs(
    factuals: Tensor, counterfactuals: Tensor, source: str, target: str, judges: JudgesLike | None = None
) -> list[PairScore]:
    """Score pairs ``(n, 3, H, W)`` in 0..1, as `score_pair` does each, with one call of the judges."""
    _check_classes(source, target)
    a, b = checked_pair(factuals, counterfactuals, batch=True)
    return scores_of(a, b, (judges or embedded_judges())(torch.cat([a, b])), source, target)


def noise_ceiling(
    source: str, target: str, n: int = 64, seed: int = 0, size: int = 128, judges: JudgesLike | None = None
) -> dict[str, Any]:
    """What the scorer gives to true counterfactuals: `summarise` of ``n`` anatomies rendered as both classes.

    The two renders of an anatomy (``size`` pixels a side, drawn from ``seed`` independently of the class) differ in the
    finding and in their sensor noise, as two photographs would. No method can be asked for more.
    """
    _check_classes(source, target)
    if n < 1:
        raise MedSteerError(f"noise_ceiling got n = {n}; 1 or more anatomies were expected.")
    anatomy = Anatomy.sample(n, seed)
    scores = []
    for part in torch.arange(n).split(16):
        factual, counterfactual = (
            render(anatomy[part], name, size, noise_seed=2 * seed + number).image
            for number, name in enumerate((source, target))
        )
        scores += score_pairs(factual, counterfactual, source, target, judges)
    return summarise(scores)


@lru_cache(maxsize=1)
def embedded_judges() -> JudgesLike:
    """EndoPhantom's judges, read once in a process."""
    from .endophantom.bundle import Bundle

    return Bundle().judges()


def class_of(prompt: str) -> str:
    """The class that a prompt names: the longest name in it. MedSteerError when it names none."""
    named = [name for name in CLASSES if name in prompt.lower()]
    if not named:
        raise MedSteerError(f"The prompt '{prompt}' names no class; one of these was expected: {', '.join(CLASSES)}.")
    return max(named, key=len)


def summarise(scores: Iterable[PairScore]) -> dict[str, Any]:
    """Many pairs of one source and target as one record for JSON; ``<name>_interval`` is at 95%.

    All numbers but ``n`` and ``accepted`` are over accepted pairs: what was never the source class cannot be flipped.
    Rates have Wilson's intervals, means the bootstrap's. ``finding_gone``, ``finding_added`` and ``finding_kept`` are
    rates, the last among the pairs whose finding is gone. ``over_distance_limit`` and ``over_mask_limit`` are shares of
    pairs that fail by these, ``structure`` names the measure that fits the classes. A number is None where no pair has
    it; ``ssim_outside_n`` says how many had one. MedSteerError for pairs of several sources or targets.
    """
    scores = list(scores)
    pairs = sorted({(score.source, score.target) for score in scores})
    if len(pairs) > 1:
        named = "; ".join(" -> ".join(pair) for pair in pairs)
        raise MedSteerError(
            f"summarise got pairs of {named}; one source and target were expected. Summarise each alone."
        )
    kept = [score for score in scores if score.accepted]
    gone = [score for score in kept if score.finding_gone]
    removes = bool(pairs) and bool(only_in(*pairs[0]))
    record = {
        "n": len(scores),
        "accepted": len(kept),
        "flips": sum(score.flipped for score in kept),
        **_rate("flip_rate", [score.flipped for score in kept]),
        **_rate("finding_gone", [score.finding_gone for score in kept if removes]),
        **_rate("finding_kept", [score.finding_kept for score in gone]),
        **_rate("finding_added", [score.finding_added for score in kept]),
        "structure": structure_measure(*pairs[0]) if pairs else None,
        "ssim_outside_n": sum(score.ssim_outside is not None for score in kept),
        "distance": mean([score.distance[1] for score in kept]),
        "over_distance_limit": mean(["distance" in score.misses for score in kept]),
        "over_mask_limit": mean(["mask" in score.misses for score in kept]),
        "identical": sum(score.identical for score in kept),
    }
    for name in ("ssim_outside", "psnr_outside", "anatomy_drift", *_MEANS):
        values = [getattr(score, name) for score in kept if getattr(score, name) is not None]
        record[name] = mean(values)
        if name not in _MEANS:
            record[f"{name}_interval"] = bootstrap(values)
    return {name: rounded(value) for name, value in record.items()}


_MEANS = ("off_target_drift", "finding_before", "finding_after", "finding_left", "kept_overlap", "mask_fraction")
_MEANS += ("changed_fraction", "ssim")


def _check_classes(source: str, target: str) -> None:
    for role, name in (("source", source), ("target", target)):
        if name not in CLASSES:
            raise MedSteerError(f"the {role} class is '{name}'; one of these was expected: {', '.join(CLASSES)}.")
    if source == target:
        raise MedSteerError(f"source and target are both '{source}'; two different classes were expected.")


def _rate(name: str, values: list[bool | None]) -> dict[str, Any]:
    """A share and its interval, over the values that are not None."""
    known = [value for value in values if value is not None]
    return {name: mean(known), f"{name}_interval": wilson(sum(known), len(known))}
