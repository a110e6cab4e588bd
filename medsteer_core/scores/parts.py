"""The parts of a pair's score, each a table of columns: what the classifier, the segmenter and the pixels say.

``before`` and ``after`` are a judge's answers on factuals and counterfactuals, ``source`` and ``target`` classes of its
``terms``. A column has one value a pair, under the name that it has in `PairScore`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..judges.judge import Answers, Opinion, Terms
from .images import SSIM_WINDOW, changed, psnr
from .regions import dilated, lit_field, mean_where, overlap, share, share_of

# From here on an image is unlike any render: 1 is the 99th percentile of held-out renders (`judges.Distance`).
DISTANCE_LIMIT = 1.0
# With more of the field masked than this, too little is outside for a fair number: there is none, and no flip.
MASK_LIMIT = 0.4
FINDING_NUMBERS = ("finding_before", "finding_after", "finding_left", "finding_gone", "finding_kept", "kept_overlap")
FINDING_NUMBERS += ("finding_added",)
OUTSIDE_NUMBERS = ("ssim_outside", "psnr_outside", "mask_fraction", "outside_fraction")


def labels(before: Answers, after: Answers, source: str, target: str, terms: Terms) -> dict[str, list]:
    """What the classifier, its distance and the regressors say."""
    n, names = len(before.probabilities), terms.labels
    factual, counterfactual = ([names[i] for i in of.probabilities.argmax(1)] for of in (before, after))
    rest = [i for i, label in enumerate(names) if label not in (source, target)]

    def probability(label: str) -> list[tuple[float, float]]:
        return _both(*(of.probabilities[:, names.index(label)] for of in (before, after)))

    near = [True] * n if before.distances is None else (before.distances < DISTANCE_LIMIT).tolist()
    return {
        "factual_label": factual,
        "counterfactual_label": counterfactual,
        "source_probability": probability(source),
        "target_probability": probability(target),
        "distance": [None] * n if before.distances is None else _both(before.distances, after.distances),
        # a factual unlike any render is not of the source class, whatever the classifier must call it
        "accepted": [label == source and close for label, close in zip(factual, near, strict=True)],
        **_drifts(before, after),
        "off_target_drift": (after.probabilities - before.probabilities)[:, rest].abs().sum(1).tolist(),
    }


def _drifts(before: Answers, after: Answers) -> dict[str, list]:
    """What the regressors say."""
    if before.anatomy is None or after.anatomy is None:
        return nothing(len(before.probabilities), ("anatomy_drift", "anatomy_drifts"))
    drifts = (after.anatomy - before.anatomy).abs()
    return {"anatomy_drift": drifts.mean(1).tolist(), "anatomy_drifts": [tuple(row) for row in drifts.tolist()]}


def findings(before: Answers, after: Answers, source: str, target: str, terms: Terms) -> dict[str, list]:
    """What the segmenter says of findings that should go, stay and come."""
    of_source, of_target = terms.findings_of[source], terms.findings_of[target]
    shared = [name for name in of_source if name in of_target]
    new, n = terms.only_in(target, source), len(after.probabilities)
    shares = {name: share(_union(after, [name], terms)) for name in terms.findings}
    removed = [shares[name] for name in terms.only_in(source, target)]

    def found(names: Iterable[str]) -> list[bool]:
        return [all(shares[name][item] >= terms.found_limit for name in names) for item in range(n)]

    return {
        "finding_before": share(_union(before, of_source, terms)),
        "finding_after": share(_union(after, of_source, terms)),
        "finding_left": share(_union(after, [name for name in terms.findings if name not in of_target], terms)),
        "finding_gone": [all(of[item] < terms.left_limit for of in removed) for item in range(n)],
        "finding_kept": found(shared) if shared else [None] * n,
        "kept_overlap": overlap(_union(before, shared, terms), _union(after, shared, terms)),
        "finding_added": found(new) if new else [None] * n,
    }


def pixels(a: Tensor, b: Tensor, ssim: Tensor) -> dict[str, list]:
    """What changed in the pixels of the whole picture; ``ssim (n, H, W)`` is of each pixel's window."""
    return {
        "ssim": ssim.mean((1, 2)).tolist(),
        "changed_fraction": changed((a - b).abs()).tolist(),
        "identical": [torch.equal(*pair) for pair in zip(a, b, strict=True)],
    }


def finding_masks(before: Answers, after: Answers, source: str, target: str, terms: Terms) -> Tensor:
    """Where either image of a pair has a finding that the pair is about, (n, H, W) bool."""
    # Only findings the pair is about are left out: an artefact that looks like another one counts as damage.
    concerned = (*terms.findings_of[source], *terms.findings_of[target])
    return _union(before, concerned, terms) | _union(after, concerned, terms)


def outside(a: Tensor, b: Tensor, ssim: Tensor, masks: Tensor, terms: Terms) -> dict[str, list]:
    """What changed in the pixels outside the ``masks (n, H, W)`` bool."""
    covered = share_of(masks, lit_field(a))
    outside = ~dilated(masks, round(terms.mask_margin * min(a.shape[-2:])) + SSIM_WINDOW // 2)
    fair = outside & (torch.tensor(covered) <= MASK_LIMIT).view(-1, 1, 1)
    square = (a - b).square().mean(1)
    return {
        "ssim_outside": [mean_where(*item) for item in zip(ssim, fair, strict=True)],
        "psnr_outside": [psnr(mean_where(*item)) for item in zip(square, fair, strict=True)],
        "mask_fraction": covered,
        "outside_fraction": share(outside),
    }


def nothing(n: int, names: Iterable[str]) -> dict[str, list]:
    """``n`` times None for numbers that were not judged."""
    return {name: [None] * n for name in names}


def halves(opinion: Opinion) -> tuple[Answers, Answers]:
    """An opinion of factuals and counterfactuals, in two."""
    parts = [opinion.probabilities, opinion.masks, opinion.distances, opinion.anatomy]
    halves = [(None, None) if part is None else part.chunk(2) for part in parts]
    return tuple(Answers(*(part[half] for part in halves)) for half in (0, 1))


def _union(opinion: Answers, findings: Iterable[str], terms: Terms) -> Tensor:
    """Where any of ``findings`` is, (n, H, W) bool."""
    return (opinion.masks[:, [terms.findings.index(name) for name in findings]] > 0.5).any(1)


def _both(before: Tensor, after: Tensor) -> list[tuple[float, float]]:
    return list(zip(before.tolist(), after.tolist(), strict=True))
