"""The regular expressions in a LoRA's config, tried against the clock.

Some expressions take longer than anyone lives on a name that almost fits, and a config may come from anyone. Python's
`re` can't be stopped; the package `regex`, which ComfyUI's own packages bring along, can.
"""

from __future__ import annotations

import math
import re
import time
from typing import Any

from ..errors import MedSteerError, needs

SECONDS = 5.0  # for all expressions and names of one LoRA; real ones take a hundredth
LONGEST = 1000  # characters
_REPEATS = 1000  # the counts in braces, multiplied
PEFT_FORM = r"(.*\.)?({})$"  # what peft makes of a key of rank_pattern and alpha_pattern


def is_expression(text: Any) -> bool:
    """Whether a text is a regular expression, short and with few repetitions, which `regex` writes out one by one."""
    if not isinstance(text, str) or len(text) > LONGEST or not _repeats_little(text):
        return False
    if "[" in text and re.search(r"\(\?[a-zA-Z]*i", text):
        return False  # sets of letters whatever their case, which take `re` a second each
    package = _regex()
    try:
        return bool(re.compile(text) and package.compile(text))
    except (re.error, package.error, RecursionError, OverflowError, ValueError):
        return False


def _repeats_little(text: str) -> bool:
    counts = re.findall(r"\{([^}]*)\}", text)
    if not all(re.fullmatch(r"[0-9]{0,4},?[0-9]{0,4}", count) for count in counts):  # `regex` reads more into others
        return False
    most = [max(map(int, re.findall("[0-9]+", count)), default=1) for count in counts]
    return math.prod(max(count, 1) for count in most) <= _REPEATS


def _regex() -> Any:
    with needs("regex", "a LoRA's patterns need"):
        import regex
    return regex


class Clock:
    """Matches expressions with names until the seconds are used up; then MedSteerError, which names ``file``."""

    def __init__(self, file: object, seconds: float = SECONDS) -> None:
        self._file, self._left = file, seconds
        self._compiled: dict[str, Any] = {}

    def whole(self, expression: str, name: str) -> bool:
        """Whether the expression is the whole name."""
        return self._try("fullmatch", expression, name)

    def ending(self, key: str, name: str) -> bool:
        """peft's rule: the key is the whole name, or all of it behind some dot."""
        return self._try("match", PEFT_FORM.format(key), name)

    def _try(self, how: str, expression: str, name: str) -> bool:
        begun = time.monotonic()
        compiled = self._compiled.get(expression) or self._compiled.setdefault(expression, _regex().compile(expression))
        try:
            found = getattr(compiled, how)(name, timeout=max(self._left, 1e-3)) is not None
        except TimeoutError:
            self._left = 0.0
        else:
            self._left -= time.monotonic() - begun
        if self._left <= 0:
            raise MedSteerError(
                f"'{self._file}' has patterns that take more than {SECONDS:g} s to compare with the names of modules. "
                "Don't trust this LoRA, or write plain names for the patterns."
            )
        return found
