"""What is written of a pair: how it was made, what it shows and is called, and the ids that follow from that.

A record starts as the few facts that Counterfactual Sampler knows (`made`, `group_id`, `noise_id`); `finish` adds what
its saving knows. Nothing in it is a time, a host's name or an absolute path: the same pair gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import MedSteerError
from ..files.same_bytes import canonical_json

Lines = Iterable[Mapping[str, Any]]  # of metadata (see `metadata_of`), which can be gone through several times
SYNTHETIC = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
# IPTC's word for an image of a camera in which a model has drawn a part.
EDITED = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
REAL = "real image"  # what a record's `made` says of a factual that was not drawn
SPLITS = ("train", "validation", "test")
# What a pair is for: the effect itself, or a control that says how much of it is none.
COUNTERFACTUAL, STRENGTH_ZERO, RANDOM, REPROMPT = "counterfactual", "strength 0", "random direction", "re-prompt"
ARMS = (COUNTERFACTUAL, STRENGTH_ZERO, RANDOM, REPROMPT)
MASK_SOURCES = ("segmenter", "concept map", "prediction difference", "user", "none")
SIDES = ("factual", "counterfactual")
# Where a pair has its finding: what the classes say, one of its images, or both.
BY_CLASSES, IN_BOTH = "auto", "both"
FINDING_IN = (BY_CLASSES, *SIDES, IN_BOTH)
NO_MASK = "no_mask.png"  # in each split's folder, a single black pixel
METADATA = ("factual_file_name", "counterfactual_file_name", "mask_file_name", "pair_id", "group_id", "split",
            "intended_label", "judge_label", "judge", "flipped", "arm", "mask_source", "boxes", "width", "height",
            "seed", "batch_index", "multiple", "vectors", "model", "synthetic", "digital_source_type",
            "factual_is_real")  # fmt: skip
_HEX, _LENGTH = frozenset("0123456789abcdef"), 16
_REQUIRED = ("pair_id", "group_id", "split", "factual_file_name", "counterfactual_file_name", "intended_label", "arm",
             "made")  # fmt: skip


def short_hash(value: Any) -> str:
    """16 hex digits of SHA-256 over a JSON value; equal for equal values."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:_LENGTH]


def pair_id_of(made: Mapping[str, Any], intended_label: Mapping[str, str], arm: str) -> str:
    """A pair's id: a hash of how it was made (the versions of programs do not count), for what, and as what."""
    lasting = {key: value for key, value in made.items() if key != "versions"}
    return short_hash({"made": lasting, "intended_label": dict(intended_label), "arm": arm})


def label_problem(name: str, role: str) -> str:
    """Why a text is no label; "" when it is one."""
    if not name.strip():
        return f"{role} is empty; the name of what the image should show was expected, such as 'polyps'."
    # Any language, quotes, commas and slashes are fine: a label is never a file's name.
    if name != name.strip() or not name.isprintable() or len(name) > 200:
        return f"{role} is {name!r}; one line of at most 200 characters without spaces at its ends was expected."
    return ""


def is_real(record: Mapping[str, Any]) -> bool:
    """Whether a pair's factual is a real image, so that its counterfactual alone is synthetic."""
    return record["made"].get("factual") == REAL


def finish(
    started: Mapping[str, Any],
    *,
    source: str,
    target: str,
    split: str,
    arm: str = COUNTERFACTUAL,
    has_mask: bool = False,
    **known: Any,
) -> dict[str, Any]:
    """A sampler's record with the labels that were intended, its id and its files' names.

    ``known``: what else is known, by the record's names: judge, judge_label, score, mask_source, boxes, width, height.
    Raises MedSteerError for labels, arms and splits that there are not.
    """
    for name, role in ((source, "source_class"), (target, "target_class")):
        if problem := label_problem(name, role):
            raise MedSteerError(problem)
    for value, allowed, role in ((arm, ARMS, "arm"), (split, SPLITS, "split")):
        if value not in allowed:
            raise MedSteerError(f"{role} is '{value}'; one of {', '.join(allowed)} was expected.")
    intended = {"factual": source, "counterfactual": target}
    pair_id = pair_id_of(started["made"], intended, arm)
    stem = f"{pair_id[:2]}/{pair_id}"
    return {
        "pair_id": pair_id,
        "group_id": started["group_id"],
        "noise_id": started.get("noise_id", started["group_id"]),
        "split": split,
        "factual_file_name": f"{stem}_factual.png",
        "counterfactual_file_name": f"{stem}_counterfactual.png",
        "mask_file_name": f"{stem}_mask.png" if has_mask else None,
        "intended_label": intended,
        "judge_label": None,
        "judge": None,
        "score": None,
        "arm": arm,
        "mask_source": "none",
        "synthetic": True,
        "digital_source_type": EDITED if is_real(started) else SYNTHETIC,
        **known,
        "made": dict(started["made"]),
    }


def check(record: Mapping[str, Any]) -> None:
    """Raise MedSteerError for a record that is none, or whose ids could be file names of something else."""
    missing = [name for name in _REQUIRED if not record.get(name)]
    if missing:
        raise MedSteerError(
            f"A pair's record lacks {', '.join(missing)}; connect the record of Counterfactual Sampler."
        )
    ids = (record["pair_id"], record["group_id"], record.get("noise_id", record["group_id"]))
    for name in ids:
        if not isinstance(name, str) or len(name) != _LENGTH or not set(name) <= _HEX:
            raise MedSteerError(f"A pair's record has the id {name!r}; {_LENGTH} hexadecimal digits were expected.")
    if record["split"] not in SPLITS or record["arm"] not in ARMS:
        raise MedSteerError(
            f"Pair {record['pair_id']} is for split '{record['split']}', arm '{record['arm']}'; one of "
            f"{', '.join(SPLITS)} and one of {', '.join(ARMS)} were expected."
        )
    stem = f"{record['pair_id'][:2]}/{record['pair_id']}"
    for kind in (*SIDES, "mask"):
        name = record.get(f"{kind}_file_name")
        if name not in (f"{stem}_{kind}.png", *((None,) if kind == "mask" else ())):
            raise MedSteerError(f"Pair {record['pair_id']} names the file {name!r}; {stem}_{kind}.png was expected.")


def files_of(record: Mapping[str, Any]) -> dict[str, str]:
    """The pair's images, by kind (factual, counterfactual, mask), as names in the dataset's folder."""
    names = {kind: record.get(f"{kind}_file_name") for kind in (*SIDES, "mask")}
    return {kind: f"{record['split']}/{name}" for kind, name in names.items() if name}


def record_file(pair_id: str) -> str:
    """The record's file in the dataset's folder: it is there when, and only when, the pair is whole."""
    return f"records/{pair_id[:2]}/{pair_id}.json"


def to_bytes(record: Mapping[str, Any]) -> bytes:
    """A record as its file holds it."""
    canonical_json(record)  # raises for what JSON can't hold
    return (json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def metadata_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record's line of metadata.jsonl: flat, with the same types in every line, and without prompts.

    What is not known is an empty text and a mask that there is not the file `NO_MASK`: a split whose column is null in
    every line has another type than the other splits, and Hugging Face's loader refuses them together.
    """
    made, score = record["made"], record.get("score") or {}
    steering = made.get("steering", [])
    label = record.get("judge_label") or {}
    return {
        **{f"{kind}_file_name": record.get(f"{kind}_file_name") or NO_MASK for kind in (*SIDES, "mask")},
        "pair_id": record["pair_id"],
        "group_id": record["group_id"],
        "split": record["split"],
        "intended_label": {side: record["intended_label"][side] for side in SIDES},
        "judge_label": {side: label.get(side, "") for side in SIDES},
        "judge": record.get("judge") or "",
        "flipped": {True: "yes", False: "no"}.get(score.get("flipped"), ""),
        "arm": record["arm"],
        "mask_source": record.get("mask_source", "none"),
        "boxes": canonical_json(record.get("boxes") or {}),
        "width": int(record.get("width") or 0),
        "height": int(record.get("height") or 0),
        "seed": str(made.get("seed", "")),  # a text: seeds go to 2**64, integers of Arrow's tables to 2**63
        "batch_index": int(made.get("batch_index", 0)),
        "multiple": float(made.get("multiple", 1.0)),
        "vectors": ", ".join(part["vector"]["vector"] for part in steering if "vector" in part),
        "model": str(made.get("model", {}).get("weights", ""))[:_LENGTH],
        "synthetic": True,
        "digital_source_type": record.get("digital_source_type", SYNTHETIC),
        "factual_is_real": is_real(record),
    }
