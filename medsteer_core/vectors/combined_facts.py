"""What a combined vector says of itself: its parts, their overlap, what is unknown of it."""

from collections.abc import Sequence
from typing import Any

from .match import fingerprint, overlap
from .pathology_vector import PathologyVector

CLASS_FIELDS = ("centres", "projections", "spreads")


def label(vector: PathologyVector) -> str:
    """A vector in a word or two: what was combined, its prompts, or its hash."""
    facts = vector.provenance
    if "combined" in facts:
        return f"[{facts['combined']['expression']}]"
    prompts = facts.get("prompts", {})
    texts = [(prompts.get(side) or {}).get("text") for side in ("present", "absent")]
    return f"({texts[0]} - {texts[1]})" if all(texts) else f"({vector.short_hash()})"


def is_combined(vector: PathologyVector) -> bool:
    """Whether a vector was made here, also after it was saved and loaded."""
    return "combined" in vector.provenance


def describe_combined(vector: PathologyVector) -> str:
    """What was combined, warnings included, in a few lines of plain text."""
    facts = vector.provenance
    made = facts["combined"]
    sizes = sorted({vector.channels(name) for name in vector.site_names})
    lines = [
        f"{made['expression']}  [{vector.short_hash()}]",
        f"{len(vector.site_names)} sites of {', '.join(map(str, sizes))} channels, {vector.steps} levels, rank "
        f"{vector.rank}",
    ]
    lines += [_overlap_line(found) for found in made["overlap"]]
    if unknown := facts.get("unknown"):
        lines.append(
            f"Not known of the result: {', '.join(unknown)}. Operators that need them refuse it; suppress and ablate "
            "never do."
        )
    if not all(isinstance(part["provenance"].get("model"), dict) for part in made["parts"]):
        lines.append("Warning: not every part says which model it is from, so that could not be compared.")
    if facts.get("degenerate"):
        lines.append(f"Warning: nothing is left at {facts['degenerate']} site-steps; the nearest step's stand in.")
    if facts.get("dropped_sites"):
        lines.append(f"Warning: nothing is left at {len(facts['dropped_sites'])} sites; they are left out.")
    return "\n".join(lines)


def combined_facts(
    vectors: Sequence[PathologyVector], how: str, expression: str, unknown: set[str], **more: Any
) -> dict[str, Any]:
    """Provenance: what was combined, with the parts' own provenance, and their overlap pair by pair."""
    pairs = [(i, j) for i in range(len(vectors)) for j in range(i + 1, len(vectors))]
    facts: dict[str, Any] = {
        "estimator": "combined",
        "combined": {
            "how": how,
            "expression": expression,
            **more,
            "parts": [{"hash": vector.content_hash(), "provenance": vector.provenance} for vector in vectors],
            "overlap": [{"parts": [i, j], **_overlap(vectors[i], vectors[j])} for i, j in pairs],
        },
    }
    known = [fingerprint(vector) for vector in vectors]
    facts["model"] = next((model for model in known if model is not None), None)
    if unknown:
        facts["unknown"] = [name for name in ("gaps", *CLASS_FIELDS) if name in unknown]
    return facts


def _overlap_line(found: dict[str, Any]) -> str:
    first, second = (number + 1 for number in found["parts"])
    warning = (
        "Warning: they overlap, so steering along one moves the other's finding too. " if found["reported"] else ""
    )
    return (
        f"{warning}|cos| of parts {first} and {second}: {found['mean']:.2f} on average, at most {found['max']:.2f} at "
        f"{found['site']}, sigma {found['sigma']:.4g}"
    )


def _overlap(a: PathologyVector, b: PathologyVector) -> dict[str, Any]:
    found = overlap(a, b)
    return {
        "mean": round(found.mean, 4),
        "max": round(found.largest, 4),
        "site": found.site,
        "sigma": found.sigma,
        "reported": found.worth_telling,
    }
