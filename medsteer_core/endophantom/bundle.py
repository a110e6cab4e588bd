"""The embedded file: generator, text encoder, autoencoder and judges in one safetensors, its recipe in the metadata."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from ..errors import MedSteerError
from .judges import Classifier, Judges, Segmenter

PATH = Path(__file__).parent / "weights" / "endophantom.safetensors"
FORMAT = "medsteer.endophantom"
PARTS = ("generator", "text", "autoencoder", "classifier", "segmenter")


@dataclass(frozen=True)
class Bundle:
    """An open bundle. ``part(name)`` gives a part's state dict in float32, without its prefix."""

    path: Path = PATH

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """How the parts were trained: sizes, steps, seeds, held-out numbers."""
        with self._open() as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise MedSteerError(f"{self.path.name} is not an EndoPhantom bundle. Reinstall MedSteer.")
        return json.loads(metadata["recipe"])

    def part(self, name: str) -> dict[str, Tensor]:
        if name not in PARTS:
            raise MedSteerError(f"EndoPhantom has no part '{name}'; it has {', '.join(PARTS)}.")
        prefix = f"{name}."
        with self._open() as file:
            return {k.removeprefix(prefix): file.get_tensor(k).float() for k in file.keys() if k.startswith(prefix)}

    def judges(self) -> Judges:
        """The classifier and the segmenter, ready to judge images."""
        return Judges(_filled(Classifier(), self.part("classifier")), _filled(Segmenter(), self.part("segmenter")))

    def sha256(self) -> str:
        """Hash of the file, for records of what judged or made an image."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def _open(self) -> Any:
        if not self.path.is_file():
            raise MedSteerError(f"EndoPhantom's weights are missing ({self.path}). Reinstall MedSteer.")
        return safe_open(self.path, framework="pt")


def _filled(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)
