"""Did it work: pairs in one sentence, by whatever judge is there, with how well the rest was kept.

No class has to be named: what the judge sees before and after is told. Rates and criteria are the scorer's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..judges.judge import Answers, Judge, doubt_about
from .images import SSIM_WINDOW, checked_pair, mean, ssim_map
from .pair import scores_of
from .parts import DISTANCE_LIMIT, halves
from .regions import dilated, mean_where

ADVICE = (
    "Try another seed, a higher strength in Steer or a higher cfg, a larger mask or lock; for a counterfactual prompt "
    "an earlier start. Two prompts alone seldom add a finding: Steer does (template 3)."
)
LEAST_SSIM, MOST_DRIFT = 0.85, 2.0  # beyond, much else changed: two organs' prompts, or another image altogether
MOST_WAYS = 3  # of before and after that are told apart


def verdict(factuals: Tensor, counterfactuals: Tensor, judge: Judge | None, mask: Tensor | None = None) -> str:
    """What a judge sees in pairs ``(n, 3, H, W)`` in 0..1, and the structure kept, as a line or two.

    ``mask (n, H, W)`` bool: where the image was allowed to change. Structure is the SSIM outside the findings that the
    judge marks, else outside the mask, else of the whole image; for a diffuse finding it is the drift of the anatomy,
    in the regressors' errors. MedSteerError for images that don't fit.
    """
    a, b = checked_pair(factuals, counterfactuals, batch=True)
    if torch.equal(a, b):
        return "The counterfactual is the factual image, byte for byte: nothing was changed."
    if judge is None:
        return f"No judge is chosen. {_capital(_kept(a, b, mask))}."
    doubt = [f"Warning: {said}"] if (said := doubt_about(judge)) else []
    before, after = halves(judge(torch.cat([a, b])))
    labels = [[judge.terms.labels[i] for i in of.probabilities.argmax(1)] for of in (before, after)]
    far = _far(before)
    lines = []
    if not all(far):
        ways = [way for way, is_far in zip(zip(*labels, strict=True), far, strict=True) if not is_far]
        numbers = _structure(a, b, before, after, labels, judge, far)
        lines.append(f"{_ways(ways)}; {_in_words(numbers) or _kept(a, b, mask)}.")
        lost = [later and not first for later, first in zip(_far(after), far, strict=True)]
        stayed = [not gone and one == other
                  for gone, is_far, one, other in zip(lost, far, *labels, strict=True) if not is_far]  # fmt: skip
        if any(stayed):
            lines.append(f"{_stayed(sum(stayed), len(ways))} {ADVICE}")
        if any(lost):
            which = _some(sum(lost), len(a), "counterfactual")
            lines.append(f"{which} unlike anything that the judge was trained on. Try a lower strength or cfg.")
        if numbers.get("ssim_outside", 1.0) < LEAST_SSIM or numbers.get("anatomy_drift", 0.0) > MOST_DRIFT:
            lines.append(
                "Much else changed: take prompts of one organ that differ in the finding alone, or start later."
            )
    if any(far):
        which = "This factual image is" if len(a) == 1 else f"{sum(far)} of {len(a)} factual images are"
        lines.append(
            f"{which} unlike anything that the judge was trained on, so that it has no say. Look at the "
            "prompts for words that the model does not know, or choose a judge of such images, or none."
        )
        if all(far):
            lines.append(f"{_capital(_kept(a, b, mask))}.")
    return "\n".join([*lines, *doubt])


def classes_doubt(source: str, labels: Sequence[str]) -> str:
    """A question where a judge gives most factual images one class, and not the ``source`` that they are said to have,
    else ""."""
    seen, count = Counter(labels).most_common(1)[0] if labels else (source, 0)
    if seen == source or 2 * count <= len(labels):
        return ""
    return (
        f"The judge calls {count} of {len(labels)} factual images '{seen}', and source_class is '{source}'. Are the "
        "classes those of the prompts?"
    )


def _far(answers: Answers) -> list[bool]:
    """Which images are unlike those that the judge knows; none where it can't tell."""
    if answers.distances is None:
        return [False] * len(answers.probabilities)
    return (~(answers.distances < DISTANCE_LIMIT)).tolist()


def _ways(ways: Sequence[tuple[str, str]]) -> str:
    """From what to what, the most frequent first."""
    counts = Counter(ways).most_common()
    told = [f"{before} before, {after} after" if before != after else f"{before} before and after"
            for (before, after), _ in counts[:MOST_WAYS]]  # fmt: skip
    if len(ways) == 1:
        return _capital(told[0])
    told = [f"{text}: {count} of {len(ways)}" for text, (_, count) in zip(told, counts, strict=False)]
    if rest := sum(count for _, count in counts[MOST_WAYS:]):
        told.append(f"others: {rest} of {len(ways)}")
    return _capital("; ".join(told))


def _stayed(count: int, of: int) -> str:
    return "It did not work: the judge sees no change." if of == 1 else f"In {count} of {of} it did not work."


def _structure(
    a: Tensor, b: Tensor, before: Answers, after: Answers, labels: Sequence[Sequence[str]], judge: Judge,
    far: Sequence[bool],
) -> dict[str, float]:  # fmt: skip
    """Structure by the judge's own marks, over the pairs whose classes it has marks for: the means by measure."""
    terms, found = judge.terms, {"ssim_outside": [], "anatomy_drift": []}
    if before.masks is None:
        return {}
    for index, (source, target) in enumerate(zip(*labels, strict=True)):
        named = source in terms.classes and target in terms.classes
        if far[index] or not named or terms.unknown_findings((source, target)):
            continue
        one = slice(index, index + 1)
        parts = zip(_parts(before), _parts(after), strict=True)
        opinion = Answers(*(None if x is None else torch.cat([x[one], y[one]]) for x, y in parts))
        score = scores_of(a[one], b[one], opinion, source, target, terms)[0]
        measure = terms.structure_measure(source, target)
        if getattr(score, measure) is not None:
            found[measure].append(getattr(score, measure))
    return {measure: mean(values) for measure, values in found.items() if values}


def _in_words(numbers: Mapping[str, float]) -> str:
    told = []
    if "ssim_outside" in numbers:
        told.append(f"SSIM outside the finding {numbers['ssim_outside']:.3f}")
    if "anatomy_drift" in numbers:
        told.append(f"anatomy drift {numbers['anatomy_drift']:.2f}")
    return ", ".join(told)


def _parts(answers: Answers) -> tuple[Tensor | None, ...]:
    return answers.probabilities, answers.masks, answers.distances, answers.anatomy


def _kept(a: Tensor, b: Tensor, mask: Tensor | None) -> str:
    """Structure without a judge's marks: outside the mask, or of the whole image."""
    ssim = ssim_map(a, b)
    if mask is not None:
        outside = ~dilated(mask, SSIM_WINDOW // 2)
        values = [mean_where(*item) for item in zip(ssim, outside, strict=True)]
        if None not in values:
            return f"SSIM outside the mask {mean(values):.3f}"
    return f"SSIM of the whole image {ssim.mean().item():.3f}"


def _some(count: int, of: int, name: str) -> str:
    return f"The {name} is" if of == 1 else f"{count} of {of} {name}s are"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
