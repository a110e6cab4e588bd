"""From images, masks and a sampler's records to pairs in a dataset: judged, marked, boxed, and written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import MedSteerError
from ..judges.judge import Judge, Opinion, Terms, doubt_about
from ..scores.images import checked_pair, compare
from ..scores.scorer import ENDOPHANTOM, score_pairs
from ..scores.verdict import classes_doubt
from .boxes import boxes_of
from .pair_dataset import NO_BOXES, PairDataset, check_boxes
from .png import image_png, in_levels, mask_png
from .records import (
    BY_CLASSES,
    COUNTERFACTUAL,
    FINDING_IN,
    IN_BOTH,
    SIDES,
    STRENGTH_ZERO,
    finish,
    is_real,
    pair_id_of,
)
from .splits import AUTO, check_unseen, split_of

USER, SEGMENTER, NO_MASK = "user", "segmenter", "none"
MAPS = ("concept map", "prediction difference")  # a sampler's, of soft values
RECORD_TEXT = "medsteer_record"  # the record's chunk in a PNG
_SHARE = 0.2  # of a concept map's largest value, from which on it marks: Counterfactual Sampler's own default


@dataclass(frozen=True, eq=False)
class SaveRequest:
    """What Save Counterfactual Pairs was asked for.

    factual: (B, H, W, 3 or more) in 0..1; counterfactual: (K * B, H, W, 3 or more), all of the first strength first
    records: a sampler's, one for each counterfactual; source, target: the labels that were intended
    mask: (1, B or K * B, h, w) in 0..1, where the finding is; mask_source: `USER` or one of `MAPS`, with a mask
    texts: what else the PNGs say, by chunk, but of real images; with_record: whether they say how they were made
    """

    factual: Tensor
    counterfactual: Tensor
    records: Sequence[Mapping[str, Any]]
    source: str
    target: str
    split: str = AUTO
    validation: float = 0.1
    test: float = 0.1
    judge: Judge | None = None
    mask: Tensor | None = None
    mask_source: str = USER
    finding_in: str = BY_CLASSES
    boxes: str = NO_BOXES
    arm: str = COUNTERFACTUAL
    texts: Mapping[str, str] = field(default_factory=dict)
    with_record: bool = True


@dataclass(frozen=True, eq=False)
class Saved:
    """What became of a request: the pairs' records as they stand in the folder, how many of them are new, and how many
    pairs each split has now."""

    records: list[dict[str, Any]]
    new: int
    counts: Mapping[str, int]
    doubts: Sequence[str] = ()  # about the judge, the classes, and pairs that are there as something else

    def in_words(self, folder: str) -> str:
        """Two or three lines on it."""
        counts = ", ".join(f"{split} {count}" for split, count in self.counts.items())
        others = "; the others were there" if self.new < len(self.records) else ""
        lines = [f"{self.new} of {len(self.records)} pairs are new in {folder}{others}", f"the folder now: {counts}"]
        lines += _flips_in_words([record["score"] for record in self.records if "flipped" in (record["score"] or {})])
        sources = ", ".join(sorted({record["mask_source"] for record in self.records}))
        return "\n".join([*lines, f"mask_source: {sources}", *(f"Warning: {doubt}" for doubt in self.doubts)])


def _flips_in_words(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the judge says of the pairs that count: those whose factual is of the source class (and like a render)."""
    if not scores:
        return []
    counted = [score for score in scores if score["accepted"]]
    told = f"{sum(score['flipped'] for score in counted)} of {len(counted)}" if counted else "none counted"
    rest = len(scores) - len(counted)
    why = f"; {rest} not counted, whose factual is not its source class or unlike what it knows" if rest else ""
    return [f"flipped, says the judge: {told}{why}"]


def save_pairs(dataset: PairDataset, request: SaveRequest) -> Saved:
    """Write the pairs that are not there yet, and the index. Nothing is written when any of them is refused.

    Raises MedSteerError for counts and sizes that don't fit, labels the judge does not know, and what
    `PairDataset.add` refuses; pairs before the one that could not be written are whole and stay.
    """
    check_boxes(request.boxes)
    first, second = _levels(request)
    opinions = _judged(request, first, second)
    masks = _masks(request, opinions, first.shape[1:3])
    ready = [_ready(request, index, opinions, masks) for index in range(len(second))]
    new, records = 0, []
    for index, record in enumerate(ready):
        texts = {} if is_real(record) else dict(request.texts)  # a workflow names the real image's file
        if request.with_record:
            texts[RECORD_TEXT] = json.dumps(record, sort_keys=True)
        drawn = record["digital_source_type"]
        sources = (None if is_real(record) else drawn, drawn)
        both = (first[index % len(first)], second[index])
        pictures = [image_png(levels, texts, source) for levels, source in zip(both, sources, strict=True)]
        mask = mask_png(masks.pairs[index]) if record["mask_file_name"] else None
        added = dataset.add(record, *pictures, mask)
        new += added
        records.append(record if added else dataset.record(record["pair_id"]))
    counts = dataset.write_index(request.boxes)
    asked = ""
    if request.judge is not None:
        asked = classes_doubt(opinions.scores[0]["source"], [label["factual"] for label in opinions.labels])
    doubts = [doubt_about(request.judge), asked, _labelled_otherwise(dataset, records) if new else ""]
    return Saved(records, new, counts, list(filter(None, doubts)))


def _labelled_otherwise(dataset: PairDataset, records: Sequence[Mapping[str, Any]]) -> str:
    """A warning where pairs stand in the folder a second time, with other labels, else ""."""
    own = records[0]["intended_label"]
    for label in dataset.labels():
        ids = [pair_id_of(record["made"], label, record["arm"]) for record in records]
        if label != own and (there := sum(map(dataset.has, ids))):
            return (
                f"{there} of these pairs stand in the folder as '{label['factual']}' and '{label['counterfactual']}' "
                "too. Take another folder, or delete the records of those that are wrong."
            )
    return ""


def _levels(request: SaveRequest) -> tuple[np.ndarray, np.ndarray]:
    """Both sides' pixels ``(n, H, W, 3)`` in 8 bits, checked."""
    images, pairs, told = len(request.factual), len(request.counterfactual), len(request.records)
    if not images or pairs % images or told != pairs:
        raise MedSteerError(
            f"There are {images} factual images, {pairs} counterfactual ones and {told} records; a record for each "
            "counterfactual, and as many counterfactuals for each factual, were expected. Connect all three from one "
            "Counterfactual Sampler."
        )
    first, second = (image[..., :3].movedim(-1, 1) for image in (request.factual, request.counterfactual))
    checked_pair(first.repeat(pairs // images, 1, 1, 1), second, batch=True)
    return in_levels(request.factual[..., :3]), in_levels(request.counterfactual[..., :3])


@dataclass(frozen=True, eq=False)
class _Opinions:
    """The judge's word on each pair; scores are plain numbers where there is no judge."""

    scores: list[dict[str, Any]]
    labels: list[dict[str, str] | None]
    identity: str | None = None
    terms: Terms = ENDOPHANTOM
    masks: Tensor | None = None  # (2 n, findings, H, W), factuals first


class _Heard:
    """A judge whose last opinion is kept, so that scores and masks take one look."""

    def __init__(self, judge: Judge) -> None:
        self._judge, self.opinion = judge, None
        self.terms, self.identity = judge.terms, judge.identity

    def __call__(self, images: Tensor) -> Opinion:
        self.opinion = self._judge(images)
        return self.opinion


def _judged(request: SaveRequest, first: np.ndarray, second: np.ndarray) -> _Opinions:
    """What is said of the pixels as they are saved: whoever reads the files gets the same numbers."""
    b = torch.from_numpy(second).movedim(-1, 1) / 255
    a = (torch.from_numpy(first).movedim(-1, 1) / 255).repeat(len(second) // len(first), 1, 1, 1)
    if request.judge is None:
        return _Opinions([compare(*pair) for pair in zip(a, b, strict=True)], [None] * len(b))
    judge = _Heard(request.judge)
    try:
        scores = score_pairs(a, b, request.source, request.target, judge)
    except MedSteerError as error:
        raise MedSteerError(f"{error} Labels of your own go with judge 'none'.") from error
    labels = [{"factual": score.factual_label, "counterfactual": score.counterfactual_label} for score in scores]
    return _Opinions([score.to_dict() for score in scores], labels, judge.identity, judge.terms, judge.opinion.masks)


@dataclass(frozen=True, eq=False)
class _Masks:
    """Where the finding is, ``(n, H, W)`` bool: in each pair (where it comes or goes), and by label in each side."""

    source: str
    pairs: Tensor | None = None
    sides: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def _masks(request: SaveRequest, opinions: _Opinions, size: tuple[int, int]) -> _Masks:
    labels = dict(zip(SIDES, (request.source, request.target), strict=True))
    if request.mask is not None:
        given, shown = _fitted(request, size), _shown_in(request, opinions.terms)
        return _Masks(request.mask_source, given, {side: {labels[side]: given} for side in shown})
    differing = _differing(request, opinions.terms)
    if opinions.masks is None or differing is None or not any(differing.values()):
        return _Masks(NO_MASK)
    places = {side: [opinions.terms.findings.index(name) for name in differing[side]] for side in SIDES}
    # Both sides are searched for both labels' findings: what was to go can be left, and then it is no background.
    found = {
        side: {labels[own]: half[:, places[own]].any(1) for own in SIDES if places[own]}
        for side, half in zip(SIDES, (opinions.masks > 0).chunk(2), strict=True)
    }
    own = [found[side][labels[side]] for side in SIDES if places[side]]
    return _Masks(SEGMENTER, torch.stack(own).any(0), found)


def _differing(request: SaveRequest, terms: Terms) -> dict[str, list[str]] | None:
    """The findings that each side has and the other lacks; None where the classes' findings are not known."""
    try:
        source, target = (terms.class_named(name, "") for name in (request.source, request.target))
    except MedSteerError:
        return None
    if terms.unknown_findings((source, target)):
        return None
    return {"factual": terms.only_in(source, target), "counterfactual": terms.only_in(target, source)}


def _shown_in(request: SaveRequest, terms: Terms) -> tuple[str, ...]:
    """The sides in which a mask that was given marks a finding. MedSteerError where boxes need to know and can't."""
    if request.finding_in not in FINDING_IN:
        raise MedSteerError(f"finding_in is '{request.finding_in}'; one of {', '.join(FINDING_IN)} was expected.")
    if request.finding_in == IN_BOTH:
        return SIDES
    if request.finding_in != BY_CLASSES:
        return (request.finding_in,)
    differing = _differing(request, terms)
    if differing is None and request.boxes != NO_BOXES:
        raise MedSteerError(
            f"Nothing says whether '{request.source}' or '{request.target}' shows the finding that the mask marks, and "
            f"boxes is '{request.boxes}'. Set finding_in to factual, counterfactual or both."
        )
    return tuple(side for side in SIDES if (differing or {}).get(side))


def _fitted(request: SaveRequest, size: tuple[int, int]) -> Tensor:
    """The given mask as ``(n, H, W)`` bool, one for each pair."""
    mask, pairs, images = request.mask, len(request.counterfactual), len(request.factual)
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or len(mask) not in (1, images, pairs) or not bool(torch.isfinite(mask).all()):
        counts = " or ".join(map(str, sorted({1, images, pairs})))
        raise MedSteerError(
            f"mask has shape {tuple(mask.shape)} for {pairs} pairs; ({counts}, height, width) with finite values was "
            "expected."
        )
    mask = mask.detach().float().cpu().repeat(pairs // len(mask), 1, 1)
    if tuple(mask.shape[1:]) != tuple(size):
        mask = torch.nn.functional.interpolate(mask[:, None], size=tuple(size), mode="bilinear", antialias=True)[:, 0]
    if request.mask_source not in MAPS:
        return mask > 0.5
    shares = torch.tensor([record["made"].get("lock", {}).get("threshold", _SHARE) for record in request.records])
    return (mask >= shares[:, None, None] * mask.amax((1, 2), keepdim=True)) & (mask > 0)


def _ready(request: SaveRequest, index: int, opinions: _Opinions, masks: _Masks) -> dict[str, Any]:
    """The whole record of one pair, refused here if it is to be."""
    started = request.records[index]
    split = split_of(started["group_id"], request.split, request.validation, request.test)
    check_unseen(started["made"], split)
    arm = STRENGTH_ZERO if started.get("changes_nothing") and request.arm == COUNTERFACTUAL else request.arm
    height, width = request.counterfactual.shape[1:3]
    return finish(
        started,
        source=request.source,
        target=request.target,
        split=split,
        arm=arm,
        has_mask=masks.pairs is not None,
        judge=opinions.identity,
        judge_label=opinions.labels[index],
        score=opinions.scores[index],
        mask_source=masks.source,
        boxes={
            side: [box for label, mask in found.items() for box in boxes_of(mask[index], label)]
            for side, found in masks.sides.items()
        }
        or None,
        width=int(width),
        height=int(height),
    )
