"""Everything in MedSteer that is true without a graph: values, estimators, operators, schedules and scores.

`pair` is the shortest way to a first pair from Python (see `run.quick`).
"""

from typing import Any

__all__ = ["pair"]


def __getattr__(name: str) -> Any:
    """Names of `__all__`, imported when they are first asked for: ComfyUI's start does not wait for them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .run.quick import pair

    return pair
