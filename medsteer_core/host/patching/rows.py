"""Which rows of a model call belong to which conditioning.

A call's batch is chunks of equal length, one a conditioning; `cond_or_uncond` and `uuids` name them in order. The name
of a uuid comes from the guider; where a uuid stands in several lists (area conditionings), the index decides. What an
index means differs between guiders: it is the place of a list among those that the guider has evaluated together.

A node between ComfyUI and the model may hand the rows on in another order and number and leave these names as they were
(tiling does). Such a call's rows are told by the text that each has, or they stay unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

INDEX_NAMES = ("positive", "negative")


def names_of_uuids(conds: Mapping[str, Sequence[Mapping[str, Any]] | None]) -> dict[Any, str]:
    """uuid -> cond name, from a guider's `conds`; a uuid that stands under two names is left out."""
    names: dict[Any, set[str]] = {}
    for name, entries in conds.items():
        for entry in entries or ():
            names.setdefault(entry.get("uuid"), set()).add(name)
    return {uuid: next(iter(found)) for uuid, found in names.items() if uuid is not None and len(found) == 1}


def names_of_indices(
    evaluated: Sequence[Sequence[Mapping[str, Any]] | None], conds: Mapping[str, Sequence[Mapping[str, Any]] | None]
) -> tuple[str, ...]:
    """The names of the lists that a guider has evaluated together, told by their being the very lists in its `conds`.

    A list that is none of them (a copy made for a context window) is positive or negative by its place, where the
    guider has no other names, and otherwise nameless: "".
    """
    plain = set(conds) <= set(INDEX_NAMES)
    names = []
    for place, entries in enumerate(evaluated):
        found = [name for name, own in conds.items() if own is not None and own is entries]
        by_place = INDEX_NAMES[place] if plain and place < len(INDEX_NAMES) else ""
        names.append(found[0] if found else by_place)
    return tuple(names)


def row_finder(
    batch: int,
    transformer_options: Mapping[str, Any],
    uuid_names: Mapping[Any, str],
    index_names: Sequence[str] = INDEX_NAMES,
) -> Callable[[str], list[tuple[int, int]]]:
    """A function from a cond's name to its row ranges ``[(start, stop), ...]`` in a call of ``batch`` rows."""
    chunks = chunk_names(transformer_options, uuid_names, index_names)
    length = batch // len(chunks)
    ranges = [(name, (place * length, (place + 1) * length)) for place, name in enumerate(chunks)]
    return lambda name: [rows for found, rows in ranges if found == name]


def chunk_names(
    transformer_options: Mapping[str, Any], uuid_names: Mapping[Any, str], index_names: Sequence[str] = INDEX_NAMES
) -> list[str]:
    """The conditioning of each equal part of a call's rows, in order."""
    indices = transformer_options.get("cond_or_uncond") or [0]
    uuids = [*(transformer_options.get("uuids") or ()), *[None] * len(indices)]
    by_index = [index_names[index] if index < len(index_names) else "" for index in indices]
    return [uuid_names.get(uuid, name) for uuid, name in zip(uuids, by_index, strict=False)]


def names_by_text(contexts: Tensor | None, texts: Mapping[str, Sequence[Tensor]]) -> list[str] | None:
    """The conditioning of each row of a call, by which one's text it has; None where that does not tell.

    contexts: ``(rows, tokens, C)`` as the model gets them; texts: by name, ``(1 or images, tokens, C)`` each, which
    ComfyUI repeats along the tokens where texts of several lengths share a call.
    """
    if not isinstance(contexts, Tensor) or contexts.ndim != 3:
        return None
    names: list[str] = []
    for row in contexts:
        found = {name for name, known in texts.items() if any(_has_text(row, text) for text in known)}
        if len(found) != 1:
            return None
        names += found
    return names


def _has_text(row: Tensor, text: Tensor) -> bool:
    """Whether a row's context ``(tokens, C)`` is one of ``text (images, tokens, C)``, repeated to its length."""
    times, rest = divmod(row.shape[0], text.shape[1])
    if rest or row.shape[1] != text.shape[2]:
        return False
    return any(torch.equal(row, one.to(row).repeat(times, 1)) for one in text)


def ranges_of(names: Sequence[str]) -> Callable[[str], list[tuple[int, int]]]:
    """As `row_finder` gives, from the conditioning of each row."""
    starts = [row for row in range(len(names)) if row == 0 or names[row] != names[row - 1]]
    ranges = list(zip(starts, [*starts[1:], len(names)], strict=True))
    return lambda name: [(start, stop) for start, stop in ranges if names[start] == name]
