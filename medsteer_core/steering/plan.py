"""Steering plans: which operator acts with which vector, at which sites, when in the schedule, on which rows."""

from dataclasses import dataclass, replace

from torch import Tensor

from ..errors import MedSteerError
from ..vectors.pathology_vector import PathologyVector, StepDirection
from ..vectors.schedule import SigmaWindow, StrengthCurve
from .operators import Operator, needs_same_state, needs_second_vector, needs_statistics
from .presets import CUSTOM
from .rows import ALL_ROWS


@dataclass(frozen=True, eq=False)
class Steering:
    """One Steer node. `sites` are names of the vector's; `rows` is `all`, `positive`, `negative` or a cond's name.

    target: the second vector of operators that need one; mask: (1 or images, H, W) in 0..1, how much of the steering
    each part of the image gets; curve: what the strength is multiplied with over the window;
    recipe: by whose name all that was set, if by any (see recipes.py)
    span: window and curve as fractions of the schedule and the curve's name, from which they are worked out when a run
    starts (a node may change the schedule after Steer); None where they are what they are
    """

    vector: PathologyVector
    operator: Operator
    window: SigmaWindow
    sites: tuple[str, ...]
    rows: str = ALL_ROWS
    target: PathologyVector | None = None
    mask: Tensor | None = None
    curve: StrengthCurve | None = None
    recipe: str = CUSTOM
    span: tuple[float, float, str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(self.sites))
        if not self.sites:
            raise MedSteerError("A steering needs at least one site; write 'all' in sites to use every one.")
        if not self.rows:
            raise MedSteerError("rows is empty; write 'all', 'positive', 'negative' or the name of a conditioning.")
        for site in self.sites:
            self.vector.channels(site)  # raises for a site that the vector lacks
        if self.operator.needs_readers and not self.vector.has_readers:
            raise needs_same_state(self.operator.name)
        check_statistics(self.vector, self.operator)
        if self.operator.needs_target and self.target is None:
            raise needs_second_vector(self.operator.name)
        if self.target is not None:
            for site in self.sites:
                self.target.channels(site)
        if self.curve is not None:
            _times(self.operator, 0.5)  # raises for an operator without a strength
        if self.mask is not None:
            _check_mask(self.mask)

    def acts_at(self, sigma: float) -> bool:
        """Whether anything can change at this noise level."""
        return sigma in self.window and not self.operator_at(sigma).is_identity

    def operator_at(self, sigma: float) -> Operator:
        """The operator with the strength that it has at this noise level."""
        return self.operator if self.curve is None else _times(self.operator, self.curve.at(sigma))

    def steps_at(self, sigma: float) -> dict[str, StepDirection]:
        """What the vector says of each site at this noise level, with the target's directions if there is one."""
        steps = self.vector.at_sites(self.sites, sigma)
        if self.target is None:
            return steps
        targets = self.target.at_sites(self.sites, sigma)
        return {site: replace(step, target=targets[site].directions) for site, step in steps.items()}


@dataclass(frozen=True, eq=False)
class SteeringPlan:
    """Steerings in the order in which they act. Immutable: `then` gives a longer plan and leaves this one alone."""

    steerings: tuple[Steering, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "steerings", tuple(self.steerings))
        widths: dict[str, int] = {}
        for steering in self.steerings:
            for site in steering.sites:
                width = steering.vector.channels(site)
                if widths.setdefault(site, width) != width:
                    raise MedSteerError(
                        f"Two vectors are chained whose site '{site}' has {widths[site]} and {width} channels: they "
                        "come from different models. Use vectors of this model."
                    )

    def then(self, steering: Steering) -> "SteeringPlan":
        """This plan with `steering` after it."""
        return SteeringPlan((*self.steerings, steering))

    def scaled(self, multiple: float) -> "SteeringPlan":
        """This plan with every operator's strength times `multiple`; 1 is this plan.

        Raises MedSteerError for an operator without a strength.
        """
        if multiple == 1:
            return self
        return SteeringPlan(tuple(_scaled(steering, multiple) for steering in self.steerings))

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that something can change, in execution order; () for a plan that changes nothing."""
        active = [steering for steering in self.steerings if not steering.operator.is_identity]
        touched = {site for steering in active for site in steering.sites}
        order = dict.fromkeys(site for steering in active for site in steering.vector.site_names)
        return tuple(site for site in order if site in touched)


def check_statistics(vector: PathologyVector, operator: Operator) -> None:
    """Raise MedSteerError for an operator that needs class statistics and a vector that does not know them."""
    wanted = {"gaps": operator.needs_gaps, "projections": operator.needs_class_means}
    if not operator.is_identity and any(needed and entry in vector.unknown for entry, needed in wanted.items()):
        raise needs_statistics(operator.name)


def _scaled(steering: Steering, multiple: float) -> Steering:
    return replace(steering, operator=_times(steering.operator, multiple))


def _check_mask(mask: Tensor) -> None:
    if mask.ndim != 3 or 0 in mask.shape:
        raise MedSteerError(f"The mask has shape {tuple(mask.shape)}; (1 or images, height, width) was expected.")
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise MedSteerError("The mask has values outside 0 to 1; 0 (leave) to 1 (steer) was expected.")
    if not bool((mask > 0).any()):
        raise MedSteerError("The mask is black everywhere, so nothing would be steered. Paint where to steer.")


def _times(operator: Operator, multiple: float) -> Operator:
    if not hasattr(operator, "strength"):
        raise MedSteerError(
            f"The operator {operator.name} has no strength, so {multiple:g} times it is nothing. Write 1, or steer "
            "with another operator."
        )
    return replace(operator, strength=operator.strength * multiple)
