"""Choosing cross-attention sites by a text that a person types: `all`, `0-3,8`, `blocks.1*`."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from .errors import MedSteerError

_INDEX = re.compile(r"([0-9]+)(?:\s*-\s*([0-9]+))?")
_NEGATIVE = re.compile(r"-\s*[0-9]+")
_SHOWN = 6


def select_sites(spec: str, names: Sequence[str]) -> tuple[str, ...]:
    """The `names` (in execution order) that `spec` chooses, in execution order, each once.

    `spec` is a comma-separated list of `all`, indices (`8`), inclusive ranges (`0-3`) and name globs
    (`blocks.1*.cross_attn.proj`); spaces don't matter. Every part must choose something: MedSteerError otherwise.
    """
    parts = [part.strip() for part in spec.split(",") if part.strip()]
    if not parts:
        raise MedSteerError("sites is empty; write 'all', indices such as '0-3,8', or a name such as 'blocks.1*'.")
    if not names:
        raise MedSteerError("There is no cross-attention site to choose from; check the model and the vector.")
    chosen = {index for part in parts for index in _indices(part, names)}
    return tuple(name for index, name in enumerate(names) if index in chosen)


def _indices(part: str, names: Sequence[str]) -> Sequence[int]:
    if part.lower() == "all":
        return range(len(names))
    if _NEGATIVE.fullmatch(part):
        raise MedSteerError(f"sites has '{part}'; indices count from 0 in execution order and can't be negative.")
    if match := _INDEX.fullmatch(part):
        return _range(part, int(match[1]), int(match[2] or match[1]), len(names))
    found = [index for index, name in enumerate(names) if fnmatchcase(name, part)]
    if not found:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise MedSteerError(f"No site is named '{part}'. There are: {', '.join(names[:_SHOWN])}{more}.")
    return found


def _range(part: str, first: int, last: int, count: int) -> range:
    if last >= count:
        raise MedSteerError(f"sites has '{part}', but there are only {count} sites: use indices 0 to {count - 1}.")
    if first > last:
        raise MedSteerError(f"sites has '{part}', which runs backwards; write '{last}-{first}'.")
    return range(first, last + 1)
