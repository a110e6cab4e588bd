"""The steering rules as values chosen by name: which one, with which parameters, and what it needs of a vector."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Protocol

from torch import Tensor

from ..errors import MedSteerError
from ..files.inside import shown
from .rules import ablate, add, affine, set_point, suppress, switch

TOWARD = ("present", "absent")  # in the order of a step's projections

LARGEST = 1e6  # of a strength: far beyond sense, and far within what float32 can multiply


class Step(Protocol):
    """What an operator needs to know of a site at a noise level (see pathology_vector.StepDirection)."""

    directions: Tensor
    gaps: Tensor
    projections: Tensor
    readers: Tensor | None
    offsets: Tensor | None
    target: Tensor | None


@dataclass(frozen=True)
class Operator(ABC):
    """A steering rule with its parameters. Call it with an activation and a step of the vector."""

    name: ClassVar[str] = ""
    # What only some vectors have, and this operator can't do without:
    needs_readers: ClassVar[bool] = False  # readers and offsets
    needs_gaps: ClassVar[bool] = False  # how far apart the class means are
    needs_class_means: ClassVar[bool] = False  # where the class means are along the directions
    needs_target: ClassVar[bool] = False  # a second vector, whose directions are the step's target

    @property
    def is_identity(self) -> bool:
        """Whether the operator returns every activation untouched."""
        return getattr(self, "strength", None) == 0

    @abstractmethod
    def __call__(self, a: Tensor, step: Step, in_place: bool = False) -> Tensor:
        """`a` (..., C) steered; the very same object when the operator is the identity.

        With `in_place` always the same object, which is changed: for a contiguous activation that nobody else holds.
        """

    def among(self, share: float) -> "Operator":
        """This operator for activations that hold ``share`` of an image's tokens, as if the others did not change."""
        return self

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

    def __call__(self, a: Tensor, step: Step, in_place: bool = False) -> Tensor:
        return suppress(a, step.directions, self.strength, self.keep_norm, in_place)


@dataclass(frozen=True)
class Ablate(Operator):
    """Take the whole projection away, positive or negative."""

    name: ClassVar[str] = "ablate"
    keep_norm: bool = False

    def __call__(self, a: Tensor, step: Step, in_place: bool = False) -> Tensor:
        return ablate(a, step.directions, self.keep_norm, in_place)


@dataclass(frozen=True)
class Add(Operator):
    """Move every token by `strength` class gaps toward the finding (`present`) or away from it (`absent`)."""

    name: ClassVar[str] = "add"
    needs_gaps: ClassVar[bool] = True
    strength: float = 1.0
    toward: str = "present"
    keep_norm: bool = False

    def __post_init__(self) -> None:
        _check_strength(self)
        _check_toward(self)

    def __call__(self, a: Tensor, step: Step, in_place: bool = False) -> Tensor:
        if self.is_identity:
            return a
        signed = self.strength if self.toward == "present" else -self.strength
        return add(a, step.directions, signed * step.gaps, self.keep_norm, in_place)


@dataclass(frozen=True)
class SetPoint(Operator):
    """Move every token's projection to a class's mean: 0 leaves it, 1 is that mean, beyond exaggerates."""

    name: ClassVar[str] = "set"
    needs_class_means: ClassVar[bool] = True
    strength: float = 1.0
    toward: str = "absent"
    keep_norm: bool = False

    def __post_init__(self) -> None:
        _check_strength(self)
        _check_toward(self)

    def __call__(self, a: Tensor, step: Step, in_place: bool = False) -> Tensor:
        if self.is_identity:
            return a
        means = step.projections[TOWARD.index(self.toward)]
        return set_point(a, step.directions, means, self.strength, self.keep_norm, in_place)


@dataclass(frozen=True)
class Switch(Operator):
    """Take `strength` times every positive projection away and add as much along a second vector's direction."""

    name: ClassVar[str] = "switch"
    needs_target: ClassVar[bool] = True
    strength: float = 1.0
    keep_norm: bool = False

    def __post_init__(self) -> None:
        _check_strength(self)

    def __call__(self, a: Tensor, step: Step, in_place: bool = False) -> Tensor:
        if self.is_identity:
            return a
        if step.target is None:
            raise needs_second_vector(self.name)
        if step.target.shape != step.directions.shape:
            raise MedSteerError(
                f"switch: the target vector has {_counted(step.target)} a step, and the source vector "
                f"{_counted(step.directions)}; the same was expected. Use two vectors of one model and one rank."
            )
        return switch(a, step.directions, step.target, self.strength, self.keep_norm, in_place)


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

    def among(self, share: float) -> "Affine":
        # `focus` squared stands before the mean over all tokens, and only a share of them is there to be averaged.
        return replace(self, focus=self.focus * share**0.5)

    def __call__(self, a: Tensor, step: Step, in_place: bool = False) -> Tensor:
        if self.is_identity:
            return a
        if step.readers is None or step.offsets is None:
            raise needs_same_state(self.name)
        parts = step.directions, step.readers, step.offsets
        return affine(a, *parts, self.strength, self.focus, self.keep_norm, in_place)


OPERATORS: dict[str, type[Operator]] = {kind.name: kind for kind in (Suppress, Ablate, Add, SetPoint, Switch, Affine)}


def needs_same_state(operator: str) -> MedSteerError:
    """The error for an operator that reads activations and a vector that does not say how."""
    return MedSteerError(
        f"The operator '{operator}' needs a vector that was extracted with noise 'same state' or the estimator leace, "
        "and this vector was not. Set noise to 'same state' in Extract Pathology Vector and extract it again, or "
        "choose another operator."
    )


def needs_second_vector(operator: str) -> MedSteerError:
    """The error for an operator that goes from one finding to another, and was given one vector only."""
    return MedSteerError(
        f"The operator '{operator}' needs a second vector, the target whose finding takes the first one's place, and "
        "none was given. Connect one to the input 'target', or choose another operator."
    )


def needs_statistics(operator: str) -> MedSteerError:
    """The error for an operator that counts in class units, and a vector that does not know its classes."""
    return MedSteerError(
        f"The operator '{operator}' counts in units of the two classes' means, and this vector does not have them: it "
        "was imported or combined. Choose suppress or ablate, or extract the vector from this model."
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


def _check_toward(operator: Operator) -> None:
    if (given := operator.toward) not in TOWARD:
        raise MedSteerError(f"{operator.name}: toward is {given!r}; 'present' or 'absent' was expected.")


def _counted(directions: Tensor) -> str:
    return f"{directions.shape[0]} directions of {directions.shape[1]} channels"


def _check_number(operator: Operator, name: str) -> None:
    given = getattr(operator, name)
    try:
        number = float(given)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST:  # also for NaN
        raise MedSteerError(
            f"{operator.name}: {name} is {shown(given)}; a finite number was expected, {LARGEST:g} at most either way."
        )
    object.__setattr__(operator, name, number)
