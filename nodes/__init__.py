"""The pack's nodes: schemas and tooltips, each with one call into the core."""

from pathlib import Path

from comfy_api.latest import ComfyExtension, io

from ..medsteer_core.host.folders.copies import tell_of_another_copy
from ..medsteer_core.host.folders.vectors import register_folder
from ..medsteer_core.host.loading.embedded import register_vae
from .calibrate import CalibrateStrength
from .combine import CombineVectors
from .contexts import PromptContexts
from .counterfactual import CounterfactualCompare
from .evaluate import EvaluatePairs, RandomDirection
from .export import SaveCounterfactualPairs
from .extract import ExtractPathologyVector
from .image import CounterfactualOfImage
from .load import LoadDiT, LoadEndoPhantom
from .lora import LoadPEFTLoRA
from .phantom import PhantomImage
from .pictures import CounterfactualPanel, InspectVector, StrengthSweep
from .sampler import CounterfactualSampler
from .schedule import PixArtSigmas
from .steer import Steer
from .vectors import ExportPathologyVector, ImportPathologyVector, LoadPathologyVector, SavePathologyVector

NODES: list[type[io.ComfyNode]] = [
    LoadEndoPhantom,
    LoadDiT,
    LoadPEFTLoRA,
    PromptContexts,
    ExtractPathologyVector,
    SavePathologyVector,
    LoadPathologyVector,
    ImportPathologyVector,
    ExportPathologyVector,
    CombineVectors,
    RandomDirection,
    PixArtSigmas,
    Steer,
    CounterfactualSampler,
    CalibrateStrength,
    CounterfactualOfImage,
    PhantomImage,
    CounterfactualCompare,
    InspectVector,
    CounterfactualPanel,
    StrengthSweep,
    EvaluatePairs,
    SaveCounterfactualPairs,
]


class MedSteerExtension(ComfyExtension):
    """What ComfyUI asks for the pack's nodes."""

    async def on_load(self) -> None:
        register_folder()
        tell_of_another_copy(f"custom_nodes.{Path(__file__).parent.parent.name}")
        register_vae()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> MedSteerExtension:
    """ComfyUI's entry point."""
    return MedSteerExtension()
