"""Score pairs of a factual and a counterfactual image: the one place, for node, benchmark and dataset report alike.

`score_pair` asks EndoPhantom's judges whether the finding went (or came) and the picture is still like a render, and
measures how well the rest was kept; `summarise` makes one record of many pairs, with intervals; `noise_ceiling` is what
true counterfactuals get. `pair_score` has the criteria, `image_pairs` what needs no judge and fits any two images.

    score = score_pair(factual, counterfactual, "polyps", "normal cecum")
    score.flipped, score.ssim_outside

For real images give the judge that `judge_files.load_judge` reads. It may know less; ``score.not_judged`` says what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import MedSteerError
from ..intervals import bootstrap, wilson
from ..judges.judge import Judge, Terms
from .images import checked_pair, mean
from .pair import (
    CRITERIA,
    DIFFUSE,
    ENDOPHANTOM,
    FINDING_FOUND_LIMIT,
    FINDING_LEFT_LIMIT,
    FINDINGS_OF,
    PairScore,
    only_in,
    rounded,
    scores_of,
    structure_measure,
)
from .parts import DISTANCE_LIMIT, MASK_LIMIT

if TYPE_CHECKING:
    from ..endophantom.judges import Verdict

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

# A judge without terms of its own speaks in EndoPhantom's.
JudgesLike = Judge | Callable[[Tensor], "Verdict"]


def score_pair(
    factual: Tensor, counterfactual: Tensor, source: str, target: str, judges: JudgesLike | None = None
) -> PairScore:
    """Score one pair of images ``(3, H, W)`` in 0..1 that should go from class ``source`` to class ``target``.

    ``judges`` default to EndoPhantom's own; source and target are classes of theirs. MedSteerError for images or
    classes that do not fit.
    """
    checked_pair(factual, counterfactual, batch=False)
    return score_pairs(factual[None], counterfactual[None], source, target, judges)[0]


def score_pairs(
    factuals: Tensor,
    counterfactuals: Tensor,
    source: str,
    target: str,
    judges: JudgesLike | None = None,
    masks: Tensor | None = None,
) -> list[PairScore]:
    """Score pairs ``(n, 3, H, W)`` in 0..1, as `score_pair` does each, with one call of the judges.

    ``masks (n, H, W)`` bool say where the finding is for judges that mark none; one that has a segmenter for both
    classes goes by its own masks.
    """
    terms: Terms = getattr(judges, "terms", ENDOPHANTOM)
    source, target = _checked_classes(source, target, terms)
    a, b = checked_pair(factuals, counterfactuals, batch=True)
    if masks is not None and tuple(masks.shape) != (len(a), *a.shape[-2:]):
        raise MedSteerError(f"masks have shape {tuple(masks.shape)}; {(len(a), *a.shape[-2:])} was expected.")
    opinion = (judges or embedded_judges())(torch.cat([a, b]))
    identity = None if terms is ENDOPHANTOM else judges.identity
    if terms is not ENDOPHANTOM and not identity:
        raise MedSteerError("The judge has no identity; a text that tells it from other judges was expected.")
    return scores_of(a, b, opinion, source, target, terms, identity, None if masks is None else masks.bool().cpu())


def noise_ceiling(
    source: str, target: str, n: int = 64, seed: int = 0, size: int = 128, judges: JudgesLike | None = None
) -> dict[str, Any]:
    """What the scorer gives to true counterfactuals: `summarise` of ``n`` anatomies rendered as both classes.

    The two renders of an anatomy (``size`` pixels a side, drawn from ``seed`` independently of the class) differ in the
    finding and in their sensor noise, as two photographs would. No method can be asked for more.
    """
    from ..endophantom.phantom import Anatomy, render  # scoring needs no renders

    named = _checked_classes(source, target, ENDOPHANTOM)
    if n < 1:
        raise MedSteerError(f"noise_ceiling got n = {n}; 1 or more anatomies were expected.")
    anatomy = Anatomy.sample(n, seed)
    scores = []
    for part in torch.arange(n).split(16):
        factual, counterfactual = (
            render(anatomy[part], name, size, noise_seed=2 * seed + number).image for number, name in enumerate(named)
        )
        scores += score_pairs(factual, counterfactual, source, target, judges)
    return summarise(scores)


class EmbeddedJudge:
    """EndoPhantom's judges as a `Judge`; a score with them names no judge, since it is the default."""

    terms = ENDOPHANTOM

    def __init__(self):
        from ..endophantom.bundle import Bundle

        self._bundle = Bundle()
        self._judges = self._bundle.judges()

    @cached_property
    def identity(self) -> str:
        return f"EndoPhantom sha256:{self._bundle.sha256()}"

    def __call__(self, images: Tensor) -> Verdict:
        return self._judges(images)


@lru_cache(maxsize=1)
def embedded_judges() -> EmbeddedJudge:
    """EndoPhantom's judges, read once in a process."""
    return EmbeddedJudge()


def class_of(prompt: str, terms: Terms = ENDOPHANTOM) -> str:
    """The class that a prompt names: the longest name in it. MedSteerError when it names none."""
    return terms.named_in(prompt)


def summarise(scores: Iterable[PairScore]) -> dict[str, Any]:
    """Many pairs of one source and target as one record for JSON; ``<name>_interval`` is at 95%.

    All numbers but ``n`` and ``accepted`` are over accepted pairs: what was never the source class cannot be flipped.
    Rates have Wilson's intervals, means the bootstrap's. ``finding_gone``, ``finding_added`` and ``finding_kept`` are
    rates, the last among the pairs whose finding is gone. ``over_distance_limit`` and ``over_mask_limit`` are shares of
    pairs that fail by these, ``structure`` names the measure that fits the classes. A number is None where no pair has
    it; ``ssim_outside_n`` says how many had one. For a judge from files, ``judge`` says which and ``not_judged`` which
    parts its flips say nothing of. MedSteerError for pairs of several sources, targets or judges.
    """
    scores = list(scores)
    pairs = sorted({(score.source, score.target) for score in scores})
    if len(pairs) > 1:
        named = "; ".join(" -> ".join(pair) for pair in pairs)
        raise MedSteerError(
            f"summarise got pairs of {named}; one source and target were expected. Summarise each alone."
        )
    judges = {score.judge: score for score in scores}
    if len(judges) > 1:
        named = "; ".join(sorted(name or "EndoPhantom" for name in judges))
        raise MedSteerError(f"summarise got pairs judged by {named}; one judge was expected. Summarise each alone.")
    by = next(iter(judges.values()), None)
    foreign = by is not None and by.judge is not None
    kept = [score for score in scores if score.accepted]
    gone = [score for score in kept if score.finding_gone]
    removes = by.removes if foreign else bool(pairs) and bool(only_in(*pairs[0]))
    structure = by.structure if foreign else structure_measure(*pairs[0]) if pairs else None
    measured = [score for score in kept if score.distance is not None]
    masked = [score for score in kept if score.finding_left is not None]
    record = {
        "n": len(scores),
        "accepted": len(kept),
        "flips": sum(score.flipped for score in kept),
        **_rate("flip_rate", [score.flipped for score in kept]),
        **_rate("finding_gone", [score.finding_gone for score in kept if removes]),
        **_rate("finding_kept", [score.finding_kept for score in gone]),
        **_rate("finding_added", [score.finding_added for score in kept]),
        "structure": structure,
        "ssim_outside_n": sum(score.ssim_outside is not None for score in kept),
        "distance": mean([score.distance[1] for score in measured]),
        "over_distance_limit": mean(["distance" in score.misses for score in measured]),
        "over_mask_limit": mean(["mask" in score.misses for score in masked]),
        "identical": sum(score.identical for score in kept),
    }
    for name in ("ssim_outside", "psnr_outside", "anatomy_drift", *_MEANS):
        values = [getattr(score, name) for score in kept if getattr(score, name) is not None]
        record[name] = mean(values)
        if name not in _MEANS:
            record[f"{name}_interval"] = bootstrap(values)
    if foreign:
        record |= {"judge": by.judge, "not_judged": by.not_judged}
    return {name: rounded(value) for name, value in record.items()}


_MEANS = ("off_target_drift", "finding_before", "finding_after", "finding_left", "kept_overlap", "mask_fraction")
_MEANS += ("changed_fraction", "ssim")


def _checked_classes(source: str, target: str, terms: Terms) -> tuple[str, str]:
    """Source and target as the judge calls them."""
    source, target = terms.class_named(source, "source"), terms.class_named(target, "target")
    if source == target:
        raise MedSteerError(f"source and target are both '{source}'; two different classes were expected.")
    return source, target


def _rate(name: str, values: list[bool | None]) -> dict[str, Any]:
    """A share and its interval, over the values that are not None."""
    known = [value for value in values if value is not None]
    return {name: mean(known), f"{name}_interval": wilson(sum(known), len(known))}
