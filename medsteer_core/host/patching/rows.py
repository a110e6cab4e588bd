"""Which rows of a model call belong to which conditioning.

A call's batch is chunks of equal length, one a conditioning; `cond_or_uncond` and `uuids` name them in order. The name
of a uuid comes from the guider; where a uuid stands in several lists (area conditionings), the index decides. What an
index means differs between guiders: it is the place of a list among those that the guider has evaluated together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
    indices = transformer_options.get("cond_or_uncond") or [0]
    uuids = transformer_options.get("uuids") or [None] * len(indices)
    length = batch // len(indices)
    chunks = []
    for position, (index, uuid) in enumerate(zip(indices, uuids, strict=False)):
        by_index = index_names[index] if index < len(index_names) else ""
        chunks.append((uuid_names.get(uuid, by_index), (position * length, (position + 1) * length)))
    return lambda name: [rows for found, rows in chunks if found == name]


def block_rows(
    rows: Callable[[str], list[tuple[int, int]]],
    batch: int,
    transformer_options: Mapping[str, Any],
    index: int,
    count: int,
) -> tuple[Callable[[str], list[tuple[int, int]]], list[tuple[int, int]] | None]:
    """The rows of block ``index`` of ``count`` equal blocks of images: by cond's name, and of all conds (None: all).

    Every conditioning's chunk holds all the blocks' images, one block after the other.
    """
    if count == 1:
        return rows, None
    chunks = len(transformer_options.get("cond_or_uncond") or [0])
    length = batch // chunks // count

    def part(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        return [(start + index * length, start + (index + 1) * length) for start, _stop in ranges]

    everything = part([(chunk * count * length, 0) for chunk in range(chunks)])
    return lambda name: part(rows(name)), everything
