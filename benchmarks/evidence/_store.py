"""What the quality benchmark keeps between runs: vectors, latents and scores, each under a hash of what made it.

Latents are kept, so that pairs can be scored anew without being made anew. Every file is written whole or not at all:
a run that was stopped goes on where it was.
"""

from __future__ import annotations

import ast
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from benchmarks.evidence._controls import with_random_direction, within_class
from benchmarks.evidence._method import Chunk, Method
from benchmarks.shared import lab as _lab
from benchmarks.shared import presets as _presets
from benchmarks.shared.lab import Lab
from benchmarks.shared.presets import Pair
from medsteer_core.endophantom.bundle import Bundle
from medsteer_core.files.same_bytes import canonical_json
from medsteer_core.files.whole_file import write_whole
from medsteer_core.pictures.difference import png
from medsteer_core.run.demo import ROOT
from medsteer_core.scores.scorer import PairScore, score_pairs
from medsteer_core.vectors import file as vector_file
from medsteer_core.vectors.pathology_vector import PathologyVector

FACTUAL = "factual"
# Code that decides what images are made, what steering makes of them, and how they are scored.
MAKING = ("benchmarks/shared/lab.py", "benchmarks/evidence/_baselines.py", "medsteer_core/host/loading/embedded.py",
          "medsteer_core/host/loading/pixart.py")  # fmt: skip
STEERING = ("benchmarks/evidence/_methods.py", "benchmarks/evidence/_controls.py",
            "medsteer_core/host/patching/*.py", "medsteer_core/host/sampling/*.py",
            *(f"medsteer_core/{name}.py" for name in ("extraction/affine", "extraction/axes",
                                                      "extraction/capture", "extraction/estimators",
                                                      "steering/operators", "vectors/pathology_vector",
                                                      "extraction/sample_estimators",
                                                      "extraction/sample_report",
                                                      "extraction/sample_watch",
                                                      "extraction/samples_record", "vectors/schedule",
                                                      "steering/selection", "extraction/separability",
                                                      "extraction/shrinkage", "steering/plan",
                                                      "steering/rules", "steering/token_map",
                                                      "extraction/token_pairs")))  # fmt: skip
SCORING = ("medsteer_core/endophantom/judges.py",
           *(f"medsteer_core/{name}.py" for name in ("scores/scorer", "scores/images", "judges/judge",
                                                     "scores/parts", "scores/pair", "scores/regions")))  # fmt: skip


def digest(value: Any) -> str:
    """Twelve hex digits that tell JSON-able values apart."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:12]


def code_digest(patterns: Sequence[str], root: Path = ROOT) -> str:
    """A digest of what Python files say to Python: neither comments and layout nor docstrings count."""
    files = sorted({path for pattern in patterns for path in root.glob(pattern)})
    return digest([[path.name, _without_docstrings(path.read_text(encoding="utf-8"))] for path in files])


def _without_docstrings(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node) is not None:
            node.body[0].value.value = ""
    return ast.dump(tree)


@dataclass(frozen=True)
class Result:
    """One chunk of one method's pairs: scores in the seeds' order, seconds of sampling for all of them.

    ``identical``: pairs whose latents and PNG bytes are the factual's; None where it was not looked at.
    """

    seeds: tuple[int, ...]
    scores: tuple[PairScore, ...]
    seconds: float
    identical: int | None = None

    def to_json(self) -> bytes:
        scores = [score.to_dict() for score in self.scores]
        record = {"seeds": self.seeds, "seconds": self.seconds, "identical": self.identical, "scores": scores}
        return json.dumps(record).encode()

    @staticmethod
    def of_json(data: bytes) -> Result:
        record = json.loads(data)
        scores = tuple(score_of(values) for values in record["scores"])
        return Result(tuple(record["seeds"]), scores, record["seconds"], record["identical"])


def score_of(values: Mapping[str, Any]) -> PairScore:
    """The score that `PairScore.to_dict` wrote."""
    known = {entry.name for entry in fields(PairScore)}
    return PairScore(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})


class Store:
    """Makes what is asked for, or reads it where it was made before. ``folder`` holds one subfolder a model."""

    def __init__(self, lab: Lab, folder: Path, comfyui: str):
        self.lab = lab
        self.settings = {"steps": _lab.STEPS, "sampler": _lab.SAMPLER, "scheduler": _lab.SCHEDULER, "cfg": _lab.CFG,
                         "side": _lab.SIDE}  # fmt: skip
        made_by = {
            "bundle": Bundle().sha256(), "torch": torch.__version__, "comfyui": comfyui, "settings": self.settings,
            "device": lab.model.load_device.type, "code": code_digest(MAKING),
            "seeds": [_presets.EXTRACTION_SEED, _presets.COVARIANCE_SEED],
        }  # fmt: skip
        self.folder = folder / digest(made_by)
        self._steered_by, self._scored_by = code_digest(STEERING), code_digest(SCORING)
        self._vectors: dict[Path, PathologyVector] = {}
        self._deviations: dict[Pair, dict[str, Tensor]] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "made_by.json", json.dumps(made_by, indent=1).encode())

    # Vectors

    def vector_path(self, pair: Pair, noise: str, samples: int) -> Path:
        return self.folder / pair.slug / self._steered_by / f"vector-{noise}-{samples}.safetensors"

    def vector(self, pair: Pair, noise: str, samples: int) -> PathologyVector:
        """The pair's vector, source minus target."""
        path = self.vector_path(pair, noise, samples)
        seed = _presets.EXTRACTION_SEED
        return self._kept(path, lambda: self.lab.extract(pair.source, pair.target, samples, seed, noise))

    def random_vector(self, pair: Pair, noise: str, samples: int, draw: int) -> PathologyVector:
        """The pair's vector with a random direction beside it (`with_random_direction`)."""

        def make() -> PathologyVector:
            if pair not in self._deviations:
                self._deviations[pair] = within_class(self.lab, pair)
            return with_random_direction(self.vector(pair, noise, samples), self._deviations[pair], draw)

        amount = f"{_presets.COVARIANCE_SAMPLES}-{draw}"
        path = self.vector_path(pair, noise, samples).with_stem(f"random-{noise}-{samples}-{amount}")
        return self._kept(path, make)

    def _kept(self, path: Path, make: Any) -> PathologyVector:
        if path not in self._vectors:
            if not path.is_file():
                vector_file.save(make(), path)
            self._vectors[path] = vector_file.load(path)
        return self._vectors[path]

    # Latents

    def factual(self, pair: Pair, seeds: Sequence[int]) -> tuple[Chunk, float]:
        """The factual images of these seeds, and the seconds of sampling them."""
        noise, prompt = self.lab.noise(seeds), self.lab.prompt(pair.source)
        path = self._factual_path(pair, seeds)
        latents, seconds = self._latents(path, lambda: self.lab.sample(self.lab.model, prompt, noise))
        return Chunk(seeds, noise, latents), seconds

    def has_factual(self, pair: Pair, seeds: Sequence[int]) -> bool:
        return self._factual_path(pair, seeds).is_file()

    def _factual_path(self, pair: Pair, seeds: Sequence[int]) -> Path:
        return self.folder / pair.slug / FACTUAL / f"{_span(seeds)}.safetensors"

    def latents(self, pair: Pair, method: Method, value: float, seeds: Sequence[int]) -> tuple[Tensor, float]:
        """A method's counterfactual latents, and the seconds of sampling them (the factual's not included)."""
        chunk, _ = self.factual(pair, seeds)
        for needed in method.vectors:
            self.vector(*needed)  # made before the clock starts
        path = self._path(pair, method, value, seeds, ".safetensors")
        return self._latents(path, lambda: method.run(chunk, value))

    def make_many(self, pair: Pair, method: Method, values: Sequence[float], seeds: Sequence[int]) -> None:
        """Make what is not there of a method that makes many values at once; each then took its share of the time."""
        paths = {value: self._path(pair, method, value, seeds, ".safetensors") for value in values}
        missing = [value for value, path in paths.items() if not path.is_file()]
        if len(missing) < 2:
            return
        chunk, _ = self.factual(pair, seeds)
        for needed in method.vectors:
            self.vector(*needed)
        begun = time.perf_counter()
        made = method.run_many(chunk, missing)
        seconds = (time.perf_counter() - begun) / len(missing)
        for value, latents in zip(missing, made, strict=True):
            _write(paths[value], latents, seconds)

    def _latents(self, path: Path, make: Any) -> tuple[Tensor, float]:
        if not path.is_file():
            begun = time.perf_counter()
            made = make()
            _write(path, made, time.perf_counter() - begun)
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("latents").clone(), float(file.metadata()["seconds"])

    # Scores

    def is_scored(self, pair: Pair, method: Method, value: float, seeds: Sequence[int]) -> bool:
        return self._score_path(pair, method, value, seeds).is_file()

    def result(self, pair: Pair, method: Method, value: float, seeds: Sequence[int], check_bytes: bool) -> Result:
        """The scores of one chunk; with ``check_bytes`` also how many pairs are the same to the last byte."""
        path = self._score_path(pair, method, value, seeds)
        if not path.is_file():
            chunk, before = self.factual(pair, seeds)
            latents, seconds = self.latents(pair, method, value, seeds)
            factual, counterfactual = self.lab.images(chunk.latents), self.lab.images(latents)
            scores = tuple(score_pairs(factual, counterfactual, pair.source, pair.target))
            same = None
            if check_bytes:
                images = zip(chunk.latents, latents, factual, counterfactual, strict=True)
                same = sum(torch.equal(a, b) and png(c) == png(d) for a, b, c, d in images)
            write_whole(path, Result(tuple(seeds), scores, before + seconds, same).to_json())
        return Result.of_json(path.read_bytes())

    def _score_path(self, pair: Pair, method: Method, value: float, seeds: Sequence[int]) -> Path:
        return self._path(pair, method, value, seeds, f".scores-{self._scored_by}.json")

    def _path(self, pair: Pair, method: Method, value: float, seeds: Sequence[int], suffix: str) -> Path:
        ours = method.vectors or method.settings  # what is made by code of ours, and not by ComfyUI's alone
        made_by = digest([method.name, dict(method.settings), self._steered_by if ours else ""])
        return self.folder / pair.slug / f"{method.name}-{made_by}" / f"{value:g}-{_span(seeds)}{suffix}"


def _write(path: Path, latents: Tensor, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"latents": latents.detach().float().cpu().contiguous()}
    write_whole(path, to_bytes(tensors, metadata={"seconds": repr(seconds)}))


def _span(seeds: Sequence[int]) -> str:
    return f"{seeds[0]}-{seeds[-1]}"
