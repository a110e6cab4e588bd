"""Step 4: train the judges, one file a part: classifier and segmenter, regressor, distance. Then measure them."""

from __future__ import annotations

from pathlib import Path

from ..judges import Classifier, Distance, Judges, Regressor, Segmenter
from . import classifier, decoder, distance, regressor
from .classifier import POOL_SEED
from .files import load
from .held_out import HELD_OUT_SEED, held_out

__all__ = ["HELD_OUT_SEED", "POOL_SEED", "held_out", "load_trained", "run", "steps"]


def run(folder: Path, steps: int, regressor_steps: int = 2000, renders: int = 4096, n: int = 1024) -> None:
    """Train what is missing of the judges and print held-out numbers; a rerun resumes.

    ``steps`` of the classifier and the segmenter; ``renders`` fit the distance, ``n`` measure.
    FileNotFoundError without a decoder, through which renders are judged.
    """
    if not (folder / "decoder.pt").exists():
        raise FileNotFoundError(f"{folder} holds no decoder.pt, through which renders are judged; run `decoder` first")
    classifier.run(folder, steps)
    regressor.run(folder, regressor_steps)
    distance.run(folder, _load_classifier(folder), renders)
    for name, value in held_out(load_trained(folder), decoder.load_trained(folder), n).items():
        print(f"  {name}: {value:.3f}", flush=True)


def load_trained(folder: Path) -> Judges:
    """The trained judges of a run."""
    trained, segmenter, regression = _load_classifier(folder), Segmenter(), Regressor()
    segmenter.load_state_dict(load(folder / "judges.pt")["segmenter"])
    regression.load_state_dict(load(folder / "regressor.pt")["model"])
    distances = Distance(trained.head.in_features)
    distances.load_state_dict(load(folder / "distance.pt")["model"])
    return Judges(trained, segmenter, regression, distances)


def steps(folder: Path) -> dict[str, int]:
    """How long each part was trained, for the recipe."""
    return {
        "steps": load(folder / "judges.pt")["step"],
        "regressor_steps": load(folder / "regressor.pt")["step"],
        "distance_renders": load(folder / "distance.pt")["renders"],
    }


def _load_classifier(folder: Path) -> Classifier:
    out = Classifier()
    out.load_state_dict(load(folder / "judges.pt")["classifier"])
    return out.eval()
