"""What a vector's provenance says of unseen samples: how well each site and step separates them, and how steadily."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..vectors.pathology_vector import PathologyVector
from .axes import AXES, mean_axis
from .samples_record import SampleRecord
from .separability import held_out_projections, report

KEY = "separability"
AUROC, STABILITY, PROJECTIONS = "auroc", "stability", "projections"
SIDES = ("present", "absent")
Measure = Mapping[str, Sequence[float]]
LEAST_SAMPLES = 4
MOST_SAMPLES = 512
# Numbers (samples x levels x channels of all sites) that the report looks at: ten seconds of one core or less. The mean
# is taken faster than the other axes are solved for.
MOST_NUMBERS, MOST_NUMBERS_OF_MEANS = 10**7, 3 * 10**7
DIGITS = 3
# Projections of each class that a vector keeps: enough for a histogram, and a few kilobytes at most.
MOST_PROJECTIONS = 64


@dataclass(frozen=True)
class Projections:
    """Where unseen samples lie along the direction at one site and step, from the midpoint of the classes.

    present, absent: one number a sample, in the activations' units
    """

    site: str
    step: int
    present: tuple[float, ...]
    absent: tuple[float, ...]


def separability_facts(
    present: SampleRecord, absent: SampleRecord, estimator: str, names: Sequence[str]
) -> dict[str, Any]:
    """Held-out AUROC and split-half stability of the sites `names` for provenance: {site: [S numbers]} each.

    Both are of the axis that `estimator` reads by. Of many samples the first are taken, as many as `samples` says, so
    that the report's time is bounded. `projections` are held-out projections of the first MOST_PROJECTIONS of each
    class at the site with the best mean AUROC, at its best step. Needs LEAST_SAMPLES of each prompt.
    """
    axis = AXES[estimator]
    widths = sum(present.sites[name].shape[2] for name in names)
    fitting = (MOST_NUMBERS_OF_MEANS if axis is mean_axis else MOST_NUMBERS) // (len(present.sigmas) * widths)
    count = min(present.count, absent.count, MOST_SAMPLES, max(LEAST_SAMPLES, fitting))
    sides = [_first(record, names, count) for record in (present, absent)]
    found = report(*sides, axis)
    for measure in (AUROC, STABILITY):
        found[measure] = {name: [round(v, DIGITS) for v in values] for name, values in found[measure].items()}
    site, step = _best(found[AUROC], found[STABILITY])
    along = zip(SIDES, held_out_projections(*sides, site, step, axis), strict=True)
    projections = {"site": site, "step": step, **{side: _short(values) for side, values in along}}
    return {**found, "samples": count, PROJECTIONS: projections}


def _best(auroc: Measure, stability: Measure) -> tuple[str, int]:
    """The site with the largest mean AUROC and its largest step; of equals the steadiest, and of these the first."""
    site = max(auroc, key=lambda name: (_mean(auroc[name]), _mean(stability[name])))
    steps = list(zip(auroc[site], stability[site], strict=True))
    return site, steps.index(max(steps))


def _short(values: Tensor) -> list[float]:
    # significant digits: some sites' activations are small
    return [float(f"{value:.{DIGITS}g}") for value in values[:MOST_PROJECTIONS].tolist()]


def _first(record: SampleRecord, names: Sequence[str], count: int) -> SampleRecord:
    sites = {name: record.sites[name][:count] for name in names}
    return SampleRecord(sites, record.sigmas, record.samples[:count])


def recorded(vector: PathologyVector, measure: str) -> dict[str, list[float]]:
    """One measure of a vector's report as {site: [S numbers]}, every site in order; {} where it has no (sound) one."""
    facts = vector.provenance.get(KEY)
    values = facts.get(measure) if isinstance(facts, Mapping) else None
    if not isinstance(values, Mapping) or not all(_sound(values.get(name), vector.steps) for name in vector.site_names):
        return {}
    return {name: list(values[name]) for name in vector.site_names}


def recorded_projections(vector: PathologyVector) -> Projections | None:
    """The held-out projections that a vector keeps; None where it has no (sound) ones, as vectors of older versions."""
    facts = vector.provenance.get(KEY)
    found = facts.get(PROJECTIONS) if isinstance(facts, Mapping) else None
    if not isinstance(found, Mapping):
        return None
    site, step, sides = found.get("site"), found.get("step"), [found.get(side) for side in SIDES]
    fits = site in vector.sites if isinstance(site, str) else False
    fits = fits and isinstance(step, int) and 0 <= step < vector.steps and all(map(_numbers, sides))
    return Projections(site, step, *map(tuple, sides)) if fits else None


def _numbers(values: Any) -> bool:
    return (
        isinstance(values, list | tuple)
        and 0 < len(values) <= MOST_PROJECTIONS
        and all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    )


def _sound(values: Any, steps: int) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) == steps
        and all(isinstance(value, int | float) and 0.0 <= value <= 1.0 for value in values)
    )


def describe_separability(vector: PathologyVector) -> list[str]:
    """The report in lines of plain text; why there is none, where the vector knows; [] where it does not."""
    facts, samples = vector.provenance.get(KEY), vector.provenance.get("samples")
    auroc, stability = recorded(vector, AUROC), recorded(vector, STABILITY)
    if auroc and stability:
        means = {name: _mean(values) for name, values in auroc.items()}
        best, _ = _best(auroc, stability)
        halves = [value for values in stability.values() for value in values]
        return [
            f"separability at unseen samples: AUROC {_mean(means.values()):.3f} on average, best "
            f"{means[best]:.3f} at {best}",
            f"stability: |cos| {_mean(halves):.3f} between the directions of two halves of the samples, on average",
        ]
    if isinstance(facts, Mapping) and isinstance(facts.get("left_out"), str):
        return [f"no separability report: {facts['left_out']}"]
    sampled = vector.provenance.get("noise") in ("paired", "unpaired")
    if sampled and isinstance(samples, int) and samples < LEAST_SAMPLES:
        return [f"no separability report: {samples} samples a prompt, and {LEAST_SAMPLES} or more are needed"]
    return []


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)
