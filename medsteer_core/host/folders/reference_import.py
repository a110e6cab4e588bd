"""From a published vector file and a model to a pathology vector."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...checkpoints.pixart_sigmas import PIXART_SCHEDULE, pixart_sigmas
from ...errors import MedSteerError
from ...vectors import reference_files
from ...vectors.pathology_vector import PathologyVector
from ...vectors.reference_vectors import to_vector
from ..patching.levels import is_flow
from ..patching.sites import find_sites, output_width
from ..sampling import runs as sampling
from . import vectors as vector_folder

SCHEDULES: list[str] = [PIXART_SCHEDULE, *sampling.SCHEDULERS]


def import_vector(
    model: ModelPatcher, file_name: str, schedule: str, steps: int, sigmas: Tensor | None = None
) -> PathologyVector:
    """The vector in a listed `.pickle`, `.pkl` or `.npz` file, for the sites of ``model``.

    The files hold no noise levels: they are those of ``schedule`` at ``steps`` steps, or ``sigmas`` where given (one
    more than the file has steps, as sampling ends at the last).
    """
    field = reference_files.read(vector_folder.find_reference(file_name))
    levels, made_at = _levels(model, schedule, steps, sigmas)
    widths = {name: output_width(site) for name, site in find_sites(model.model.diffusion_model).items()}
    return to_vector(field, widths, levels, made_at, is_flow(model))


def _levels(model: ModelPatcher, schedule: str, steps: int, sigmas: Tensor | None) -> tuple[Tensor, str]:
    """The sigmas at which a model is called, (steps,), and what they are called."""
    if sigmas is not None:
        return sigmas[:-1].float().cpu(), "the sigmas input"
    if schedule != PIXART_SCHEDULE:
        return sampling.schedule(model, steps, "euler", schedule).sigmas[:-1], f"{schedule}, {steps} steps"
    if is_flow(model):
        raise MedSteerError(
            f"schedule is '{PIXART_SCHEDULE}', and this model is a flow model, whose noise levels are others. Choose "
            "the scheduler that the file was made with, or connect its sigmas."
        )
    return pixart_sigmas(steps)[:-1], f"{PIXART_SCHEDULE}, {steps} steps"
