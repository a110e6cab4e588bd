"""What the operators benchmark compares: operators, estimators, strengths; each as a method of one pair's images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from benchmarks.evidence._method import Chunk, Method
from benchmarks.evidence._methods import locked
from benchmarks.evidence._store import STEERING, Store, code_digest
from benchmarks.shared import presets as _presets
from benchmarks.shared.lab import CFG, STEPS, Lab
from benchmarks.shared.presets import OURS, Pair, Preset, Presets
from medsteer_core.errors import MedSteerError
from medsteer_core.extraction.sample_estimators import estimate
from medsteer_core.extraction.samples_record import SampleRecord, SampleRecorder
from medsteer_core.files.whole_file import write_whole
from medsteer_core.vectors.pathology_vector import PathologyVector

UNPAIRED, PAIRED = "mean difference, unpaired", "mean difference, paired"
PAIRED_DIFFERENCE, COMPONENT, LDA, LEACE = "paired difference", "principal component", "lda", "leace"
SAME_STATE = "same state"
DIRECTIONS = (UNPAIRED, PAIRED, COMPONENT, LDA)
ESTIMATORS = (*DIRECTIONS, LEACE, SAME_STATE)
NAME_OF = {
    UNPAIRED: "mean_difference", PAIRED: "mean_difference", PAIRED_DIFFERENCE: "paired_difference",
    COMPONENT: "principal_component", LDA: "lda", LEACE: "leace",
}  # fmt: skip
# These write along the direction of PAIRED; `same_direction` checks that in every run.
SAME_AS_PAIRED = (PAIRED_DIFFERENCE, LEACE)
MOST_DIFFERENCE = 1e-5
# Of what is not run, why.
LEFT_OUT = {
    "paired difference": "the same direction as mean difference, paired (measured below): its rows are that one's",
    "leace, not affine": "it writes along the same direction as mean difference, paired; only affine reads its readers",
    "affine, other estimators": "it needs a vector with readers: leace or same state",
    "same state, not affine": "its eight directions are a basis whose signs mean nothing; the other operators go from "
    "absent to present along one direction",
    "unpaired, other estimators": "principal component needs pairs; lda and leace are compared where mean difference "
    "is best founded",
    "ablate, strengths": "it has none",
}  # fmt: skip
SAMPLES, RECORD_BATCH = 32, 16
# The operator switch goes from one finding to another; the vectors of both are taken against this class.
COMMON = "normal pylorus"


@dataclass(frozen=True)
class Arm:
    """An operator with an estimator and the strengths swept; ``published``: with a published preset's rows and sites,
    and its window, which is all steps.
    """

    operator: str
    estimator: str
    kind: str
    strengths: tuple[float, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    published: Preset | None = None

    @property
    def name(self) -> str:
        """As a folder's name."""
        return f"{self.operator}-{self.estimator}".replace(", ", "-").replace(" ", "_")

    def preset(self, pair: Pair) -> Preset:
        """How it steers a pair: the rows and the window of ours for that kind of pair, no lock."""
        if self.published:
            return self.published
        ours, parameters = Presets().ours_for(pair), dict(self.parameters)
        if self.kind == "affine":
            parameters["focus"] = ours.parameters["focus"]
        noise = SAME_STATE if self.estimator == SAME_STATE else "unpaired" if self.estimator == UNPAIRED else "paired"
        return Preset(self.kind, self.strengths, self.strengths[0], parameters, ours.rows, ours.sites, ours.start,
                      ours.end, noise, SAMPLES)  # fmt: skip


# Strengths: those around the published ones for suppress, multiples of the class units for add and set. At 2 suppress
# keeps the norm by itself, so 2 stands in one of its sweeps only. LEACE's eraser takes the classes to their common mean
# at 1 and to each other at 2, where the map from the same states has got to at 1.
SWEPT = (
    ("suppress, norm kept", "suppress", (1.5, 2.0, 3.0), {"keep_norm": True}),
    ("suppress", "suppress", (1.5, 2.5, 3.5), {"keep_norm": False}),
    ("ablate", "ablate", (1.0,), {}),
    ("add", "add", (1.0, 2.0, 4.0), {"toward": "absent"}),
    ("set", "set", (1.0, 2.0, 3.0), {"toward": "absent"}),
    ("switch", "switch", (1.0, 2.0, 4.0), {}),
)
AFFINE = "affine"
MEDSTEER, POLYPSTEER = "MedSteer preset", "PolypSteer preset"
OPERATORS = (*(name for name, *_ in SWEPT), AFFINE, MEDSTEER, POLYPSTEER)


def arms() -> list[Arm]:
    """Every combination that means something (see `LEFT_OUT` for the others)."""
    made = [Arm(name, by, kind, values, how) for name, kind, values, how in SWEPT for by in DIRECTIONS]
    made += [Arm(AFFINE, LEACE, "affine", (1.0, 2.0, 4.0)), Arm(AFFINE, SAME_STATE, "affine", (1.0, 1.5, 2.0))]
    for name, by, preset in ((MEDSTEER, UNPAIRED, _presets.MEDSTEER), (POLYPSTEER, PAIRED, _presets.POLYPSTEER)):
        made.append(Arm(name, by, preset.operator, (preset.headline,), published=preset))
    return made


class Vectors:
    """The vectors of every estimator, from records of each class's samples that are made once and kept."""

    def __init__(self, store: Store):
        self.store, self.lab = store, store.lab
        self.made_by = code_digest((*STEERING, "benchmarks/evidence/_operators.py"))
        self._records: dict[tuple[str, int], SampleRecord] = {}
        self._vectors: dict[tuple[str, str, str], PathologyVector] = {}

    def of(self, estimator: str, present: str, absent: str) -> PathologyVector:
        """Present minus absent. ``unpaired``: the absent class from the next `SAMPLES` noises of the seed."""
        key = (estimator, present, absent)
        if key not in self._vectors:
            if estimator == SAME_STATE:
                self._vectors[key] = self.store.vector(Pair(present, absent), SAME_STATE, SAMPLES)
            else:
                first = SAMPLES if estimator == UNPAIRED else 0
                facts = {"present": present, "absent": absent, "seed": _presets.EXTRACTION_SEED, "samples": SAMPLES}
                records = self.record(present, 0), self.record(absent, first)
                self._vectors[key] = estimate(NAME_OF[estimator], *records, facts)
        return self._vectors[key]

    def record(self, name: str, first: int) -> SampleRecord:
        """`SAMPLES` samples of a class, from image ``first`` of the extraction seed on."""
        if (name, first) not in self._records:
            path = self.record_path(name, first)
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                made = self._watched(name, range(first, first + SAMPLES)).to_state()
                write_whole(path, to_bytes({key: value.contiguous() for key, value in made.items()}))
            self._records[name, first] = SampleRecord.from_state(load_file(path))
        return self._records[name, first]

    def record_path(self, name: str, first: int) -> Any:
        folder = self.store.folder / "records" / self.made_by
        return folder / f"{name.replace(' ', '_')}-{first}-{first + SAMPLES - 1}.safetensors"

    def _watched(self, name: str, images: range) -> SampleRecord:
        """Samples of a class's prompt, as Extract Pathology Vector takes them: one seed, image by image."""
        from medsteer_core.host.patching import patch
        from medsteer_core.host.sampling import runs as sampling

        lab, recorder = self.lab, SampleRecorder()
        watched, like = patch.observed(lab.model, recorder), sampling.empty_latent(lab.model, lab.latent)
        for start in range(0, len(images), RECORD_BATCH):
            part = images[start : start + RECORD_BATCH]
            recorder.begin(part)
            lab.sample(watched, lab.prompt(name), sampling.noise_for(like, _presets.EXTRACTION_SEED, part))
        return recorder.record()


def records_needed(pairs: Sequence[Pair]) -> list[tuple[str, int]]:
    """The classes to record for these pairs, each with its first image; those of pairs share the first ones."""
    paired = [(name, 0) for pair in pairs for name in (pair.source, pair.target)]
    unpaired = [(pair.target, SAMPLES) for pair in pairs]
    return list(dict.fromkeys([*paired, *unpaired, (COMMON, 0), (COMMON, SAMPLES)]))


def same_direction(vectors: Vectors, pair: Pair) -> dict[str, float]:
    """The largest difference of each of `SAME_AS_PAIRED` from `PAIRED`, over sites and steps, relative to its scale.

    MedSteerError where it is more than rounding: their rows would then have to be run.
    """
    known, found = vectors.of(PAIRED, pair.source, pair.target), {}
    for name in SAME_AS_PAIRED:
        other = vectors.of(name, pair.source, pair.target)
        if other.site_names != known.site_names:
            raise MedSteerError(f"{pair.name}: {name} has other sites than {PAIRED}. Run its rows as well.")
        found[name] = max(
            _apart(getattr(site, entry), getattr(other.sites[place], entry))
            for place, site in known.sites.items()
            for entry in ("directions", "gaps", "projections")
        )
        if found[name] > MOST_DIFFERENCE:
            raise MedSteerError(
                f"{pair.name}: {name} differs from {PAIRED} by {found[name]:.2g}; at most {MOST_DIFFERENCE:g} was "
                "expected, since they are one direction. Run its rows as well."
            )
    return found


def _apart(one: Tensor, other: Tensor) -> float:
    scale = float(one.abs().max()) or 1.0
    return float((one - other).abs().max()) / scale


class LateRuns:
    """Steered runs that share what comes before steering begins: those steps are the factual's, and made once."""

    def __init__(self, lab: Lab):
        self.lab = lab
        self._kept: dict[tuple[str, tuple[int, ...], int], Tensor] = {}

    def first_step(self, preset: Preset) -> int:
        """The first step that falls into the preset's window."""
        from medsteer_core.host.patching.levels import window as window_of

        window = window_of(self.lab.model, preset.start, preset.end)
        levels = self.lab.schedule.sigmas[:-1].tolist()
        return next(step for step, sigma in enumerate(levels) if sigma <= window.start_sigma)

    def share(self, preset: Preset) -> float:
        """The share of the steps that a run takes."""
        return 1 - self.first_step(preset) / STEPS

    def sample(self, model: Any, preset: Preset, source: str, chunk: Chunk) -> Tensor:
        """The latents of a steered ``model`` for the chunk's noise, ``(n, C, H, W)``."""
        from medsteer_core.host.sampling import runs as sampling

        lab, step = self.lab, self.first_step(preset)
        if step == 0:
            return lab.sample(model, lab.prompt(source), chunk.noise)
        sigmas, none = lab.schedule.sigmas, torch.zeros_like(chunk.noise)
        key = (source, tuple(chunk.seeds), step)
        if key not in self._kept:
            self._kept[key] = lab.resample(lab.prompt(source), none, chunk.noise, sigmas[: step + 1])
        after, empty = lab.steps(sigmas[step:]), lab.conditioning("")
        return sampling.resample(model, lab.prompt(source), empty, self._kept[key], none, after, CFG, 0)


def methods(vectors: Vectors, runs: LateRuns, pair: Pair) -> dict[tuple[str, str], Method]:
    """Every arm for a pair, by operator and estimator."""
    return {(arm.operator, arm.estimator): method(vectors, runs, pair, arm) for arm in arms()}


def method(vectors: Vectors, runs: LateRuns, pair: Pair, arm: Arm, lock: bool = False) -> Method:
    """An arm as a method; ``lock``: under the lock of ours for focal removals, by Counterfactual Sampler."""
    preset = arm.preset(pair)
    if lock:
        ours = OURS["removing"]
        changes = {name: getattr(ours, name) for name in ("lock", "lock_threshold", "lock_dilation")}
        preset = preset.varied(changes)

    def run(chunk: Chunk, strength: float) -> Tensor:
        model = steered_by(vectors, pair, arm, preset, strength)
        if lock:
            return locked(vectors.lab, model, preset, vectors.lab.prompt(pair.source), chunk.noise)
        return runs.sample(model, preset, pair.source, chunk)

    settings = {key: value for key, value in asdict(preset).items() if key not in ("strengths", "headline")}
    settings |= {"estimator": arm.estimator, "made_by": vectors.made_by}
    if arm.kind == "switch":
        settings["common"] = COMMON
    share = runs.share(preset)
    cost = 2.0 + share if lock else share
    needed = ((pair, SAME_STATE, SAMPLES),) if arm.estimator == SAME_STATE else ()
    return Method(arm.name + ("-locked" if lock else ""), "strength", arm.strengths, settings, run,
                  lambda value: cost, needed)  # fmt: skip


def steered_by(vectors: Vectors, pair: Pair, arm: Arm, preset: Preset, strength: float) -> Any:
    """The lab's model steered as the Steer node would."""
    from medsteer_core.host.patching import steer

    model, target = vectors.lab.model, None
    vector = vectors.of(arm.estimator, pair.source, pair.target)
    if arm.kind == "switch":
        vector, target = (vectors.of(arm.estimator, name, COMMON) for name in (pair.source, pair.target))
    parameters = {**preset.parameters} if arm.kind == "ablate" else {**preset.parameters, "strength": strength}
    where = (preset.start, preset.end, preset.sites_of(len(model.model.diffusion_model.blocks)), preset.rows)
    return steer.steer(model, vector, preset.operator, parameters, *where, target=target)[0]
