"""The published ways to steer, by name: operator, strength, rows and blocks (METHOD: arXiv 2603.07066, PolypSteer)."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..errors import MedSteerError

CUSTOM = "custom"  # no preset: what the node's other inputs say


@dataclass(frozen=True)
class Preset:
    """What a published method sets. `sites` may be written for its own depth, as `8-15 of 28`."""

    operator: str
    parameters: Mapping[str, Any]
    rows: str
    sites: str

    def describe(self) -> str:
        """What it sets, in words."""
        parts = [f"strength {self.parameters['strength']:g}"]
        parts.append("norm kept" if self.parameters["keep_norm"] else "norm not kept")
        return f"{self.operator}, {', '.join(parts)}, rows {self.rows}, blocks {self.sites}"


MEDSTEER, POLYPSTEER = "MedSteer (paper)", "PolypSteer"
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        MEDSTEER: Preset("suppress", MappingProxyType({"strength": 2.0, "keep_norm": True}), "all", "all"),
        POLYPSTEER: Preset(
            "suppress", MappingProxyType({"strength": 2.5, "keep_norm": False}), "positive", "8-15 of 28"
        ),
    }
)


def find_preset(name: str) -> Preset:
    """The preset of that name. Raises MedSteerError for a name that there is not."""
    if name not in PRESETS:
        raise MedSteerError(f"There is no preset '{name}'; choose {CUSTOM}, {' or '.join(PRESETS)}.")
    return PRESETS[name]


def scaled_sites(sites: str, depth: int) -> str:
    """`sites` for a model of `depth` blocks: a range of another depth, `8-15 of 28`, as the blocks that it falls on."""
    span, _, of = sites.partition(" of ")
    if not of:
        return sites
    first, last = (int(word) for word in span.split("-"))
    start, stop = first * depth // int(of), -(-(last + 1) * depth // int(of))
    return f"{start}-{stop - 1}"
