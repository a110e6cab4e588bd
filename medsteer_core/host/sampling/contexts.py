"""Prompts as CONDITIONINGs: what is known of one, and one that holds several contexts, marked, for an extraction."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from comfy.sd import CLIP
from torch import Tensor

from ...endophantom.text import IGNORED

MARK, TEXT = "medsteer_context", "medsteer_text"
BY_IMAGE = ("pooled_output", "attention_mask")  # what of an entry may be one for each image, as its tensor may
TOLD = (TEXT, IGNORED)  # of an entry, what the model is not given


def encode_contexts(clip: CLIP, texts: Sequence[str]) -> list:
    """The texts as one CONDITIONING whose entries say which context they belong to.

    A sampler takes it as ComfyUI takes any CONDITIONING of several entries: it averages their predictions.
    """
    return [
        [tensor, {**facts, MARK: index, TEXT: text}]
        for index, text in enumerate(texts)
        for tensor, facts in clip.encode_from_tokens_scheduled(clip.tokenize(text))
    ]


def contexts_of(conditioning: list) -> list[list]:
    """The CONDITIONING of each context, in order; itself where there is only one.

    Entries without a mark, such as another prompt that was combined with it, belong to every context.
    """
    marks = sorted({_mark(entry) for entry in conditioning} - {None})
    if not marks:
        return [conditioning]
    return [[entry for entry in conditioning if _mark(entry) in (mark, None)] for mark in marks]


def context_texts(conditioning: list) -> list[str]:
    """The texts of the contexts; [] where there are none."""
    texts = {_mark(entry): entry[1].get(TEXT) for entry in conditioning if _mark(entry) is not None}
    return [texts[mark] for mark in sorted(texts)]


def ignored_words(*conditionings: list) -> list[str]:
    """The words of these prompts that the embedded text encoder did not know, each once."""
    return list(dict.fromkeys(word for c in conditionings for entry in c for word in entry[1].get(IGNORED, ())))


def prompt_of(conditioning: list) -> dict[str, Any]:
    """What is known of a conditioning itself: its shapes and a hash."""
    tensors = [entry[0] for entry in conditioning]
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    facts = {"shapes": [list(tensor.shape) for tensor in tensors], "sha256": digest.hexdigest()}
    return {**facts, "contexts": texts} if (texts := context_texts(conditioning)) else facts


def same_prompt(one: list, other: list) -> bool:
    """Whether two conditionings are surely equal."""

    def given(entry: Any) -> dict[str, Any]:
        return {key: value for key, value in entry[1].items() if key not in TOLD}

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return torch.equal(a, b)
        return a is b or (isinstance(a, str | int | float | tuple) and a == b)

    return len(one) == len(other) and all(
        equal(a[0], b[0])
        and given(a).keys() == given(b).keys()
        and all(equal(value, b[1][key]) for key, value in given(a).items())
        for a, b in zip(one, other, strict=True)
    )


def one_of(conditioning: list, place: int, images: int) -> list:
    """The CONDITIONING of one image of a batch; itself where all images share it."""
    if images == 1:
        return conditioning
    return [
        [_one(tensor, place, images), {key: _one(value, place, images) if key in BY_IMAGE else value
                                       for key, value in facts.items()}]
        for tensor, facts in conditioning
    ]  # fmt: skip


def _one(value: Any, place: int, images: int) -> Any:
    by_image = isinstance(value, Tensor) and value.ndim > 1 and len(value) == images
    return value[place : place + 1] if by_image else value


def _mark(entry: Any) -> int | None:
    return entry[1].get(MARK)
