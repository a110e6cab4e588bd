"""The five kinds of runs of the memory benchmark, as workflows, and the way in which each is to end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks.shared.command import node
from benchmarks.shared.probe import Probed
from medsteer_core.errors import MedSteerError
from medsteer_core.run.workflow import Progress, Workflow, WorkflowFailed, WorkflowInterrupted

KINDS = ("steered", "unsteered", "extract", "cancel", "error")
VARIANTS = 2  # extraction from same states or pairs; cancelled and failing in the sampler or in an extraction
PERIOD = VARIANTS * len(KINDS)
STEPS, SAMPLES = 4, 2
LONG = 40  # steps of a run that is to be cancelled
LOAD, PRESENT, ABSENT, NEGATIVE, LATENT = "1", "2", "3", "4", "5"
TIME_LIMIT = 1200.0


class CycleOfRuns:
    """Runs by number: every kind in turn, each with a seed of its own, so that no run is served from the cache."""

    def __init__(self, probed: Probed):
        self._probed = probed
        self._vector = self._saved_vector()

    def run(self, number: int) -> tuple[str, float]:
        """One run; its kind and seconds. Raises MedSteerError where it ends in another way than its kind should."""
        kind, turn = KINDS[number % len(KINDS)], number // len(KINDS)
        begun = time.monotonic()
        getattr(self, f"_{kind}")(turn, seed=1000 * (number + 1))
        return kind, time.monotonic() - begun

    def extract_of(self, samples: int, noise: str, steps: int, seed: int) -> None:
        """An extraction of so many samples."""
        self._finish({**common(), **extraction(seed, samples, steps, noise)})

    def _steered(self, _turn: int, seed: int) -> None:
        self._finish({**common(), **self.pair(seed)})

    def _unsteered(self, _turn: int, seed: int) -> None:
        self._finish({**common(), **plain(seed)})

    def _extract(self, turn: int, seed: int) -> None:
        noise = ("same state", "paired")[turn % VARIANTS]
        self._finish({**common(), **extraction(seed, SAMPLES, noise=noise)})

    def _cancel(self, turn: int, seed: int) -> None:
        long = extraction(seed, SAMPLES, steps=LONG) if turn % VARIANTS else self.pair(seed, steps=LONG)
        stop = Canceller(self._probed.client.interrupt)
        try:
            self._probed.client.run({**common(), **long}, stop, time_limit=TIME_LIMIT)
        except WorkflowInterrupted:
            return
        raise MedSteerError("a run that was to be cancelled came to its end; more steps were needed. Raise LONG.")

    def _error(self, turn: int, seed: int) -> None:
        raising = extraction(seed, SAMPLES, probed=True) if turn % VARIANTS else self.pair(seed, probed=True)
        self._probed.watch_calls(raise_at=2 + turn % 4)
        try:
            self._finish({**common(), **raising})
        except WorkflowFailed as error:
            if "the probe fails" not in str(error):
                raise
            return
        raise MedSteerError("a run that was to fail came to its end. Look at the probe's node.")

    def _finish(self, workflow: Workflow) -> None:
        self._probed.client.run(workflow, time_limit=TIME_LIMIT)

    def _saved_vector(self) -> str:
        save = node("MedSteer_SavePathologyVector", "Save", {"vector": ["20", 0], "filename_prefix": "memory"})
        self._finish({**common(), **extraction(0, SAMPLES), "22": save})
        folder = self._probed.server.base / "models" / "medsteer"
        return next(path.name for path in folder.glob("memory*.safetensors"))

    def pair(self, seed: int, steps: int = STEPS, probed: bool = False) -> Workflow:
        """A loaded vector, a factual and two counterfactuals under a lock, their panel."""
        steer = {
            "operator": "affine", "operator.strength": 1.5, "operator.focus": 1.0, "operator.keep_norm": False,
            "start_percent": 0.2, "end_percent": 1.0, "sites": "all", "rows": "all",
        }  # fmt: skip
        sampler = {
            **sampling(seed, steps), "strengths": "1, 1.5", "lock": "concept map", "lock_threshold": 0.2,
            "lock_dilation": 1,
        }  # fmt: skip
        pictures = {"factual": ["35", 0], "counterfactual": ["37", 0], "concept_map": ["34", 2]}
        return {
            "30": node("MedSteer_LoadPathologyVector", "Vector", {"vector_name": self._vector}),
            "31": node("MedSteer_Steer", "Steer", {"model": [LOAD, 0], "vector": ["30", 0], **steer}),
            **({"32": node("MedSteerProbe_Model", "Probe", {"model": ["31", 0]})} if probed else {}),
            "34": node("MedSteer_CounterfactualSampler", "Pair", {**sampler, "model": ["32" if probed else "31", 0]}),
            "35": node("VAEDecode", "Factual", {"samples": ["34", 0], "vae": [LOAD, 2]}),
            "36": node("LatentFromBatch", "First", {"samples": ["34", 1], "batch_index": 0, "length": 1}),
            "37": node("VAEDecode", "Counterfactual", {"samples": ["36", 0], "vae": [LOAD, 2]}),
            "38": node("MedSteer_CounterfactualPanel", "Panel", pictures),
            "39": node("PreviewImage", "Image", {"images": ["37", 0]}),
        }


class Canceller:
    """Cancels a run once, when a node is at a quarter of its steps."""

    def __init__(self, interrupt: Callable[[], None]):
        self._interrupt, self._asked = interrupt, False

    def __call__(self, progress: Progress) -> None:
        if not self._asked and progress.maximum >= LONG and progress.value >= progress.maximum / 4:
            self._asked = True
            self._interrupt()


def common() -> Workflow:
    """The model, the prompts and the size, the same in every run."""
    texts = {PRESENT: "An endoscopic image of polyps", ABSENT: "An endoscopic image of normal cecum", NEGATIVE: ""}
    size = {"width": 128, "height": 128, "batch_size": 1}
    return {
        LOAD: node("MedSteer_LoadEndoPhantom", "Load", {}),
        **{i: node("CLIPTextEncode", text, {"clip": [LOAD, 1], "text": text}) for i, text in texts.items()},
        LATENT: node("EmptyLatentImage", "Size", size),
    }


def sampling(seed: int, steps: int) -> dict[str, Any]:
    """The inputs of a sampler but its model."""
    return {
        "seed": seed, "steps": steps, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal",
        "positive": [PRESENT, 0], "negative": [NEGATIVE, 0], "latent_image": [LATENT, 0],
    }  # fmt: skip


def plain(seed: int) -> Workflow:
    """One unsteered image."""
    inputs = {**sampling(seed, STEPS), "model": [LOAD, 0], "denoise": 1.0}
    return {
        "10": node("KSampler", "Sample", inputs),
        "11": node("VAEDecode", "Decode", {"samples": ["10", 0], "vae": [LOAD, 2]}),
        "12": node("PreviewImage", "Image", {"images": ["11", 0]}),
    }


def extraction(
    seed: int, samples: int, steps: int = STEPS, noise: str = "same state", probed: bool = False
) -> Workflow:
    """An extraction and the picture of its vector."""
    settings = {name: value for name, value in sampling(seed, steps).items() if name != "positive"}
    settings |= {"samples": samples, "noise": noise, "present": [PRESENT, 0], "absent": [ABSENT, 0]}
    settings["model"] = ["19", 0] if probed else [LOAD, 0]
    return {
        **({"19": node("MedSteerProbe_Model", "Probe", {"model": [LOAD, 0]})} if probed else {}),
        "20": node("MedSteer_ExtractPathologyVector", "Extract", settings),
        "21": node("MedSteer_InspectVector", "Inspect", {"vector": ["20", 0]}),
    }
