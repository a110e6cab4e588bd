"""The embedded files: one with generator, text encoder, judges and recipe, and one with the autoencoder.

The autoencoder's file is as ComfyUI's Load VAE wants it, so it has a folder of its own that is listed there.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor, nn

from ..errors import MedSteerError

if TYPE_CHECKING:
    from .judges import Judges

PATH = Path(__file__).parent / "weights" / "endophantom.safetensors"
VAE_PATH = PATH.parent / "vae" / "endophantom_vae.safetensors"
FORMAT = "medsteer.endophantom"
PARTS = ("generator", "text", "classifier", "segmenter", "regressor", "distance")


@dataclass(frozen=True)
class Bundle:
    """An open bundle. ``part(name)`` gives a part's state dict in float32, without its prefix."""

    path: Path = PATH
    vae_path: Path = VAE_PATH

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """How the parts were trained: sizes, steps, seeds, held-out numbers."""
        with _open(self.path) as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise MedSteerError(f"{self.path.name} is not an EndoPhantom bundle. Reinstall MedSteer.")
        return json.loads(metadata["recipe"])

    def part(self, name: str) -> dict[str, Tensor]:
        if name not in PARTS:
            raise MedSteerError(f"EndoPhantom has no part '{name}'; it has {', '.join(PARTS)}.")
        prefix = f"{name}."
        with _open(self.path) as file:
            return {k.removeprefix(prefix): file.get_tensor(k).float() for k in file.keys() if k.startswith(prefix)}

    def judges(self) -> Judges:
        """All judges, ready to judge images."""
        from .judges import Classifier, Distance, Judges, Regressor, Segmenter  # loading the generator needs none

        classifier = _filled(Classifier(), self.part("classifier"))
        return Judges(
            classifier,
            _filled(Segmenter(), self.part("segmenter")),
            _filled(Regressor(), self.part("regressor")),
            _filled(Distance(classifier.head.in_features), self.part("distance")),
        )

    def autoencoder(self) -> dict[str, Tensor]:
        """The autoencoder's state dict in float32, with TAESD's names."""
        with _open(self.vae_path) as file:
            return {key: file.get_tensor(key).float() for key in file.keys()}

    def sha256(self) -> str:
        """Hash of both files, for records of what judged or made an image."""
        return hashlib.sha256(self.path.read_bytes() + self.vae_path.read_bytes()).hexdigest()


def _open(path: Path) -> Any:
    if not path.is_file():
        raise MedSteerError(f"EndoPhantom's weights are missing ({path}). Reinstall MedSteer.")
    return safe_open(path, framework="pt")


def _filled(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)
