"""Score pairs of a factual and a counterfactual image: the one place, for node, benchmark and dataset report alike.

`score_pair` asks EndoPhantom's judges whether the finding went and measures how well everything outside the finding was
kept. What needs no judge and fits any two images is in `image_pairs`.

    score = score_pair(factual, counterfactual, "polyps", "normal cecum")
    score.flipped, score.ssim_outside
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .endophantom.judges import SIZE as JUDGE_SIZE
from .endophantom.judges import Verdict
from .endophantom.phantom import CLASSES, FINDINGS
from .errors import MedSteerError
from .image_pairs import SSIM_WINDOW, changed, checked_pair, mean, psnr, ssim_map

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
# A counterfactual is no flip while a finding that the target lacks covers this share of the picture or more.
FINDING_LEFT_LIMIT = 0.003
# With more of the picture masked than this, too little is outside for a fair number: there is none.
MASK_LIMIT = 0.4
# The segmenter sees 64x64 pixels; its edges are uncertain by about two of them.
MASK_MARGIN = 2 / JUDGE_SIZE
_RESAMPLES = 2000

JudgesLike = Callable[[Tensor], Verdict]


@dataclass(frozen=True)
class PairScore:
    """How one pair fared. Shares are of the picture's pixels, PSNR in dB, probabilities as (factual, counterfactual).

    ``finding_before`` and ``finding_after`` are the shares that the segmenter marks as a finding of the source class,
    ``finding_left`` the counterfactual's share with a finding that the target class does not have. The ``outside``
    numbers leave out ``mask_fraction`` of the picture (both images' findings with a margin) and every pixel whose SSIM
    window touches it; they are None where that covers too much.
    """

    source: str
    target: str
    factual_label: str
    counterfactual_label: str
    source_probability: tuple[float, float]
    target_probability: tuple[float, float]
    finding_before: float
    finding_after: float
    finding_left: float
    accepted: bool
    flipped: bool
    ssim_outside: float | None
    psnr_outside: float | None
    mask_fraction: float
    ssim: float
    changed_fraction: float
    identical: bool

    def to_dict(self) -> dict[str, Any]:
        """The score for JSON, numbers rounded to four decimals."""
        return {name: _rounded(value) for name, value in asdict(self).items()}


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
    verdict = (judges or embedded_judges())(torch.cat([a, b]))
    before, after = (Verdict(p, m) for p, m in zip(verdict.probabilities.chunk(2), verdict.masks.chunk(2), strict=True))
    lacking = [name for name in FINDINGS if name not in FINDINGS_OF[target]]
    left = _share(_union(after, lacking))
    # Only findings the pair is about are left out: an artefact that looks like another one counts as damage.
    concerned = (*FINDINGS_OF[source], *FINDINGS_OF[target])
    mask = _dilated(_union(before, concerned) | _union(after, concerned), round(MASK_MARGIN * min(a.shape[-2:])))
    ssim, square = ssim_map(a, b), (a - b).square().mean(1)
    outside = ~_dilated(mask, SSIM_WINDOW // 2)
    columns = {
        "factual_label": before.labels,
        "counterfactual_label": after.labels,
        "source_probability": _both(before, after, source),
        "target_probability": _both(before, after, target),
        "finding_before": _share(_union(before, FINDINGS_OF[source])),
        "finding_after": _share(_union(after, FINDINGS_OF[source])),
        "finding_left": left,
        "accepted": [label == source for label in before.labels],
        "flipped": [
            label == target and share < FINDING_LEFT_LIMIT for label, share in zip(after.labels, left, strict=True)
        ],
        "mask_fraction": _share(mask),
        "ssim_outside": [_mean_where(*item) for item in zip(ssim, outside, mask, strict=True)],
        "psnr_outside": [psnr(_mean_where(*item)) for item in zip(square, outside, mask, strict=True)],
        "ssim": ssim.mean((1, 2)).tolist(),
        "changed_fraction": changed((a - b).abs()).tolist(),
        "identical": [torch.equal(*pair) for pair in zip(a, b, strict=True)],
    }
    rows = zip(*columns.values(), strict=True)
    return [PairScore(source=source, target=target, **dict(zip(columns, row, strict=True))) for row in rows]


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


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927): of ``successes`` in ``n``. (0, 1) for n = 0."""
    if not 0 <= successes <= n or not 0 < confidence < 1:
        raise MedSteerError(
            f"wilson got {successes} successes of {n} at confidence {confidence}; expected 0 <= successes <= n and a "
            "confidence between 0 and 1."
        )
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, scale = successes / n, 1 + z * z / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # at the ends the interval touches 0 and 1 exactly; rounding must not leave it a hair short
    low = 0.0 if successes == 0 else (middle - half) / scale
    return low, 1.0 if successes == n else (middle + half) / scale


def summarise(scores: Iterable[PairScore]) -> dict[str, Any]:
    """Many pairs as one record for JSON, intervals at 95%.

    All numbers but ``n`` and ``accepted`` are over accepted pairs: what was never the source class cannot be flipped.
    A mean is None where no pair has the number; ``ssim_outside_n`` says how many had one.
    """
    scores = list(scores)
    kept = [score for score in scores if score.accepted]
    flips = sum(score.flipped for score in kept)
    outside = [score.ssim_outside for score in kept if score.ssim_outside is not None]
    record = {
        "n": len(scores),
        "accepted": len(kept),
        "flips": flips,
        "flip_rate": flips / len(kept) if kept else None,
        "flip_rate_interval": wilson(flips, len(kept)),
        "ssim_outside": mean(outside),
        "ssim_outside_interval": _bootstrap(outside),
        "ssim_outside_n": len(outside),
        "identical": sum(score.identical for score in kept),
    }
    for name in ("psnr_outside", "finding_before", "finding_after", "finding_left", "changed_fraction", "ssim"):
        record[name] = mean([getattr(score, name) for score in kept if getattr(score, name) is not None])
    return {name: _rounded(value) for name, value in record.items()}


def _check_classes(source: str, target: str) -> None:
    for role, name in (("source", source), ("target", target)):
        if name not in CLASSES:
            raise MedSteerError(f"the {role} class is '{name}'; one of these was expected: {', '.join(CLASSES)}.")
    if source == target:
        raise MedSteerError(f"source and target are both '{source}'; two different classes were expected.")


def _union(verdict: Verdict, findings: Iterable[str]) -> Tensor:
    """Where any of ``findings`` is, (n, H, W) bool."""
    channels = [FINDINGS.index(name) for name in findings]
    return verdict.masks[:, channels].bool().any(1)


def _share(mask: Tensor) -> list[float]:
    return mask.float().mean((1, 2)).tolist()


def _both(before: Verdict, after: Verdict, label: str) -> list[tuple[float, float]]:
    return list(zip(before.probability(label).tolist(), after.probability(label).tolist(), strict=True))


def _dilated(mask: Tensor, reach: int) -> Tensor:
    """A mask (n, H, W) grown by a square of ``reach`` pixels each way."""
    return F.max_pool2d(mask[:, None].float(), 2 * reach + 1, 1, reach)[:, 0] > 0


def _mean_where(values: Tensor, outside: Tensor, mask: Tensor) -> float | None:
    """Mean of ``values`` over ``outside``; None when ``mask`` covers too much or nothing is outside."""
    if mask.float().mean() > MASK_LIMIT or not outside.any():
        return None
    return values[outside].mean().item()


def _bootstrap(values: list[float]) -> tuple[float, float] | None:
    """95% percentile interval of the mean, resampled with a fixed seed."""
    if not values:
        return None
    picks = torch.randint(len(values), (_RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    means = torch.tensor(values, dtype=torch.float64)[picks].mean(1)
    return tuple(means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist())


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    return [_rounded(item) for item in value] if isinstance(value, tuple) else value
