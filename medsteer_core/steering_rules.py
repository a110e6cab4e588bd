"""What steering does to one activation tensor: pure functions (operators.py has them by name).

`a` is (..., C), usually (rows, tokens, C); `d` is (R, C) with orthonormal rows, on the device and in the dtype of `a`.
Nothing here casts the activation, waits for the device, or changes `a` in place.
METHOD: suppress, ablate, add, set, switch on the output of a text cross-attention (MedSteer, arXiv 2603.07066, and
what follows from it); affine is ours.
"""

import torch
from torch import Tensor


def suppress(a: Tensor, d: Tensor, strength: float, keep_norm: bool) -> Tensor:
    """`a - strength * sum_i max(0, a.d_i) d_i` for each token, then rescaled to the token's former norm if asked.

    METHOD: suppress (arXiv 2603.07066). Tokens that point away from `d` stay as they are. At strength 2 this is a
    reflection of every positive projection, which keeps the norm by itself, so rescaling is left out there.
    """
    if strength == 0:
        return a
    steered = _add_rows(a, (a @ d.mT).clamp_min(0), d, -strength)
    return _restore_norm(a, steered) if keep_norm and strength != 2 else steered


def ablate(a: Tensor, d: Tensor, keep_norm: bool) -> Tensor:
    """`a - sum_i (a.d_i) d_i`: no token has any projection on `d` left."""
    steered = _add_rows(a, a @ d.mT, d, -1.0)
    return _restore_norm(a, steered) if keep_norm else steered


def add(a: Tensor, d: Tensor, amount: Tensor, keep_norm: bool) -> Tensor:
    """`a + sum_i amount_i d_i`, the same for every token; `amount` (R,) is signed, in the activation's own units."""
    steered = a + amount @ d
    return _restore_norm(a, steered) if keep_norm else steered


def set_point(a: Tensor, d: Tensor, means: Tensor, strength: float, keep_norm: bool) -> Tensor:
    """`a + strength * sum_i (means_i - a.d_i) d_i`: each token's projections moved toward `means` (R,).

    METHOD: set. At strength 1 every token has the projections `means`, beyond it is as far on the other side.
    """
    if strength == 0:
        return a
    # The difference is rounded once: in half precision the two mostly cancel.
    missing = torch.addmm(means, a.reshape(-1, a.shape[-1]), d.mT, alpha=-1)
    steered = _add_rows(a, missing, d, strength)
    return _restore_norm(a, steered) if keep_norm else steered


def switch(a: Tensor, d: Tensor, target: Tensor, strength: float, keep_norm: bool) -> Tensor:
    """`a + strength * sum_i max(0, a.d_i) (target_i - d_i)`: what `suppress` takes away is added along `target` (R, C).

    METHOD: switch (source to target). Tokens that point away from `d` stay as they are. The target's rows need not be
    orthogonal to the source's.
    """
    if strength == 0:
        return a
    steered = _add_rows(a, (a @ d.mT).clamp_min(0), target - d, strength)
    return _restore_norm(a, steered) if keep_norm else steered


def affine(
    a: Tensor, d: Tensor, readers: Tensor, offsets: Tensor, strength: float, focus: float, keep_norm: bool
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
    # The offset is added before the sum is rounded: in half precision the two mostly cancel.
    amounts = torch.addmm(offsets, a.reshape(-1, a.shape[-1]), readers.mT)
    if focus:
        amounts = amounts * _wiener_gain(amounts.view(*a.shape[:-1], -1), focus).reshape(-1, 1)
    steered = _add_rows(a, amounts, d, -strength)
    return _restore_norm(a, steered) if keep_norm else steered


def _wiener_gain(amounts: Tensor, focus: float) -> Tensor:
    """`e / (e + focus**2 * mean(e))` for each token, (..., tokens, 1), in the dtype of `amounts` (..., tokens, R)."""
    energy = amounts.float().square().sum(dim=-1, keepdim=True)  # a half-precision square overflows
    noise = focus**2 * energy.mean(dim=-2, keepdim=True)
    return (energy / (energy + noise).clamp_min(torch.finfo(energy.dtype).tiny)).to(amounts.dtype)


def _add_rows(a: Tensor, coefficients: Tensor, d: Tensor, scale: float) -> Tensor:
    """`a + scale * coefficients @ d` in one kernel; coefficients (..., R)."""
    channels, rank = a.shape[-1], d.shape[0]
    return torch.addmm(a.reshape(-1, channels), coefficients.reshape(-1, rank), d, alpha=scale).view(a.shape)


def _restore_norm(a: Tensor, steered: Tensor) -> Tensor:
    """`steered` with each token rescaled to the norm it has in `a`.

    A token of which nothing but rounding is left (it was zero, or lay wholly along the direction) is not rescaled:
    that would blow the rounding up to a random direction of full length.
    """
    wide = torch.promote_types(a.dtype, torch.float32)  # a half-precision sum of squares overflows
    before = torch.linalg.vector_norm(a, dim=-1, keepdim=True, dtype=wide)
    after = torch.linalg.vector_norm(steered, dim=-1, keepdim=True, dtype=wide)
    ratio = before / after.clamp_min(torch.finfo(wide).tiny)
    meaningful = after > 4 * torch.finfo(a.dtype).eps * before
    return steered * torch.where(meaningful, ratio, 1.0).to(a.dtype)
