"""Steering some rows of one activation: the operator on these, every other row bit-identical."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import MedSteerError
from .operators import Operator, Step

ALL_ROWS = "all"
# Rows of one call as (start, stop) pairs, slices or ranges of step 1; None is every row.
RowRange = slice | range | tuple[int, int]
RowRanges = Sequence[RowRange] | None


def apply_steering(
    activation: Tensor,
    operator: Operator,
    step: Step,
    rows: RowRanges = None,
    weights: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """`activation` (rows, tokens, C) steered in the given rows (None: all); the others stay bit-identical.

    A new tensor, or the same object where nothing changes; with `in_place` always the same object, which is changed:
    for a contiguous one that nobody else holds. `step` is on the activation's device, in its dtype, and so are
    `weights` (masks, tokens, 1): how much of the change each token gets, row r of mask r modulo masks. A token of
    weight 0 stays bit-identical.
    """
    if operator.is_identity:
        return activation
    parts = parts_of(rows, activation.shape[0])
    return steer_parts(activation, operator, step, parts, masks_of(weights, parts), in_place)


def parts_of(rows: RowRanges, count: int) -> tuple[slice, ...]:
    """The ranges in an activation of `count` rows as slices, without the empty ones.

    Raises MedSteerError for rows that it does not have.
    """
    chosen = [slice(0, count)] if rows is None else [_slice(entry, count) for entry in rows]
    return tuple(part for part in chosen if part.stop > part.start)


def masks_of(weights: Tensor | None, parts: Sequence[slice]) -> tuple[Tensor, ...] | None:
    """Of masks (masks, tokens, 1) those of each part's rows, (rows, tokens, 1); row r has mask r modulo masks."""
    if weights is None:
        return None
    rows = [torch.arange(part.start, part.stop, device=weights.device) for part in parts]
    return tuple(weights[numbers % len(weights)] for numbers in rows)


def steer_parts(
    activation: Tensor,
    operator: Operator,
    step: Step,
    parts: Sequence[slice],
    masks: Sequence[Tensor] | None = None,
    in_place: bool = False,
) -> Tensor:
    """`apply_steering` for parts that `parts_of` gave and masks that `masks_of` gave, by an operator that acts."""
    if not parts:
        return activation
    if masks is None and parts[0].stop - parts[0].start == activation.shape[0]:
        return operator(activation, step, in_place)
    steered = activation if in_place else activation.clone()
    for number, part in enumerate(parts):
        here = activation[part]
        if masks is not None:
            # lerp gives exactly its ends at weights 0 and 1
            steered[part] = torch.lerp(here, operator(here, step), masks[number])
        elif (result := operator(here, step, in_place)) is not here:
            steered[part] = result
    return steered


def _slice(entry: RowRange, count: int) -> slice:
    start, stop = entry if isinstance(entry, tuple) else (entry.start or 0, entry.stop)
    stop = count if stop is None else stop
    if getattr(entry, "step", None) not in (None, 1) or not 0 <= start <= stop <= count:
        raise MedSteerError(f"Rows {entry} were asked for, but the model call has rows 0 to {count - 1}.")
    return slice(start, stop)
