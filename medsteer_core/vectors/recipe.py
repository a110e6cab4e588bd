"""How a vector was made, short enough to travel with every image: what to type in to make it again."""

from typing import Any

from .pathology_vector import PathologyVector

# Of provenance, what says how good a vector is and not how it was made; and what a texts' hash already tells.
REPORTS = ("separability", "pair_spread", "explained", "explained_by_site", "observations", "degenerate", "token_pairs",
           "shrinkage", "dropped_sites")  # fmt: skip


def recipe(vector: PathologyVector, name: str = "") -> dict[str, Any]:
    """The vector's short hash, the file's `name`, and its provenance without the reports; plain JSON."""
    made = {key: value for key, value in vector.provenance.items() if key not in REPORTS}
    return {"vector": vector.short_hash(), **({"file": name} if name else {}), "made": _without_reports(made)}


def _without_reports(value: Any) -> Any:
    """Also of the vectors that one was combined of."""
    if isinstance(value, dict):
        return {key: _without_reports(part) for key, part in value.items() if key not in REPORTS}
    return [_without_reports(part) for part in value] if isinstance(value, list | tuple) else value
