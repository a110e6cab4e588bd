"""What the quality benchmark compares: concept pairs, seeds, and each method's parameters.

Parameters are chosen on development seeds only (`dev.py bench quality --split development --preset ...`); the numbers
that are reported come from the test seeds, which no choice has seen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from medsteer_core.errors import MedSteerError
from medsteer_core.scores import scorer as evaluate
from medsteer_core.steering import presets
from medsteer_core.steering.recipes import ADD, AUTOMATIC, CONCEPT, RECIPES, REMOVE_DIFFUSE, REMOVE_FOCAL

# First seed of each split; extraction has its own. The ranges are wider than any --n that is allowed.
SPLITS = {"development": 20000, "test": 30000}
MOST = 10000
EXTRACTION_SEED, COVARIANCE_SEED, CEILING_SEED = 1000, 10000, 50000
COVARIANCE_SAMPLES, DRAWS = 24, 4  # runs of each class behind the random direction, and how many are drawn


@dataclass(frozen=True)
class Pair:
    """A concept pair: from the class ``source`` to the class ``target``."""

    source: str
    target: str

    @property
    def name(self) -> str:
        return f"{self.source} -> {self.target}"

    @property
    def slug(self) -> str:
        """The name as a folder's name."""
        return f"{self.source} to {self.target}".replace(" ", "_")

    @property
    def kind(self) -> str:
        """``adding`` when the target has a finding that the source lacks, else ``removing``."""
        more = set(evaluate.FINDINGS_OF[self.target]) - set(evaluate.FINDINGS_OF[self.source])
        return "adding" if more else "removing"

    @property
    def diffuse(self) -> bool:
        """Whether the finding changes the whole wall, so that structure is the anatomy's and not the pixels'."""
        return evaluate.structure_measure(self.source, self.target) == "anatomy_drift"


PAIRS = (
    Pair("polyps", "normal cecum"),
    Pair("ulcerative colitis", "normal cecum"),
    Pair("esophagitis", "normal z-line"),
    Pair("dyed lifted polyps", "polyps"),
    Pair("normal cecum", "polyps"),
)


# Two findings at once, and what is added to an image: beside `PAIRS` where every direction counts.
ALL_PAIRS = (
    *PAIRS,
    Pair("dyed lifted polyps", "normal cecum"),
    Pair("polyps", "dyed lifted polyps"),
    Pair("normal cecum", "ulcerative colitis"),
)


def check_pairs(
    options: argparse.ArgumentParser, names: Collection[str] | None, known: Sequence[Pair] = PAIRS, kind: str = "pair"
) -> None:
    """End with a usage error when ``--pairs`` names what is not among the known pairs."""
    if unknown := set(names or ()) - {pair.name for pair in known}:
        there = "; ".join(pair.name for pair in known)
        options.error(f"no {kind} {', '.join(sorted(unknown))}; there are: {there}")


# Whose vector steers in the control "other_vector": a finding of another kind.
OTHER = {
    PAIRS[0]: PAIRS[2],
    PAIRS[1]: PAIRS[2],
    PAIRS[2]: PAIRS[0],
    PAIRS[3]: PAIRS[1],
    PAIRS[4]: PAIRS[2],
    ALL_PAIRS[5]: PAIRS[2],
    ALL_PAIRS[6]: PAIRS[1],
    ALL_PAIRS[7]: PAIRS[2],
}


@dataclass(frozen=True)
class Preset:
    """A way to steer with the pair's vector (source minus target): operator, where, when, and how it is extracted.

    ``sites`` may be written for another depth, as ``8-15 of 28``. ``strengths`` are swept, ``headline`` is one of them.
    ``lock`` and what begins with it are Counterfactual Sampler's; ``prompt``: whether the counterfactual has the
    target's prompt beside the steering.
    """

    operator: str
    strengths: tuple[float, ...]
    headline: float
    parameters: Mapping[str, Any] = field(default_factory=dict)
    rows: str = "all"
    sites: str = "all"
    start: float = 0.0
    end: float = 1.0
    noise: str = "paired"
    samples: int = 32
    lock: str = "none"
    lock_threshold: float = 0.2
    lock_dilation: int = 1
    lock_smoothing: int = 0
    prompt: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "strengths", tuple(float(value) for value in self.strengths))
        if self.headline not in self.strengths:
            raise MedSteerError(f"The headline strength {self.headline:g} is not among the strengths {self.strengths}.")

    def sites_of(self, depth: int) -> str:
        """``sites`` for a model of ``depth`` blocks: those that a range of another depth falls on."""
        return presets.scaled_sites(self.sites, depth)

    def varied(self, changes: Mapping[str, Any]) -> Preset:
        """This preset with some fields changed; a headline that is no longer swept gives way to the middle strength."""
        known = {entry.name for entry in fields(self)}
        if strange := sorted(set(changes) - known):
            raise MedSteerError(f"A preset has no {', '.join(strange)}; it has {', '.join(sorted(known))}.")
        changes = dict(changes)
        strengths = [float(value) for value in changes.get("strengths", self.strengths)]
        if "headline" not in changes and self.headline not in strengths:
            changes["headline"] = strengths[len(strengths) // 2]
        return replace(self, **changes)


def _published(name: str, strengths: tuple[float, ...], noise: str) -> Preset:
    """A preset of the Steer node, its strength the headline, with the noise that its method extracts with."""
    known = presets.find_preset(name)
    parameters = dict(known.parameters)
    headline = parameters.pop("strength")
    return Preset(known.operator, strengths, headline, parameters, rows=known.rows, sites=known.sites, noise=noise)


# The published presets (METHOD: arXiv 2603.07066 and its follow-up), and ours: chosen on development seeds. Ours
# are the nodes' recipes.
MEDSTEER = _published(presets.MEDSTEER, (2.0, 3.0), noise="unpaired")
POLYPSTEER = _published(presets.POLYPSTEER, (2.5, 3.5), noise="paired")


def _recipe(name: str, strengths: tuple[float, ...]) -> Preset:
    """A recipe of the nodes Steer and Counterfactual Sampler, its strength the headline."""
    steer, pair = RECIPES[name].steer, RECIPES[name].sampler
    return Preset(
        steer["operator"], strengths, steer["operator.strength"], {"focus": steer["operator.focus"]},
        rows=steer["rows"], start=steer["start_percent"], end=steer["end_percent"], noise="same state",
        lock=CONCEPT if pair["lock"] == AUTOMATIC else pair["lock"], lock_threshold=pair["lock_threshold"],
        lock_dilation=pair["lock_dilation"], lock_smoothing=pair["lock_smoothing"],
    )  # fmt: skip


# A focal finding is taken away under a lock from its own concept map; a diffuse one is everywhere, a new one is not.
DIFFUSE = "removing diffuse"
OURS = {
    "removing": _recipe(REMOVE_FOCAL, (1.0, 1.5, 2.0, 3.0)),
    DIFFUSE: _recipe(REMOVE_DIFFUSE, (1.0, 1.5, 2.0, 3.0)),
    "adding": _recipe(ADD, (1.0, 1.5, 1.75, 2.5)),
}
# What every method that has a strength or a prompt may begin at, and under which half of the schedule presets may act.
STARTS, WINDOWS = (0.35, 0.45, 0.55), (0.0, 0.45)
WITH_PROMPT = (0.5, 1.0, 1.5)  # strengths of steering beside the target's prompt


@dataclass(frozen=True)
class Presets:
    """The steering presets of one run."""

    medsteer: Preset = MEDSTEER
    polypsteer: Preset = POLYPSTEER
    ours: Mapping[str, Preset] = field(default_factory=lambda: dict(OURS))

    def ours_for(self, pair: Pair) -> Preset:
        """Ours for a pair, as the nodes' recipe has it: by its kind, and for a diffuse finding by that."""
        return self.ours.get(DIFFUSE if pair.diffuse else pair.kind, self.ours[pair.kind])

    def both_for(self, pair: Pair) -> Preset:
        """Steering and the target's prompt together."""
        return replace(self.ours_for(pair), strengths=WITH_PROMPT, headline=WITH_PROMPT[1], prompt=True)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def varied(self, text: str) -> Presets:
        """With ours changed as a JSON object says: fields of a preset for both kinds, or ``{kind: fields}``."""
        try:
            changes = json.loads(text)
        except ValueError as error:
            raise MedSteerError(f"--preset is not JSON: {error}") from None
        if not isinstance(changes, dict):
            raise MedSteerError(f'--preset wants a JSON object such as {{"start": 0.2}}; got {text}.')
        by_kind = changes if set(changes) <= set(self.ours) else dict.fromkeys(self.ours, changes)
        ours = {kind: preset.varied(by_kind.get(kind, {})) for kind, preset in self.ours.items()}
        return replace(self, ours=ours)


@dataclass(frozen=True)
class Sweep:
    """A baseline's parameter: its name, and the values swept."""

    parameter: str
    values: tuple[float, ...]


PROMPT_SWITCH = Sweep("start of the target's prompt", (0.0, 0.2, 0.35, 0.45, 0.55, 0.65))
PROMPT_SWITCH_LOCK = Sweep(PROMPT_SWITCH.parameter, (0.35, 0.45, 0.55))
LATEST_FIRST = (0.75, 0.65, 0.55, 0.45, 0.35)  # of starts that are chosen for each image
SDEDIT = Sweep("denoise", (0.3, 0.45, 0.6))
DDIM_INVERSION = Sweep("depth of the inversion", (0.4, 0.6, 0.8))
PNP = Sweep("share of steps injected", (0.35, 0.5, 0.7))
