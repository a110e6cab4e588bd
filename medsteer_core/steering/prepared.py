"""A steering plan while it runs: what is looked up once a noise level, once a model call, and done at each site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import MedSteerError
from ..vectors.pathology_vector import StepDirection
from .operators import Operator
from .plan import Steering, SteeringPlan
from .rows import ALL_ROWS, RowRanges, masks_of, parts_of, steer_parts
from .token_map import token_weights

RowNames = Mapping[str, RowRanges] | Callable[[str], RowRanges]
# What acts at one site, in the plan's order: (index of the steering, operator, step).
_Acts = tuple[tuple[int, Operator, StepDirection], ...]


@dataclass
class _AtSigma:
    """The directions for one noise level: on the host, and for each (device, dtype) that asked."""

    sigma: float
    host: dict[tuple[int, str], StepDirection]  # (index of the steering, site) -> step
    operators: dict[int, Operator]  # by index of the steering
    sites: tuple[str, ...]  # those that can change, in execution order
    cast: dict[tuple[torch.device, torch.dtype], dict[tuple[int, str], StepDirection]] = field(default_factory=dict)
    acts: dict[tuple[torch.device, torch.dtype], dict[str, _Acts]] = field(default_factory=dict)

    def on(self, device: torch.device, dtype: torch.dtype) -> Mapping[str, _Acts]:
        """What acts at each site, on this device and in this dtype."""
        key = (device, dtype)
        if key not in self.acts:
            self.cast[key] = cast = _cast_together(self.host, *key)
            acts: dict[str, _Acts] = {}
            for (index, site), step in cast.items():  # by steering first, as in the plan
                acts[site] = (*acts.get(site, ()), (index, self.operators[index], step))
            self.acts[key] = acts
        return self.acts[key]


@dataclass(frozen=True, eq=False)
class _Way:
    """How a steering acts on an activation: which of its rows, by which masks, or on the whole of it."""

    parts: tuple[slice, ...]
    masks: tuple[Tensor, ...] | None
    whole: bool


class PreparedPlan:
    """A plan during one sampling run. Make one for each run: it holds the run's state and nothing outlives it.

    `prepare` once before each model call, then `for_call` (or `apply`) at each site. Directions are looked up and cast
    once for each (sigma, device, dtype); only the current sigma's are held. Afterwards `touches[i]` says how often
    steering i changed something (sites x calls), and `untouched()` names the steerings that never did.
    """

    def __init__(self, plan: SteeringPlan) -> None:
        self.plan = plan
        self.touches: list[int] = [0] * len(plan.steerings)
        self._sites = plan.sites
        self._step: _AtSigma | None = None
        self._masks: dict[tuple[Any, ...], Tensor] = {}

    def prepare(self, sigma: float, dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
        """Get ready for a model call; returns the sites that can change at this sigma, () if there are none."""
        sigma = float(sigma)
        step = self._step
        if step is None or step.sigma != sigma:
            # Replaced and never changed in place: another device's thread may still read the old one.
            acting = {i: s.operator_at(sigma) for i, s in enumerate(self.plan.steerings) if s.acts_at(sigma)}
            steerings = self.plan.steerings
            host = {(i, site): step for i in acting for site, step in steerings[i].steps_at(sigma).items()}
            active = {site for _, site in host}
            sites = tuple(site for site in self._sites if site in active)
            step = self._step = _AtSigma(sigma, host, acting, sites)
        if step.host:
            step.on(torch.device(device), dtype)
        return step.sites

    def for_call(
        self,
        rows: RowNames,
        everything: RowRanges = None,
        size: tuple[int, ...] | None = None,
        share: float = 1.0,
    ) -> CallSteering:
        """The steering of one model call, after `prepare`; whose rows are where is asked once for each steering.

        `rows` tells where a named cond's rows are in this call: a mapping or a function from name to ranges (None:
        every row; empty or missing: none, as in a call that holds only the other cond). `all` is not looked up: it is
        `everything` (None: every row). `size` is that of the call's latent, which masks need. Activations hold `share`
        of the image's tokens.
        """
        if self._step is None:
            raise RuntimeError("prepare() comes before for_call() and apply()")
        return CallSteering(self, self._step, rows, everything, size, share)

    def apply(
        self,
        site: str,
        activation: Tensor,
        rows: RowNames,
        everything: RowRanges = None,
        size: tuple[int, ...] | None = None,
    ) -> Tensor:
        """`activation` of one site in a call of its own: see `for_call` and `CallSteering.apply`."""
        return self.for_call(rows, everything, size).apply(site, activation)

    def weights(self, index: int, activation: Tensor, size: tuple[int, ...] | None) -> Tensor | None:
        """The mask of steering ``index``, if any, for an activation's tokens, on its device and in its dtype."""
        mask = self.plan.steerings[index].mask
        if mask is None:
            return None
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


class CallSteering:
    """A prepared plan in one model call. Where each steering's rows are, and their masks, is looked up once.

    Example: `call = prepared.for_call(rows)`, then `output = call.apply(site, output)` at each site.
    """

    def __init__(
        self,
        prepared: PreparedPlan,
        step: _AtSigma,
        rows: RowNames,
        everything: RowRanges,
        size: tuple[int, ...] | None,
        share: float = 1.0,
    ) -> None:
        self._prepared, self._step, self._size, self._share = prepared, step, size, share
        self._rows, self._everything = rows, everything
        self._form: tuple[Any, ...] = ()  # device, dtype and shape of the activations that `_ways` is for
        self._acts: Mapping[str, _Acts] = {}
        self._ways: dict[int, _Way] = {}  # by steering

    def apply(self, site: str, activation: Tensor, in_place: bool = False) -> Tensor:
        """`activation` (rows, tokens, C) of `site` after every steering that acts now, in the plan's order.

        With `in_place` the activation itself is changed: for a contiguous one that nobody else holds. Raises
        MedSteerError when the activation's width is not the vector's.
        """
        if not self._step.host:
            return activation
        # Most sites of a call give one form of activation: what follows from it is worked out once.
        form = (activation.device, activation.dtype, activation.shape)
        if form != self._form:
            self._form, self._ways = form, {}
            self._acts = self._step.on(*form[:2])
            if self._share < 1:
                self._acts = {
                    own: tuple((index, operator.among(self._share), step) for index, operator, step in acts)
                    for own, acts in self._acts.items()
                }
        for index, operator, step in self._acts.get(site, ()):
            if activation.ndim != 3 or activation.shape[-1] != step.directions.shape[-1]:
                raise _wrong_width(site, activation, step)
            way = self._ways.get(index) or self._way(index, activation)
            if way.parts:
                if way.whole:
                    activation = operator(activation, step, in_place)
                else:
                    activation = steer_parts(activation, operator, step, way.parts, way.masks, in_place)
                self._prepared.touches[index] += 1
        return activation

    def _way(self, index: int, activation: Tensor) -> _Way:
        """Which rows a steering changes in activations of this form, and by which masks."""
        count = activation.shape[0]
        named = self._prepared.plan.steerings[index].rows
        parts = parts_of(_ranges(self._rows, named, self._everything), count)
        masks = masks_of(self._prepared.weights(index, activation, self._size), parts) if parts else None
        whole = masks is None and parts == (slice(0, count),)
        way = self._ways[index] = _Way(parts, masks, whole)
        return way


def _ranges(rows: RowNames, name: str, everything: RowRanges) -> RowRanges:
    if name == ALL_ROWS:
        return everything
    return rows(name) if callable(rows) else rows.get(name, ())


def _wrong_width(site: str, activation: Tensor, step: StepDirection) -> MedSteerError:
    return MedSteerError(
        f"Site '{site}' of the model gave an activation of shape {tuple(activation.shape)}; the vector wants "
        f"(rows, tokens, {step.directions.shape[-1]}). Extract the vector from this model."
    )


def _cast_together(
    steps: Mapping[tuple[int, str], StepDirection], device: torch.device, dtype: torch.dtype
) -> dict[tuple[int, str], StepDirection]:
    """All steps on `device` in `dtype` by one transfer, instead of several small ones for each site.

    As they are where they are there already; nothing changes a step's tensors.
    """
    if all(step.directions.device == device and step.directions.dtype == dtype for step in steps.values()):
        return dict(steps)
    # Field by field, so that the fields whose widths are multiples of 8 come first and stay aligned.
    order = ("directions", "readers", "target", "gaps", "projections", "offsets")
    places = [(key, name) for name in order for key, step in steps.items() if getattr(step, name) is not None]
    tensors = [getattr(steps[key], name) for key, name in places]
    joined = torch.cat([tensor.reshape(-1) for tensor in tensors])
    if dtype == torch.float16 and (most := float(joined.abs().max())) > torch.finfo(dtype).max:
        raise MedSteerError(
            f"The vector holds values up to {most:.3g}, and float16, in which the model runs, ends at 65,504. Run the "
            "model in bfloat16 or float32."
        )
    joined = joined.to(device=device, dtype=dtype)
    parts = joined.split([tensor.numel() for tensor in tensors])
    values: dict[tuple[int, str], dict[str, Tensor]] = {key: {} for key in steps}
    for (key, name), part, tensor in zip(places, parts, tensors, strict=True):
        values[key][name] = part.view(tensor.shape)
    return {key: StepDirection(**found) for key, found in values.items()}
