"""A prompt in several contexts: one CONDITIONING that holds each of them, marked, so that an extraction can average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy.sd import CLIP

MARK, TEXT = "medsteer_context", "medsteer_text"


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


def _mark(entry: Any) -> int | None:
    return entry[1].get(MARK)
