"""What a vector's provenance says of unseen samples: how well each site and step separates them, and how steadily."""

from collections.abc import Mapping, Sequence
from typing import Any

from .axes import AXES, mean_axis
from .pathology_vector import PathologyVector
from .samples_record import SampleRecord
from .separability import report

KEY = "separability"
AUROC, STABILITY = "auroc", "stability"
LEAST_SAMPLES = 4
MOST_SAMPLES = 512
# Numbers (samples x levels x channels of all sites) that the report looks at: ten seconds of one core or less. The mean
# is taken faster than the other axes are solved for.
MOST_NUMBERS, MOST_NUMBERS_OF_MEANS = 10**7, 3 * 10**7
DIGITS = 3


def separability_facts(
    present: SampleRecord, absent: SampleRecord, estimator: str, names: Sequence[str]
) -> dict[str, Any]:
    """Held-out AUROC and split-half stability of the sites `names` for provenance: {site: [S numbers]} each.

    Both are of the axis that `estimator` reads by. Of many samples the first are taken, as many as `samples` says, so
    that the report's time is bounded. Needs LEAST_SAMPLES of each prompt.
    """
    axis = AXES[estimator]
    widths = sum(present.sites[name].shape[2] for name in names)
    fitting = (MOST_NUMBERS_OF_MEANS if axis is mean_axis else MOST_NUMBERS) // (len(present.sigmas) * widths)
    count = min(present.count, absent.count, MOST_SAMPLES, max(LEAST_SAMPLES, fitting))
    found = report(_first(present, names, count), _first(absent, names, count), axis)
    for measure in (AUROC, STABILITY):
        found[measure] = {name: [round(v, DIGITS) for v in values] for name, values in found[measure].items()}
    return {**found, "samples": count}


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
        means = {name: sum(values) / len(values) for name, values in auroc.items()}
        best = max(means, key=means.__getitem__)
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
