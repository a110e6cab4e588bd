"""Evaluate counterfactual pairs and their controls: one report for the node and for the command.

`scored` asks the judge about one pair (always about one, so that a pair's numbers do not depend on its neighbours), and
`report` makes one record for JSON of many. All numbers of a pair are `evaluate.score_pairs`'s, all rates and intervals
`evaluate.summarise`'s; here they are put side by side, arm by arm, with what each control should show.

    python -m medsteer_core.evaluation output/medsteer/pairs    (`command`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..dataset.records import ARMS, COUNTERFACTUAL, RANDOM, REPROMPT, STRENGTH_ZERO
from ..errors import MedSteerError
from ..intervals import bootstrap
from ..judges.judge import Judge, doubt_about
from ..scores.images import mean
from ..scores.lpips import load_lpips
from ..scores.pair import PairScore, rounded, structure_measure
from ..scores.scorer import score_pairs, summarise
from ..scores.verdict import classes_doubt

# A pixel is of the finding from here on, by where the mask comes from: a map's is the structure lock's own.
MASK_FROM = {"concept map": 0.2, "prediction difference": 0.2, "user": 0.5, "segmenter": 0.5}
SEGMENTER, NO_MASK = "segmenter", "none"
INPUTS = {STRENGTH_ZERO: "strength_0", RANDOM: "random_direction", REPROMPT: "reprompted"}  # the node's, by arm
EXPECTED = {
    COUNTERFACTUAL: "flips often, keeps the rest",
    STRENGTH_ZERO: "every image identical to its factual",
    RANDOM: "flips less often than the counterfactual",
    REPROMPT: "keeps less of the rest than the counterfactual",
}
AS_EXPECTED, NOT_AS_EXPECTED, UNDECIDED = "as expected", "not as expected", "undecided"


@dataclass(frozen=True)
class Scored:
    """One pair of one arm: its score, LPIPS of the whole images (None where not measured), where its mask came from,
    and the largest difference of any pixel, in 0..1."""

    arm: str
    name: str
    score: PairScore
    lpips: float | None
    mask_source: str
    largest: float = 0.0

    @property
    def target_change(self) -> float:
        """How far the judge's probability of the target class went up."""
        before, after = self.score.target_probability
        return after - before

    def to_dict(self) -> dict[str, Any]:
        """The pair for JSON."""
        own = {"target_change": rounded(self.target_change), "lpips": rounded(self.lpips)}
        return {"arm": self.arm, "pair": self.name, **own, "mask_source": self.mask_source, **self.score.to_dict()}


def scored(
    factual: Tensor,
    counterfactual: Tensor,
    source: str,
    target: str,
    judge: Judge,
    *,
    arm: str = COUNTERFACTUAL,
    name: str = "1",
    mask: Tensor | None = None,
    mask_source: str = "user",
    lpips: Callable[[Tensor, Tensor], float | None] | None = None,
) -> Scored:
    """One pair ``(3, H, W)`` in 0..1 scored. ``mask (H, W)`` in 0..1 counts where the judge marks no findings; it comes
    from ``mask_source``, a key of `MASK_FROM`. MedSteerError for what does not fit."""
    given = None if mask is None else _finding(mask, factual, mask_source)[None]
    if factual.ndim != 3 or counterfactual.ndim != 3:
        shapes = f"{tuple(factual.shape)} and {tuple(counterfactual.shape)}"
        raise MedSteerError(f"a pair has images of shape {shapes}; (3, height, width) was expected of both.")
    # networks sum in another order where the same pixels lie otherwise in memory, which shows in the last digits
    factual, counterfactual = factual.contiguous(), counterfactual.contiguous()
    (score,) = score_pairs(factual[None], counterfactual[None], source, target, judge, given)
    marked = score.finding_before is not None
    used = SEGMENTER if marked else mask_source if given is not None else NO_MASK
    distance = lpips(factual.clamp(0, 1), counterfactual.clamp(0, 1)) if lpips else None
    return Scored(arm, name, score, distance, used, float((factual - counterfactual).abs().max()))


def evaluate_batches(
    factuals: Tensor,
    arms: Mapping[str, Tensor],
    source: str,
    target: str,
    judge: Judge,
    *,
    mask: Tensor | None = None,
    mask_source: str = "user",
    after_each: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """`report` of factual images ``(n, 3, H, W)`` and of each arm's, as many; ``mask`` is (1 or n, h, w) in 0..1.

    ``after_each`` is called after each pair. MedSteerError for counts, sizes and classes that do not fit.
    """
    count = len(factuals)
    for arm, images in arms.items():
        if len(images) != count or not count:
            raise MedSteerError(
                f"{INPUTS.get(arm, arm)} has {len(images)} images and factual {count}; one for each factual image was "
                "expected. Strength Sweep compares several strengths of one factual."
            )
    if mask is not None and (mask.ndim != 3 or len(mask) not in (1, count)):
        raise MedSteerError(
            f"mask has shape {tuple(mask.shape)}; (1 or {count}, height, width) was expected: one, or one for each "
            "factual image."
        )
    lpips, missing = load_lpips()
    pairs = []
    for arm, images in arms.items():
        for index in range(count):
            own = None if mask is None else mask[index % len(mask)]
            more = {"arm": arm, "name": str(index + 1), "mask": own, "mask_source": mask_source, "lpips": lpips}
            pairs.append(scored(factuals[index], images[index], source, target, judge, **more))
            after_each()
    return report(pairs, judge, [missing] if missing else [])


def _finding(mask: Tensor, image: Tensor, mask_source: str) -> Tensor:
    """A mask as (H, W) bool at the image's size."""
    if mask_source not in MASK_FROM:
        raise MedSteerError(f"mask_source is '{mask_source}'; one of {', '.join(MASK_FROM)} was expected.")
    if mask.ndim != 2 or 0 in mask.shape:
        raise MedSteerError(f"the mask has shape {tuple(mask.shape)}; (height, width) was expected.")
    size = tuple(image.shape[-2:])
    sized = F.interpolate(mask[None, None].float().cpu(), size=size, mode="nearest-exact")[0, 0]
    return sized >= MASK_FROM[mask_source]


def report(pairs: Iterable[Scored], judge: Judge, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Pairs of one source and target class as one record for JSON; ``notes`` says what was not measured and why.

    ``arms`` has a record for each arm: `summarise`'s (all numbers but ``n`` and ``accepted`` are over the accepted
    pairs: those whose factual the judge calls the source class), ``target_change`` and ``lpips`` with bootstrap
    intervals, ``kept`` (the arm's value of the ``structure`` measure), what a control should show and whether it does.
    ``null_test`` is over all pairs of strength 0, its ``largest_difference`` of any pixel in 0..1.

    MedSteerError without pairs and for several sources or targets.
    """
    by_arm: dict[str, list[Scored]] = {}
    for pair in pairs:
        by_arm.setdefault(pair.arm, []).append(pair)
    if not by_arm:
        raise MedSteerError("There are no pairs to evaluate; one or more were expected.")
    order = sorted(by_arm, key=lambda arm: (ARMS.index(arm) if arm in ARMS else len(ARMS), arm))
    every = [pair for arm in order for pair in by_arm[arm]]
    summarise([pair.score for pair in every])  # refuses several sources, targets and judges
    measure = _structure(every)
    arms = [_arm(arm, by_arm[arm], measure) for arm in order]
    reference = next((arm for arm in arms if arm["arm"] == COUNTERFACTUAL), None)
    for arm in arms:
        arm |= _verdict(arm, reference, measure)
    zero = by_arm.get(STRENGTH_ZERO, [])
    same = sum(pair.score.identical for pair in zero)
    sources = sorted({pair.mask_source for pair in every})
    asked = classes_doubt(every[0].score.source, [pair.score.factual_label for pair in every])
    doubts = filter(None, [doubt_about(judge), asked])
    return {
        "judge": judge.identity,
        "source": every[0].score.source,
        "target": every[0].score.target,
        "mask_source": " + ".join(sources),
        "structure": measure,
        "null_test": {
            "passed": same == len(zero) if zero else None,
            "pairs": len(zero),
            "identical": same,
            "largest_difference": max((pair.largest for pair in zero), default=None),
        },
        "arms": arms,
        "notes": [*doubts, *notes, *(f"Not judged: {part}." for part in every[0].score.not_judged)],
        "pairs": [pair.to_dict() for pair in every],
    }


def _arm(arm: str, pairs: Sequence[Scored], measure: str) -> dict[str, Any]:
    kept = [pair for pair in pairs if pair.score.accepted]
    record = {"arm": arm, **summarise([pair.score for pair in pairs])}
    record["identical_of_all"] = sum(pair.score.identical for pair in pairs)
    columns = {
        "target_change": [pair.target_change for pair in kept],
        "off_target_drift": [pair.score.off_target_drift for pair in kept],
        "lpips": [pair.lpips for pair in kept if pair.lpips is not None],
        "kept": [value for pair in kept if (value := getattr(pair.score, measure)) is not None],
    }
    for name, values in columns.items():
        interval = rounded(bootstrap(values))
        record |= {name: rounded(mean(values)), f"{name}_interval": interval, f"{name}_n": len(values)}
    return record


def _structure(pairs: Sequence[Scored]) -> str:
    """The number that says how well structure was kept: the judge's, or SSIM of the whole image where it has none."""
    first = pairs[0].score
    wanted = first.structure if first.judge else structure_measure(first.source, first.target)
    return wanted if wanted and any(getattr(pair.score, wanted) is not None for pair in pairs) else "ssim"


def _verdict(arm: dict[str, Any], reference: dict[str, Any] | None, measure: str) -> dict[str, Any]:
    """What an arm should show, and whether it does: by intervals that do not overlap, else undecided."""
    found = {"expected": EXPECTED.get(arm["arm"], ""), "verdict": None}
    if arm["arm"] == STRENGTH_ZERO:
        found["verdict"] = AS_EXPECTED if arm["identical_of_all"] == arm["n"] else NOT_AS_EXPECTED
    elif arm["arm"] in (RANDOM, REPROMPT):
        found["verdict"] = UNDECIDED
        if reference is not None and arm["accepted"] and reference["accepted"]:
            name = "flip_rate" if arm["arm"] == RANDOM else "kept"
            # of every measure but a drift, more is better
            sign = -1 if name == "kept" and measure == "anatomy_drift" else 1
            both = reference[f"{name}_interval"], arm[f"{name}_interval"]
            found["verdict"] = _above(*both) if sign > 0 else _above(*reversed(both))
    return found


def _above(high: Sequence[float] | None, low: Sequence[float] | None) -> str:
    """Whether the first interval lies above the second, as it should."""
    if high is None or low is None:
        return UNDECIDED
    return AS_EXPECTED if high[0] > low[1] else NOT_AS_EXPECTED if high[1] < low[0] else UNDECIDED
