"""The score of a pair: its criteria and limits, and how the judges' verdict and the pixels become its numbers.

Nothing here asks a judge or draws anything; `evaluate` does, and checks what it is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .endophantom.judges import LABELS, Verdict
from .endophantom.judges import SIZE as JUDGE_SIZE
from .endophantom.phantom import FINDINGS
from .image_pairs import SSIM_WINDOW, changed, psnr, ssim_map
from .regions import dilated, lit_field, mean_where, overlap, share, share_of

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
# From here on an image is unlike any render: 1 is the 99th percentile of held-out renders (`judges.Distance`).
DISTANCE_LIMIT = 1.0
# With more of the field masked than this, too little is outside for a fair number: there is none, and no flip.
MASK_LIMIT = 0.4
# The segmenter sees 64x64 pixels; its edges are uncertain by about two of them.
MASK_MARGIN = 2 / JUDGE_SIZE
# What a pair can miss to be a flip, in the order of `PairScore.misses`.
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
    ``outside_fraction`` of the picture. They are None where the masks cover too much: ``mask_fraction`` is the share of
    the factual's lit field (not of the picture) under either mask, without the margin. ``anatomy_drifts`` are the
    regressed factors' absolute differences in held-out errors, in the order of `Judges.factors`, ``anatomy_drift``
    their mean. ``off_target_drift`` is the sum of probability changes of all labels but source and target.
    """

    source: str
    target: str
    factual_label: str
    counterfactual_label: str
    source_probability: tuple[float, float]
    target_probability: tuple[float, float]
    distance: tuple[float, float]
    finding_before: float
    finding_after: float
    finding_left: float
    finding_gone: bool
    finding_kept: bool | None
    kept_overlap: float | None
    finding_added: bool | None
    accepted: bool
    flipped: bool
    misses: tuple[str, ...]
    ssim_outside: float | None
    psnr_outside: float | None
    mask_fraction: float
    outside_fraction: float
    anatomy_drift: float
    anatomy_drifts: tuple[float, ...]
    off_target_drift: float
    ssim: float
    changed_fraction: float
    identical: bool

    def to_dict(self) -> dict[str, Any]:
        """The score for JSON, numbers rounded to four decimals."""
        return {name: rounded(value) for name, value in asdict(self).items()}


def scores_of(a: Tensor, b: Tensor, verdict: Verdict, source: str, target: str) -> list[PairScore]:
    """Scores of pairs ``a``, ``b (n, 3, H, W)`` in 0..1, given the judges' verdict on all ``2n`` images, ``a`` first.

    Classes and images are taken as they are; `evaluate` checks them.
    """
    before, after = _halves(verdict)
    columns = _labels(before, after, source, target) | _findings(before, after, source, target)
    columns |= _structure(a, b, before, after, source, target)
    columns["misses"] = [_missed(*row, target) for row in zip(*(columns[name] for name in _DECIDING), strict=True)]
    columns["flipped"] = [not missed for missed in columns["misses"]]
    rows = zip(*columns.values(), strict=True)
    return [PairScore(source=source, target=target, **dict(zip(columns, row, strict=True))) for row in rows]


def structure_measure(source: str, target: str) -> str:
    """The number that says how well structure was kept: ``anatomy_drift`` where a diffuse finding comes or goes,
    ``ssim_outside`` elsewhere."""
    changing = set(FINDINGS_OF[source]) ^ set(FINDINGS_OF[target])
    return "anatomy_drift" if changing & set(DIFFUSE) else "ssim_outside"


def _missed(
    label: str, left: float, added: bool | None, distance: tuple[float, float], outside: float | None, target: str
) -> tuple[str, ...]:
    """The criteria that a counterfactual does not meet."""
    # "not below" instead of "above": a distance that is not a number is no render's
    found = (
        label != target,
        left >= FINDING_LEFT_LIMIT,
        added is False,
        not distance[1] < DISTANCE_LIMIT,
        outside is None,
    )
    return tuple(name for name, missed in zip(CRITERIA, found, strict=True) if missed)


def _labels(before: Verdict, after: Verdict, source: str, target: str) -> dict[str, list]:
    """What the classifier, its distance and the regressors say."""
    rest = [i for i, label in enumerate(LABELS) if label not in (source, target)]
    drifts = (after.anatomy - before.anatomy).abs()
    near = (before.distances < DISTANCE_LIMIT).tolist()
    return {
        "factual_label": before.labels,
        "counterfactual_label": after.labels,
        "source_probability": _both(before.probability(source), after.probability(source)),
        "target_probability": _both(before.probability(target), after.probability(target)),
        "distance": _both(before.distances, after.distances),
        # a factual unlike any render is not of the source class, whatever the classifier must call it
        "accepted": [label == source and close for label, close in zip(before.labels, near, strict=True)],
        "anatomy_drift": drifts.mean(1).tolist(),
        "anatomy_drifts": [tuple(row) for row in drifts.tolist()],
        "off_target_drift": (after.probabilities - before.probabilities)[:, rest].abs().sum(1).tolist(),
    }


def _findings(before: Verdict, after: Verdict, source: str, target: str) -> dict[str, list]:
    """What the segmenter says of findings that should go, stay and come."""
    shared = [name for name in FINDINGS_OF[source] if name in FINDINGS_OF[target]]
    new, n = only_in(target, source), len(after.masks)
    shares = {name: share(_union(after, [name])) for name in FINDINGS}
    removed = [shares[name] for name in only_in(source, target)]

    def found(names: Iterable[str]) -> list[bool]:
        return [all(shares[name][item] >= FINDING_FOUND_LIMIT for name in names) for item in range(n)]

    return {
        "finding_before": share(_union(before, FINDINGS_OF[source])),
        "finding_after": share(_union(after, FINDINGS_OF[source])),
        "finding_left": share(_union(after, [name for name in FINDINGS if name not in FINDINGS_OF[target]])),
        "finding_gone": [all(of[item] < FINDING_LEFT_LIMIT for of in removed) for item in range(n)],
        "finding_kept": found(shared) if shared else [None] * n,
        "kept_overlap": overlap(_union(before, shared), _union(after, shared)),
        "finding_added": found(new) if new else [None] * n,
    }


def _structure(a: Tensor, b: Tensor, before: Verdict, after: Verdict, source: str, target: str) -> dict[str, list]:
    """What changed in the pixels, over the whole picture and outside the findings."""
    # Only findings the pair is about are left out: an artefact that looks like another one counts as damage.
    concerned = (*FINDINGS_OF[source], *FINDINGS_OF[target])
    masks = _union(before, concerned) | _union(after, concerned)
    covered = share_of(masks, lit_field(a))
    outside = ~dilated(masks, round(MASK_MARGIN * min(a.shape[-2:])) + SSIM_WINDOW // 2)
    fair = outside & (torch.tensor(covered) <= MASK_LIMIT).view(-1, 1, 1)
    ssim, square = ssim_map(a, b), (a - b).square().mean(1)
    return {
        "ssim_outside": [mean_where(*item) for item in zip(ssim, fair, strict=True)],
        "psnr_outside": [psnr(mean_where(*item)) for item in zip(square, fair, strict=True)],
        "mask_fraction": covered,
        "outside_fraction": share(outside),
        "ssim": ssim.mean((1, 2)).tolist(),
        "changed_fraction": changed((a - b).abs()).tolist(),
        "identical": [torch.equal(*pair) for pair in zip(a, b, strict=True)],
    }


def only_in(first: str, second: str) -> list[str]:
    """The findings that class ``first`` has and ``second`` lacks."""
    return [name for name in FINDINGS_OF[first] if name not in FINDINGS_OF[second]]


def _halves(verdict: Verdict) -> tuple[Verdict, Verdict]:
    """A verdict on factuals and counterfactuals, in two."""
    parts = {field.name: getattr(verdict, field.name).chunk(2) for field in fields(verdict)}
    return tuple(replace(verdict, **{name: part[half] for name, part in parts.items()}) for half in (0, 1))


def _union(verdict: Verdict, findings: Iterable[str]) -> Tensor:
    """Where any of ``findings`` is, (n, H, W) bool."""
    return (verdict.masks[:, [FINDINGS.index(name) for name in findings]] > 0.5).any(1)


def _both(before: Tensor, after: Tensor) -> list[tuple[float, float]]:
    return list(zip(before.tolist(), after.tolist(), strict=True))


def rounded(value: Any) -> Any:
    """A value for JSON, which has no infinity and no tuples."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return [rounded(item) for item in value] if isinstance(value, tuple) else value
