"""The score of a pair: its criteria and limits, and how the judges' opinion and the pixels become its numbers.

Nothing here asks a judge or draws anything; `evaluate` does, and checks what it is given. The limits here are those of
EndoPhantom's judges; a judge from files has its own terms.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..endophantom.judges import LABELS
from ..endophantom.judges import SIZE as JUDGE_SIZE
from ..endophantom.phantom import CLASSES, FINDINGS
from ..judges.judge import Answers, Opinion, Terms
from .images import ssim_map
from .parts import (
    DISTANCE_LIMIT,
    FINDING_NUMBERS,
    OUTSIDE_NUMBERS,
    finding_masks,
    findings,
    halves,
    labels,
    nothing,
    outside,
    pixels,
)

FINDINGS_OF: dict[str, tuple[str, ...]] = {
    "dyed lifted polyps": ("polyp", "dye"),
    "dyed resection margins": ("dye", "resection"),
    "esophagitis": ("streaks",),
    "normal cecum": (),
    "normal pylorus": (),
    "normal z-line": (),
    "polyps": ("polyp",),
    "ulcerative colitis": ("erosions",),
}
# Findings that change the whole wall (vessels vanish in colitis), so that pixels outside their mask change with them.
DIFFUSE = ("erosions",)
# A counterfactual is no flip while findings that the target lacks cover this share of the picture or more.
FINDING_LEFT_LIMIT = 0.003
# A finding is there from this share of the picture on: half of what the smallest in renders covers (0.02).
FINDING_FOUND_LIMIT = 0.01
# The segmenter sees 64x64 pixels; its edges are uncertain by about two of them.
MASK_MARGIN = 2 / JUDGE_SIZE
ENDOPHANTOM = Terms(
    labels=LABELS,
    classes=CLASSES,
    findings=FINDINGS,
    findings_of=FINDINGS_OF,
    diffuse=DIFFUSE,
    left_limit=FINDING_LEFT_LIMIT,
    found_limit=FINDING_FOUND_LIMIT,
    mask_margin=MASK_MARGIN,
)
# What a pair can miss to be a flip, in the order of `PairScore.misses`.
UNNAMED = "a judge without a name"  # answers only a part and says no identity
CRITERIA = ("label", "finding left", "finding not added", "distance", "mask")
_DECIDING = ("counterfactual_label", "finding_left", "finding_added", "distance", "ssim_outside")


@dataclass(frozen=True)
class PairScore:
    """How one pair fared. Shares are of the picture's pixels unless said otherwise, PSNR in dB, pairs of numbers are
    (factual, counterfactual).

    ``distance`` from renders, 1 at the limit. ``finding_before`` and ``finding_after`` are the shares the segmenter
    marks as a finding of the source class, ``finding_left`` the counterfactual's share with a finding that the target
    class does not have. Of the findings, those of the source alone are all gone (``finding_gone``; true where there is
    none to remove), those of both are all still there (``finding_kept``, and ``kept_overlap``, their intersection over
    union with the factual's), those of the target alone are all there (``finding_added``); None where there are none.

    ``accepted``: the factual is of the source class and like a render. ``flipped``: ``misses``, the criteria of
    `CRITERIA` that the counterfactual does not meet, is empty.

    The ``outside`` numbers are over the pixels whose SSIM window lies clear of both images' masks and a margin: over
    ``outside_fraction`` of the picture. (Where the judge marks no findings, of the mask that was given.) They are None
    where the masks cover too much: ``mask_fraction`` is the share of the factual's lit field (not of the picture) under
    either mask, without the margin. ``anatomy_drifts`` are the regressed factors' absolute differences in held-out
    errors, in the order of `Judges.factors`, ``anatomy_drift`` their mean. ``off_target_drift`` is the sum of
    probability changes of all labels but source and target.

    The last four are of judges from files and None or empty for EndoPhantom's: ``judge``, the judge's identity;
    ``not_judged``, each part that it could not judge and why, in words: the numbers of such a part are None, its
    criteria are not among ``misses``, and ``accepted`` and ``flipped`` say nothing of it; ``removes``, whether a
    finding should go; ``structure``, the number that says how well structure was kept. The last two are None where
    that is unknown.
    """

    source: str
    target: str
    factual_label: str
    counterfactual_label: str
    source_probability: tuple[float, float]
    target_probability: tuple[float, float]
    distance: tuple[float, float] | None
    finding_before: float | None
    finding_after: float | None
    finding_left: float | None
    finding_gone: bool | None
    finding_kept: bool | None
    kept_overlap: float | None
    finding_added: bool | None
    accepted: bool
    flipped: bool
    misses: tuple[str, ...]
    ssim_outside: float | None
    psnr_outside: float | None
    mask_fraction: float | None
    outside_fraction: float | None
    anatomy_drift: float | None
    anatomy_drifts: tuple[float, ...] | None
    off_target_drift: float
    ssim: float
    changed_fraction: float
    identical: bool
    judge: str | None = None
    not_judged: tuple[str, ...] = ()
    removes: bool | None = None
    structure: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The score for JSON, numbers rounded to four decimals; EndoPhantom's without what tells of the judge."""
        left_out = () if self.judge else _OF_THE_JUDGE
        return {name: rounded(value) for name, value in asdict(self).items() if name not in left_out}


_OF_THE_JUDGE = ("judge", "not_judged", "removes", "structure")


def scores_of(
    a: Tensor,
    b: Tensor,
    opinion: Opinion,
    source: str,
    target: str,
    terms: Terms = ENDOPHANTOM,
    identity: str | None = None,
    given: Tensor | None = None,
) -> list[PairScore]:
    """Scores of pairs ``a``, ``b (n, 3, H, W)`` in 0..1, given the judge's opinion of all ``2n`` images, ``a`` first,
    in its ``terms``. ``identity`` is of a judge from files; ``given (n, H, W)`` bool are masks for pairs in which it
    marks no findings.

    Classes and images are taken as they are; `evaluate` checks them.
    """
    before, after = halves(opinion)
    found = before.masks is not None and not terms.unknown_findings((source, target))
    columns = labels(before, after, source, target, terms)
    columns |= findings(before, after, source, target, terms) if found else nothing(len(a), FINDING_NUMBERS)
    ssim = ssim_map(a, b)
    columns |= pixels(a, b, ssim)
    masks = finding_masks(before, after, source, target, terms) if found else given
    columns |= nothing(len(a), OUTSIDE_NUMBERS) if masks is None else outside(a, b, ssim, masks, terms)
    deciding = zip(*(columns[name] for name in _DECIDING), strict=True)
    columns["misses"] = [_missed(*row, target, terms) for row in deciding]
    columns["flipped"] = [not missed for missed in columns["misses"]]
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    silent = None in (before.masks, before.distances, before.anatomy)
    masked = masks is not None
    named = identity or UNNAMED
    record = _of_the_judge(before, source, target, terms, named, found, masked) if identity or silent else {}
    return [PairScore(source=source, target=target, **row, **record) for row in rows]


def structure_measure(source: str, target: str) -> str:
    """`Terms.structure_measure` of EndoPhantom's classes."""
    return ENDOPHANTOM.structure_measure(source, target)


def only_in(first: str, second: str) -> list[str]:
    """`Terms.only_in` of EndoPhantom's classes."""
    return ENDOPHANTOM.only_in(first, second)


def _of_the_judge(
    opinion: Answers, source: str, target: str, terms: Terms, identity: str, found: bool, masked: bool
) -> dict[str, Any]:
    """What a score says of its judge: which it is, what it could not judge and why."""
    missing = []
    unmarked = "findings" if masked else "findings and the outside of them"
    if opinion.masks is None:
        missing.append(f"{unmarked}: the judge has no segmenter")
    elif not found:
        names = ", ".join(f"'{name}'" for name in terms.unknown_findings((source, target)))
        missing.append(f"{unmarked}: the judge's segmenter does not mark what {names} shows")
    if opinion.distances is None:
        missing.append("distance: the judge does not tell how unlike its training images an image is")
    if opinion.anatomy is None:
        missing.append("anatomy: the judge has no regressors of the anatomy")
    structure = terms.structure_measure(source, target) if found else "ssim_outside" if masked else None
    if structure == "anatomy_drift" and opinion.anatomy is None:
        structure = None
    removes = bool(terms.only_in(source, target)) if found else None
    return {"judge": identity, "not_judged": tuple(missing), "removes": removes, "structure": structure}


def _missed(
    label: str,
    left: float | None,
    added: bool | None,
    distance: tuple[float, float] | None,
    outside: float | None,
    target: str,
    terms: Terms,
) -> tuple[str, ...]:
    """The criteria that a counterfactual does not meet; what was not judged is None and no miss."""
    # "not below" instead of "above": a distance that is not a number is no render's
    found = (
        label != target,
        left is not None and left >= terms.left_limit,
        added is False,
        distance is not None and not distance[1] < DISTANCE_LIMIT,
        left is not None and outside is None,
    )
    return tuple(name for name, missed in zip(CRITERIA, found, strict=True) if missed)


def rounded(value: Any) -> Any:
    """A value for JSON, which has no infinity and no tuples."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return [rounded(item) for item in value] if isinstance(value, tuple) else value
