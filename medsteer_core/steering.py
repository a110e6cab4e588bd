"""Steering plans: which operator acts with which vector, at which sites, when in the schedule, on which rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .errors import MedSteerError
from .operators import Operator, Step, needs_same_state, needs_second_vector, needs_statistics
from .pathology_vector import PathologyVector, StepDirection
from .schedule import SigmaWindow, StrengthCurve
from .token_map import token_weights

ALL_ROWS = "all"
# Rows of one call as (start, stop) pairs, slices or ranges of step 1; None is every row.
RowRange = slice | range | tuple[int, int]
RowRanges = Sequence[RowRange] | None
RowNames = Mapping[str, RowRanges] | Callable[[str], RowRanges]


@dataclass(frozen=True, eq=False)
class Steering:
    """One Steer node. `sites` are names of the vector's; `rows` is `all`, `positive`, `negative` or a cond's name.

    target: the second vector of operators that need one; mask: (1 or images, H, W) in 0..1, how much of the steering
    each part of the image gets; curve: what the strength is multiplied with over the window
    """

    vector: PathologyVector
    operator: Operator
    window: SigmaWindow
    sites: tuple[str, ...]
    rows: str = ALL_ROWS
    target: PathologyVector | None = None
    mask: Tensor | None = None
    curve: StrengthCurve | None = None

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

    def step_at(self, site: str, sigma: float) -> StepDirection:
        """What the vector says of a site at this noise level, with the target's directions if there is one."""
        step = self.vector.at(site, sigma)
        return step if self.target is None else replace(step, target=self.target.at(site, sigma).directions)


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


def apply_steering(
    activation: Tensor, operator: Operator, step: Step, rows: RowRanges = None, weights: Tensor | None = None
) -> Tensor:
    """`activation` (rows, tokens, C) steered in the given rows (None: all); the others stay bit-identical.

    A new tensor, or the same object where nothing changes. `step` is on the activation's device, in its dtype, and so
    are `weights` (masks, tokens, 1): how much of the change each token gets, row r of mask r modulo masks. A token of
    weight 0 stays bit-identical.
    """
    if operator.is_identity:
        return activation
    if weights is not None:
        return _apply_weighted(activation, operator, step, rows, weights)
    if rows is None:
        return operator(activation, step)
    chosen = [_slice(entry, activation.shape[0]) for entry in rows]
    chosen = [part for part in chosen if part.stop > part.start]
    if not chosen:
        return activation
    if chosen == [slice(0, activation.shape[0])]:
        return operator(activation, step)
    steered = activation.clone()
    for part in chosen:
        steered[part] = operator(activation[part], step)
    return steered


def _apply_weighted(activation: Tensor, operator: Operator, step: Step, rows: RowRanges, weights: Tensor) -> Tensor:
    count = activation.shape[0]
    chosen = [slice(0, count)] if rows is None else [_slice(entry, count) for entry in rows]
    steered = activation.clone()
    for part in chosen:
        if part.stop > part.start:
            masks = weights[torch.arange(part.start, part.stop, device=weights.device) % len(weights)]
            # lerp gives exactly its ends at weights 0 and 1
            steered[part] = torch.lerp(activation[part], operator(activation[part], step), masks)
    return steered


def _slice(entry: RowRange, count: int) -> slice:
    start, stop = entry if isinstance(entry, tuple) else (entry.start or 0, entry.stop)
    stop = count if stop is None else stop
    if getattr(entry, "step", None) not in (None, 1) or not 0 <= start <= stop <= count:
        raise MedSteerError(f"Rows {entry} were asked for, but the model call has rows 0 to {count - 1}.")
    return slice(start, stop)


@dataclass
class _AtSigma:
    """The directions for one noise level: on the host, and for each (device, dtype) that asked."""

    sigma: float
    host: dict[tuple[int, str], StepDirection]  # (index of the steering, site) -> step
    operators: dict[int, Operator]  # by index of the steering
    cast: dict[tuple[torch.device, torch.dtype], dict[tuple[int, str], StepDirection]] = field(default_factory=dict)

    def on(self, device: torch.device, dtype: torch.dtype) -> dict[tuple[int, str], StepDirection]:
        key = (torch.device(device), dtype)
        if key not in self.cast:
            self.cast[key] = _cast_together(self.host, *key)
        return self.cast[key]


class PreparedPlan:
    """A plan during one sampling run. Make one for each run: it holds the run's state and nothing outlives it.

    `prepare` once before each model call, then `apply` at each site. Directions are looked up and cast once for each
    (sigma, device, dtype); only the current sigma's are held. Afterwards `touches[i]` says how often steering i
    changed something (sites x calls), and `untouched()` names the steerings that never did.
    """

    def __init__(self, plan: SteeringPlan) -> None:
        self.plan = plan
        self.touches: list[int] = [0] * len(plan.steerings)
        self._step: _AtSigma | None = None
        self._masks: dict[tuple[Any, ...], Tensor] = {}

    def prepare(self, sigma: float, dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
        """Get ready for a model call; returns the sites that can change at this sigma, () if there are none."""
        sigma = float(sigma)
        step = self._step
        if step is None or step.sigma != sigma:
            # Replaced and never changed in place: another device's thread may still read the old one.
            acting = {i: s.operator_at(sigma) for i, s in enumerate(self.plan.steerings) if s.acts_at(sigma)}
            step = self._step = _AtSigma(sigma, self._look_up(sigma), acting)
        if step.host:
            step.on(device, dtype)
        active = {site for _, site in step.host}
        return tuple(site for site in self.plan.sites if site in active)

    def _look_up(self, sigma: float) -> dict[tuple[int, str], StepDirection]:
        return {
            (index, site): steering.step_at(site, sigma)
            for index, steering in enumerate(self.plan.steerings)
            if steering.acts_at(sigma)
            for site in steering.sites
        }

    def apply(
        self,
        site: str,
        activation: Tensor,
        rows: RowNames,
        everything: RowRanges = None,
        size: tuple[int, ...] | None = None,
    ) -> Tensor:
        """`activation` (rows, tokens, C) of `site` after every steering that acts now, in the plan's order.

        `rows` tells where a named cond's rows are in this call: a mapping or a function from name to ranges (None:
        every row; empty or missing: none, as in a call that holds only the other cond). `all` is not looked up: it is
        the rows `everything` (None: every row). `size` is the latent's (height, width), which masks need. Raises
        MedSteerError when the activation's width is not the vector's.
        """
        if self._step is None:
            raise RuntimeError("prepare() comes before apply()")
        steps = self._step.on(activation.device, activation.dtype) if self._step.host else {}
        for index, steering in enumerate(self.plan.steerings):
            step = steps.get((index, site))
            if step is None:
                continue
            _check_width(site, activation, step)
            weights = None if steering.mask is None else self._weights(index, steering.mask, activation, size)
            chosen = _ranges(rows, steering.rows, everything)
            steered = apply_steering(activation, self._step.operators[index], step, chosen, weights)
            self.touches[index] += steered is not activation
            activation = steered
        return activation

    def _weights(self, index: int, mask: Tensor, activation: Tensor, size: tuple[int, ...] | None) -> Tensor:
        """The mask of steering ``index`` for an activation's tokens, on its device and in its dtype."""
        if size is None or len(size) != 2:
            raise MedSteerError("A mask on Steer works for image models only, and this one makes video. Remove it.")
        tokens = activation.shape[1]
        key = (index, tokens, tuple(size), activation.device, activation.dtype)
        if key not in self._masks:
            self._masks[key] = token_weights(mask, tokens, *size).to(activation.device, activation.dtype)
        return self._masks[key]

    def untouched(self) -> tuple[Steering, ...]:
        """The steerings that should have changed something (their operator is no identity) and did not."""
        pairs = zip(self.plan.steerings, self.touches, strict=True)
        return tuple(steering for steering, count in pairs if count == 0 and not steering.operator.is_identity)


def _ranges(rows: RowNames, name: str, everything: RowRanges) -> RowRanges:
    if name == ALL_ROWS:
        return everything
    return rows(name) if callable(rows) else rows.get(name, ())


def _check_width(site: str, activation: Tensor, step: StepDirection) -> None:
    if activation.ndim != 3 or activation.shape[-1] != step.directions.shape[-1]:
        raise MedSteerError(
            f"Site '{site}' of the model gave an activation of shape {tuple(activation.shape)}; the vector wants "
            f"(rows, tokens, {step.directions.shape[-1]}). Extract the vector from this model."
        )


def _cast_together(
    steps: Mapping[tuple[int, str], StepDirection], device: torch.device, dtype: torch.dtype
) -> dict[tuple[int, str], StepDirection]:
    """All steps on `device` in `dtype` by one transfer, instead of several small ones for each site."""
    # Field by field, so that the fields whose widths are multiples of 8 come first and stay aligned.
    order = ("directions", "readers", "target", "gaps", "projections", "offsets")
    places = [(key, name) for name in order for key, step in steps.items() if getattr(step, name) is not None]
    tensors = [getattr(steps[key], name) for key, name in places]
    joined = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(device=device, dtype=dtype)
    parts = joined.split([tensor.numel() for tensor in tensors])
    values: dict[tuple[int, str], dict[str, Tensor]] = {key: {} for key in steps}
    for (key, name), part, tensor in zip(places, parts, tensors, strict=True):
        values[key][name] = part.view(tensor.shape)
    return {key: StepDirection(**found) for key, found in values.items()}
