"""The dataset's card: a README.md that says what the folder holds, what made it and how it is read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from .records import COUNTERFACTUAL, SPLITS, Lines

MANY = 20  # of a kind, that are named


def card(lines: Lines) -> str:
    """The text for these lines of metadata. Equal lines give an equal text."""
    kinds = [[*key, count] for key, count in sorted(_kinds(lines).items())]
    are_real = Counter(line["factual_is_real"] for line in lines)
    real, count = are_real[True], are_real.total()
    origins = [*([_DRAWN] if real < count or not count else []), *([_REAL.format(real=real)] if real else [])]
    return _CARD.format(
        origin="\n\n".join(origins),
        source=_SOURCE_OF_REAL if real else _SOURCE,
        front=_front_matter(count),
        splits=_table(["split", "pairs", "noises"], [_split_row(lines, split) for split in SPLITS]),
        kinds=_table(["intended factual", "intended counterfactual", "arm", "pairs"], kinds),
        trained_on=sum(line["arm"] == COUNTERFACTUAL for line in lines),
        **{key: _listed(line[key] for line in lines) for key in ("mask_source", "judge", "model", "vectors")},
    )


_CARD = """{front}
# Counterfactual endoscopy pairs

{origin}

## Pairs

{splits}

Splits are by noise, or by the real image or the group that was named for it: pairs that share it (`group_id`) stand in
one split, and noise that a steering vector was made from stands in `train` alone.

{kinds}

Only the arm `counterfactual` is meant to be trained on ({trained_on} pairs); the others are controls.

## Labels

- `intended_label`: what the prompts and the steering were to show. Nobody looked at the image.
- `judge_label`: what a classifier called the image; `judge` says which, with a hash of its files. Empty: not judged.
  Neither label is a diagnosis.
- `flipped`: whether the judge took the factual for the one class and the counterfactual for the other, by all of its
  criteria.
- `mask_source`: who marked the finding: the judge's `segmenter`, the sampler's `concept map` (where steering acts, no
  outline), a `user`, or `none`. Here: {mask_source}.
- Judges here: {judge}.

## What made it

- Model weights (start of their hash): {model}.
- Steering vectors (start of their hash): {vectors}.
- `records/` has a JSON file for each pair with all that makes it again: model and LoRA hashes, prompts, seed, sampler,
  steps, vector, operator, strength, versions. To share pairs without their prompts, leave that folder out.
- {source}

## Loading

```python
from datasets import load_dataset

pairs = load_dataset("imagefolder", data_dir="path/to/this/folder")
pairs["train"][0]["factual"]
```
"""


_DRAWN = """**Synthetic. For research only: not for diagnosis, and no evidence about patients.** No image of these pairs
was taken of a patient. MedSteer made them with a diffusion model: the factual image of a pair is unsteered, and the
counterfactual grew from the same noise while one finding was steered away (or in)."""

_REAL = """**In {real} pairs the factual image is real and the counterfactual is synthetic. For research only: not for
diagnosis, and no evidence about patients.** A diffusion model changed one finding in a real image, whose other pixels
are its own where a lock or mask applied. A counterfactual shows what the model thinks, not what would have been. Real
images may be of patients: share them only as far as their licence and their approval go. The records know an image by a
hash of its pixels, neither by its file's name nor by what the file said of it; `factual_is_real` marks these pairs."""

_SOURCE = "Every PNG carries the IPTC digital source type `trainedAlgorithmicMedia`."
_SOURCE_OF_REAL = (
    "Every drawn PNG carries the IPTC digital source type `trainedAlgorithmicMedia`, a counterfactual of a real image "
    "`compositeWithTrainedAlgorithmicMedia`; real images carry none."
)


def _front_matter(count: int) -> str:
    sizes = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))
    size = next((name for limit, name in sizes if 2 * count < limit), "n>1M")
    return "\n".join(
        [
            "---",
            "pretty_name: Counterfactual endoscopy pairs",
            f"size_categories: [{size}]",
            "task_categories: [image-classification, object-detection]",
            "tags: [synthetic, counterfactual, medical, endoscopy, medsteer]",
            "---",
        ]
    )


def _split_row(lines: Lines, split: str) -> list[Any]:
    own = [line["group_id"] for line in lines if line["split"] == split]
    return [split, len(own), len(set(own))]


def _kinds(lines: Lines) -> Counter:
    return Counter((line["intended_label"]["factual"], line["intended_label"]["counterfactual"], line["arm"])
                   for line in lines)  # fmt: skip


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    return "\n".join(_row(row) for row in (head, ["---"] * len(head), *rows))


def _row(cells: Sequence[Any]) -> str:
    # A label is any text: what would end a cell or begin a tag is escaped.
    texts = (str(cell).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") for cell in cells)
    return "| " + " | ".join(texts) + " |"


def _listed(values: Iterable[str]) -> str:
    known = sorted({value for value in values if value})
    named = ", ".join(json.dumps(value, ensure_ascii=False) for value in known[:MANY])
    return (named or "none") + (f" and {len(known) - MANY} more" if len(known) > MANY else "")
