"""What steering does to one activation tensor: pure functions (operators.py has them by name).

`a` is (..., C), usually (rows, tokens, C); `d` is (R, C) with orthonormal rows, on the device and in the dtype of `a`.
Nothing here casts the activation or waits for the device. `a` itself is changed, and given back, only with `in_place`:
that is for an activation that nobody else holds, spares one copy of it, and wants `a` contiguous.
METHOD: suppress, ablate, add, set, switch on the output of a text cross-attention (MedSteer, arXiv 2603.07066, and
what follows from it); affine is ours.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

_TINY = torch.finfo(torch.float32).tiny


def suppress(a: Tensor, d: Tensor, strength: float, keep_norm: bool, in_place: bool = False) -> Tensor:
    """`a - strength * sum_i max(0, a.d_i) d_i` for each token, then rescaled to the token's former norm if asked.

    METHOD: suppress (arXiv 2603.07066). Tokens that point away from `d` stay as they are. At strength 2 this is a
    reflection of every positive projection, which keeps the norm by itself, so rescaling is left out there.
    """
    if strength == 0:
        return a
    before = _length(a) if keep_norm and strength != 2 else None
    steered = _add_rows(a, linear(a, d).clamp_min_(0), d, -strength, in_place)
    return steered if before is None else _restore_norm(before, steered, in_place)


def ablate(a: Tensor, d: Tensor, keep_norm: bool, in_place: bool = False) -> Tensor:
    """`a - sum_i (a.d_i) d_i`: no token has any projection on `d` left."""
    before = _length(a) if keep_norm else None
    steered = _add_rows(a, linear(a, d), d, -1.0, in_place)
    return steered if before is None else _restore_norm(before, steered, in_place)


def add(a: Tensor, d: Tensor, amount: Tensor, keep_norm: bool, in_place: bool = False) -> Tensor:
    """`a + sum_i amount_i d_i`, the same for every token; `amount` (R,) is signed, in the activation's own units."""
    before = _length(a) if keep_norm else None
    moved = amount @ d
    steered = a.add_(moved) if in_place else a + moved
    return steered if before is None else _restore_norm(before, steered, in_place)


def set_point(a: Tensor, d: Tensor, means: Tensor, strength: float, keep_norm: bool, in_place: bool = False) -> Tensor:
    """`a + strength * sum_i (means_i - a.d_i) d_i`: each token's projections moved toward `means` (R,).

    METHOD: set. At strength 1 every token has the projections `means`, beyond it is as far on the other side.
    """
    if strength == 0:
        return a
    before = _length(a) if keep_norm else None
    # The difference is rounded once: in half precision the two mostly cancel.
    surplus = linear(a, d, -means)
    steered = _add_rows(a, surplus, d, -strength, in_place)
    return steered if before is None else _restore_norm(before, steered, in_place)


def switch(a: Tensor, d: Tensor, target: Tensor, strength: float, keep_norm: bool, in_place: bool = False) -> Tensor:
    """`a + strength * sum_i max(0, a.d_i) (target_i - d_i)`: what `suppress` takes away is added along `target` (R, C).

    METHOD: switch (source to target). Tokens that point away from `d` stay as they are. The target's rows need not be
    orthogonal to the source's.
    """
    if strength == 0:
        return a
    before = _length(a) if keep_norm else None
    steered = _add_rows(a, linear(a, d).clamp_min_(0), target - d, strength, in_place)
    return steered if before is None else _restore_norm(before, steered, in_place)


def affine(
    a: Tensor,
    d: Tensor,
    readers: Tensor,
    offsets: Tensor,
    strength: float,
    focus: float,
    keep_norm: bool,
    in_place: bool = False,
) -> Tensor:
    """`a - strength * gain * sum_i (readers_i.a + offsets_i) d_i`: at strength 1 what the absent prompt would give.

    `readers` (R, C) and `offsets` (R,) predict, from the activation itself, its coordinates along `d` of what the
    prompt put into it. So unlike `suppress` each token loses its own amount, in a direction of its own within the
    span of `d`. A relative is affine steering (Singh et al. 2024, "Representation Surgery", arXiv 2402.09631), which
    maps one class's mean and covariance onto the other's. Ours is another map: an oblique one of low rank, fitted by
    regression on both prompts' activations at the same state (see affine.py).

    With `focus` 0 the gain is 1. Else it is `e / (e + focus**2 * mean(e))`, where e is a token's squared change and the
    mean is over the row's tokens (Wiener's gain with that share of the mean as noise): tokens in which little would
    change, as outside a focal finding, are left nearly as they are.
    """
    if strength == 0:
        return a
    before = _length(a) if keep_norm else None
    # The offset is added before the sum is rounded: in half precision the two mostly cancel.
    amounts = linear(a, readers, offsets)
    if focus:
        amounts = amounts * _wiener_gain(amounts, focus)
    steered = _add_rows(a, amounts, d, -strength, in_place)
    return steered if before is None else _restore_norm(before, steered, in_place)


def _wiener_gain(amounts: Tensor, focus: float) -> Tensor:
    """`e / (e + focus**2 * mean(e))` for each token, (..., tokens, 1), in the dtype of `amounts` (..., tokens, R)."""
    wide = torch.promote_types(amounts.dtype, torch.float32)  # a half-precision square overflows
    energy = torch.linalg.vector_norm(amounts, dim=-1, keepdim=True, dtype=wide).square_()
    # A token that is not finite is lost by itself; the others' mean is without it.
    mean = energy.where(energy.isfinite(), torch.nan).nanmean(dim=-2, keepdim=True)
    whole = torch.add(energy, mean, alpha=focus**2)
    return energy.div_(whole.clamp_min_(_TINY)).to(amounts.dtype)


def _add_rows(a: Tensor, coefficients: Tensor, d: Tensor, scale: float, in_place: bool) -> Tensor:
    """`a + scale * coefficients @ d` in one kernel; coefficients (..., R)."""
    if len(d) == 1:  # a column times a row: faster for many tokens than a matrix product, and on all threads
        return a.addcmul_(coefficients, d, value=scale) if in_place else torch.addcmul(a, coefficients, d, value=scale)
    coefficients = coefficients.reshape(-1, len(d))
    if in_place:
        a.view(-1, a.shape[-1]).addmm_(coefficients, d, alpha=scale)  # `view` refuses what it would have to copy
        return a
    return torch.addmm(a.reshape(-1, a.shape[-1]), coefficients, d, alpha=scale).view(a.shape)


def _length(a: Tensor) -> Tensor:
    """Each token's norm, (..., 1)."""
    wide = torch.promote_types(a.dtype, torch.float32)  # a half-precision sum of squares overflows
    return torch.linalg.vector_norm(a, dim=-1, keepdim=True, dtype=wide)


def _restore_norm(before: Tensor, steered: Tensor, in_place: bool) -> Tensor:
    """`steered` with each token rescaled to the norm `before`.

    A token of which nothing but rounding is left (it was zero, or lay wholly along the direction) is not rescaled:
    that would blow the rounding up to a random direction of full length.
    """
    after = _length(steered)
    ratio = before / after.clamp_min(torch.finfo(after.dtype).tiny)
    meaningful = after > before.mul(4 * torch.finfo(steered.dtype).eps)
    factor = ratio.where(meaningful, 1.0).to(steered.dtype)
    return steered.mul_(factor) if in_place else steered * factor
