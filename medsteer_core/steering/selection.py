"""Choosing cross-attention sites by a text that a person types: `all`, `0-3,8`, `blocks.1*`, `auto`."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from ..errors import MedSteerError
from ..extraction.separability import auto_sites
from ..files.inside import shown

_INDEX = re.compile(r"([0-9]{1,999})(?:\s*-\s*([0-9]{1,999}))?")
_NEGATIVE = re.compile(r"-\s*[0-9]+")
_SHOWN = 6


AUTO = "auto"


def select_sites(
    spec: str, names: Sequence[str], auroc: Mapping[str, Sequence[float]] | None = None
) -> tuple[str, ...]:
    """The `names` (in execution order) that `spec` chooses, in execution order, each once.

    `spec` is a comma-separated list of `all`, indices (`8`), inclusive ranges (`0-3`), name globs
    (`blocks.1*.cross_attn.proj`) and `auto`; spaces don't matter. `auto` are the sites whose held-out AUROC passes
    separability.AUTO_THRESHOLD; `auroc` holds it as {name: [S numbers]}. Every part must choose something:
    MedSteerError otherwise.
    """
    parts = [part.strip() for part in spec.split(",") if part.strip()]
    if not parts:
        raise MedSteerError("sites is empty; write 'all', indices such as '0-3,8', or a name such as 'blocks.1*'.")
    if not names:
        raise MedSteerError("There is no cross-attention site to choose from; check the model and the vector.")
    chosen = {index for part in parts for index in _indices(part, names, auroc or {})}
    return tuple(name for index, name in enumerate(names) if index in chosen)


def has_auto(spec: str) -> bool:
    """Whether `auto` is among the parts of `spec`."""
    return AUTO in (part.strip().lower() for part in spec.split(","))


def _indices(part: str, names: Sequence[str], auroc: Mapping[str, Sequence[float]]) -> Sequence[int]:
    if part.lower() == "all":
        return range(len(names))
    if part.lower() == AUTO:
        return _auto(names, auroc)
    if _NEGATIVE.fullmatch(part):
        raise MedSteerError(
            f"sites has '{shown(part)}'; indices count from 0 in execution order and can't be negative."
        )
    if match := _INDEX.fullmatch(part):
        return _range(part, int(match[1]), int(match[2] or match[1]), len(names))
    found = [index for index, name in enumerate(names) if fnmatchcase(name, part)]
    if not found:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise MedSteerError(f"No site is named '{shown(part)}'. There are: {', '.join(names[:_SHOWN])}{more}.")
    return found


def _auto(names: Sequence[str], auroc: Mapping[str, Sequence[float]]) -> list[int]:
    if not auroc:
        raise MedSteerError(
            "sites is 'auto', but this vector does not say how well its sites tell unseen samples apart: it was made "
            "from fewer than 4 samples, with noise 'same state' or by an older version, or imported or combined. "
            "Extract it anew with at least 4 samples and noise 'paired', or write the sites, such as 'all'."
        )
    chosen = auto_sites(auroc)
    return [index for index, name in enumerate(names) if name in chosen]


def _range(part: str, first: int, last: int, count: int) -> range:
    begin = f"sites has '{shown(part)}'"
    if last >= count:
        raise MedSteerError(f"{begin}, but there are only {count} sites: use indices 0 to {count - 1}.")
    if first > last:
        raise MedSteerError(f"{begin}, which runs backwards; write '{last}-{shown(str(first))}'.")
    return range(first, last + 1)
