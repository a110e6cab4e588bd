"""What steering does to one activation tensor: pure functions, and the same as values chosen by name.

`a` is (..., C), usually (rows, tokens, C); `d` is (R, C) with orthonormal rows, on the device and in the dtype of `a`.
Nothing here casts the activation, waits for the device, or changes `a` in place.
METHOD: suppress, ablate, add on the output of a text cross-attention (MedSteer, arXiv 2603.07066); affine is ours.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .errors import MedSteerError


class Step(Protocol):
    """What an operator needs to know of a site at a noise level (see pathology_vector.StepDirection)."""

    directions: Tensor
    gaps: Tensor
    readers: Tensor | None
    offsets: Tensor | None


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


@dataclass(frozen=True)
class Operator(ABC):
    """A steering rule with its parameters. Call it with an activation and a step of the vector."""

    name: ClassVar[str] = ""
    needs_readers: ClassVar[bool] = False  # whether only vectors with readers will do

    @property
    def is_identity(self) -> bool:
        """Whether the operator returns every activation untouched."""
        return getattr(self, "strength", None) == 0

    @abstractmethod
    def __call__(self, a: Tensor, step: Step) -> Tensor:
        """`a` (..., C) steered; the very same object when the operator is the identity."""

    def to_dict(self) -> dict[str, Any]:
        """Name and parameters, for provenance; `from_dict` reads it back."""
        return {"name": self.name, **asdict(self)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Operator":
        """The operator that `to_dict` described. Raises MedSteerError for an unknown name or parameter."""
        parameters = dict(values)
        return make_operator(parameters.pop("name", None), **parameters)


@dataclass(frozen=True)
class Suppress(Operator):
    """Take `strength` times every positive projection away; the preset of MedSteer is 2 with the norm kept."""

    name: ClassVar[str] = "suppress"
    strength: float = 2.0
    keep_norm: bool = True

    def __post_init__(self) -> None:
        _check_strength(self)

    def __call__(self, a: Tensor, step: Step) -> Tensor:
        return suppress(a, step.directions, self.strength, self.keep_norm)


@dataclass(frozen=True)
class Ablate(Operator):
    """Take the whole projection away, positive or negative."""

    name: ClassVar[str] = "ablate"
    keep_norm: bool = False

    def __call__(self, a: Tensor, step: Step) -> Tensor:
        return ablate(a, step.directions, self.keep_norm)


@dataclass(frozen=True)
class Add(Operator):
    """Move every token by `strength` class gaps toward the finding (`present`) or away from it (`absent`)."""

    name: ClassVar[str] = "add"
    strength: float = 1.0
    toward: str = "present"
    keep_norm: bool = False

    def __post_init__(self) -> None:
        _check_strength(self)
        if self.toward not in ("present", "absent"):
            raise MedSteerError(f"add: toward is {self.toward!r}; 'present' or 'absent' was expected.")

    def __call__(self, a: Tensor, step: Step) -> Tensor:
        if self.is_identity:
            return a
        signed = self.strength if self.toward == "present" else -self.strength
        return add(a, step.directions, signed * step.gaps, self.keep_norm)


@dataclass(frozen=True)
class Affine(Operator):
    """Take away what the present prompt put in, token by token: 1 as the absent prompt would, beyond exaggerates.

    `focus` above 0 spares the tokens in which little would change.
    """

    name: ClassVar[str] = "affine"
    needs_readers: ClassVar[bool] = True
    strength: float = 1.0
    focus: float = 0.0
    keep_norm: bool = False

    def __post_init__(self) -> None:
        _check_strength(self)
        _check_number(self, "focus")
        if self.focus < 0:
            raise MedSteerError(f"affine: focus is {self.focus}; 0 (every token) or more was expected.")

    def __call__(self, a: Tensor, step: Step) -> Tensor:
        if self.is_identity:
            return a
        if step.readers is None or step.offsets is None:
            raise needs_same_state(self.name)
        return affine(a, step.directions, step.readers, step.offsets, self.strength, self.focus, self.keep_norm)


OPERATORS: dict[str, type[Operator]] = {kind.name: kind for kind in (Suppress, Ablate, Add, Affine)}


def needs_same_state(operator: str) -> MedSteerError:
    """The error for an operator that reads activations and a vector that does not say how."""
    return MedSteerError(
        f"The operator '{operator}' needs a vector that was extracted with noise 'same state', and this vector was "
        "not. Set noise to 'same state' in Extract Pathology Vector and extract it again, or choose another operator."
    )


def make_operator(name: str, **parameters: Any) -> Operator:
    """The operator called `name`. Raises MedSteerError for an unknown name or parameter."""
    if name not in OPERATORS:
        raise MedSteerError(f"There is no operator {name!r}; choose one of {', '.join(OPERATORS)}.")
    kind = OPERATORS[name]
    known = [entry.name for entry in fields(kind)]
    if unknown := sorted(set(parameters) - set(known)):
        raise MedSteerError(f"The operator {name!r} has no parameter {', '.join(unknown)}; it has {', '.join(known)}.")
    return kind(**parameters)


def _check_strength(operator: Operator) -> None:
    _check_number(operator, "strength")


def _check_number(operator: Operator, name: str) -> None:
    given = getattr(operator, name)
    try:
        number = float(given)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise MedSteerError(f"{operator.name}: {name} is {given!r}; a finite number was expected.")
    object.__setattr__(operator, name, number)
