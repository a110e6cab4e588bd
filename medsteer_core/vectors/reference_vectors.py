"""Published files as pathology vectors and back. What the files don't hold is marked as unknown, never made up."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import MedSteerError
from .pathology_vector import UNIT_TOLERANCE, PathologyVector, SiteDirections
from .reference_files import NPZ_FORMAT, ReferenceField
from .site_algebra import nearest

ZERO_LENGTH = 1e-6  # a direction shorter than this is none
UNKNOWN = ("gaps", "centres", "projections", "spreads")  # zeros in a vector whose provenance names them as unknown


def to_vector(
    field: ReferenceField, sites: Mapping[str, int | None], sigmas: Tensor, schedule: str, flow: bool = False
) -> PathologyVector:
    """A vector of rank 1 for a model with these `sites` (name -> channels, None: not known), in execution order.

    `sigmas` (S,) are the noise levels of the file's steps, as the user says, and `schedule` is what they come from. A
    direction stays as it is in the file when its length is 1 within rounding, and is normalised otherwise. A step
    without a direction borrows the nearest step's, and a site without any is left out, as extraction does. Raises
    MedSteerError when steps, blocks or widths don't match, naming both, and for values that are not finite.
    """
    names = list(sites)
    steps, layers, channels = field.values.shape
    if len(sigmas) != steps:
        raise MedSteerError(
            f"'{field.name}' has {steps} steps, and {schedule} gives {len(sigmas)}: each step needs the sigma that "
            f"it was made at. Name the schedule that the file was made with, at {steps} steps."
        )
    if max(field.layers) >= len(names) or (field.all_layers and layers != len(names)):
        blocks = f"{layers} blocks" if field.all_layers else f"block {max(field.layers)} (the first is 0)"
        raise MedSteerError(
            f"'{field.name}' was made for another model: it has {blocks}, and this model has {len(names)} blocks. "
            "Choose a file that was made with a model of this depth."
        )
    chosen = {names[layer]: place for place, layer in enumerate(field.layers)}
    for name in chosen:
        if sites[name] not in (None, channels):
            raise MedSteerError(
                f"'{field.name}' was made for another model: its directions have {channels} channels, and site "
                f"'{name}' of this model has {sites[name]}. Choose a file that was made with a model of this width."
            )
    directions, usable, normalised = _unit_directions(field)
    kept = [name for name in names if name in chosen and usable[:, chosen[name]].any()]
    if not kept:
        raise MedSteerError(f"'{field.name}' holds only zeros, so there is no direction in it. Choose another file.")
    made = {name: _site(directions[:, chosen[name]], usable[:, chosen[name]]) for name in kept}
    facts = {
        "estimator": "imported",
        "source": {"format": field.format, "file": field.name, "sha256": field.sha256},
        "prompts": {"present": _prompt(field.positive_prompts), "absent": _prompt(field.negative_prompts)},
        "seeds": list(field.seeds),
        "scheduler": schedule,
        "steps": steps,
        "unknown": list(UNKNOWN),
        "degenerate": sum(int((~usable[:, chosen[name]]).sum()) for name in kept),
        "normalised": normalised,
    }
    if dropped := [name for name in names if name not in kept]:
        facts["dropped_sites"] = dropped
    return PathologyVector(made, sigmas, facts, flow)


def from_vector(vector: PathologyVector, name: str = "") -> ReferenceField:
    """The directions of a vector as PolypSteer's format holds them; sigmas and class statistics have no place there.

    Raises MedSteerError for a rank above 1, for widths that vary, and for sites that are no numbered blocks.
    """
    widths = sorted({vector.channels(site) for site in vector.site_names})
    if vector.rank != 1:
        raise MedSteerError(
            f"This vector has rank {vector.rank}, and PolypSteer's .npz holds one direction a block and step. Extract "
            "a vector with noise 'paired' or 'unpaired', or keep this one with Save Pathology Vector."
        )
    if len(widths) > 1:
        raise MedSteerError(
            f"This vector's blocks have {', '.join(map(str, widths))} channels, and PolypSteer's .npz holds one width "
            "for all. Keep it with Save Pathology Vector."
        )
    numbers = [re.fullmatch(r"blocks\.(\d+)\.\D+", site) for site in vector.site_names]
    if None in numbers:
        raise MedSteerError(
            f"PolypSteer's .npz numbers the blocks of a PixArt, and this vector has the site "
            f"'{vector.site_names[numbers.index(None)]}'. Keep it with Save Pathology Vector."
        )
    prompts = vector.provenance.get("prompts", {})
    seeds = vector.provenance.get("seeds") or [vector.provenance.get("seed")]
    return ReferenceField(
        torch.stack([site.directions[:, 0] for site in vector.sites.values()], dim=1),
        tuple(int(number[1]) for number in numbers),
        NPZ_FORMAT, False, name, "", _texts(prompts, "present"), _texts(prompts, "absent"),
        tuple(seed for seed in seeds if isinstance(seed, int) and 0 <= seed < 2**64),
    )  # fmt: skip


def is_imported(vector: PathologyVector) -> bool:
    """Whether a vector comes from a published file, also after it was saved and loaded."""
    return vector.provenance.get("estimator") == "imported"


def describe_imported(vector: PathologyVector) -> str:
    """What an imported vector is, and what nobody knows about it, in a few lines of plain text."""
    facts = vector.provenance
    source, prompts = facts.get("source", {}), facts.get("prompts", {})
    present, absent = (
        (prompts.get(side) or {}).get("text") or f"{side}, text unknown" for side in ("present", "absent")
    )
    sites, width = len(vector.site_names), vector.channels(vector.site_names[0])
    seeds = len(facts.get("seeds", ())) or "unknown"
    lines = [
        f"{present} - {absent}  [{vector.short_hash()}]",
        f"imported from {source.get('file', '?')} ({source.get('format', '?')}), {seeds} seeds",
        f"{vector.steps} levels from sigma {vector.sigmas[0]:.4g} to {vector.sigmas[-1]:.4g}, taken from "
        f"{facts.get('scheduler', '?')}: the file does not hold them",
        f"{sites} of {sites + len(facts.get('dropped_sites', ()))} sites, {width} channels",
        "The file says neither with which weights and LoRAs it was made nor how far the classes lie apart: "
        "operators that need directions alone, such as suppress and ablate, can use it.",
    ]
    if facts.get("normalised"):
        lines.append(f"Warning: {facts['normalised']} directions did not have length 1 and were normalised.")
    if facts.get("degenerate"):
        lines.append(f"Warning: {facts['degenerate']} directions were zero; the nearest step's stand in.")
    return "\n".join(lines)


def _unit_directions(field: ReferenceField) -> tuple[Tensor, Tensor, int]:
    """Directions (S, L, C) of length 1 where there is one, where that is (S, L), and how many had another length."""
    if not bool(torch.isfinite(field.values).all()):
        step, place, _ = (~torch.isfinite(field.values)).nonzero()[0].tolist()
        raise MedSteerError(
            f"'{field.name}' has values that are not finite (NaN, infinity, or beyond float32) at step {step}, block "
            f"{field.layers[place]}; a direction was expected. Choose another file."
        )
    lengths = torch.linalg.vector_norm(field.values, dim=-1, dtype=torch.float64)
    usable = lengths > ZERO_LENGTH
    # Well inside of what PathologyVector allows, which measures the square and in float32.
    other = usable & ((lengths - 1).abs() > UNIT_TOLERANCE / 4)
    units = (field.values.double() / lengths.where(usable, 1.0)[..., None]).float()
    return torch.where(other[..., None], units, field.values), usable, int(other.sum())


def _site(directions: Tensor, usable: Tensor) -> SiteDirections:
    """One site from directions (S, C), of which those not `usable` (S,) give way to the nearest step's."""
    steps, channels = directions.shape
    return SiteDirections(
        directions=directions[nearest(usable)][:, None],
        gaps=torch.zeros(steps, 1),
        centres=torch.zeros(steps, channels),
        projections=torch.zeros(steps, 2, 1),
        spreads=torch.zeros(steps, 2),
    )


def _prompt(texts: tuple[str, ...]) -> dict[str, object]:
    """`text`: the file's prompts, each once; `texts`: all of them as they stand there."""
    return {"text": " / ".join(dict.fromkeys(texts)) or None, "texts": list(texts)}


def _texts(prompts: Mapping[str, object], side: str) -> tuple[str, ...]:
    known = prompts.get(side) if isinstance(prompts, Mapping) else None
    known = known if isinstance(known, Mapping) else {}
    return tuple(known.get("texts") or [known[key] for key in ("text",) if known.get(key)])
