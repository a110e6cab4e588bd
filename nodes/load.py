"""Nodes that load a diffusion transformer."""

from __future__ import annotations

from comfy_api.latest import io

from ..medsteer_core.host.checkpoints import WEIGHT_DTYPES, load_dit, model_names
from ..medsteer_core.host.embedded import load_endophantom
from .types import CATEGORY


class LoadEndoPhantom(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_LoadEndoPhantom",
            display_name="Load EndoPhantom",
            category=f"{CATEGORY}/loaders",
            description="Loads the small endoscopy-phantom model that comes with MedSteer; nothing is downloaded.",
            search_aliases=["endoscopy", "phantom", "medsteer", "demo model"],
            outputs=[
                io.Model.Output("model", tooltip="A PixArt trained on synthetic endoscopy phantoms of 128x128 pixels."),
                io.Clip.Output("clip", tooltip="Its text encoder, for CLIP Text Encode. Knows Kvasir's eight classes."),
                io.Vae.Output("vae", tooltip="Its autoencoder, for VAE Decode and VAE Encode."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_endophantom())


class LoadDiT(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_LoadDiT",
            display_name="Load DiT",
            category=f"{CATEGORY}/loaders",
            description="Loads a cross-attention diffusion transformer (PixArt) that can be steered.",
            search_aliases=["pixart", "diffusion transformer", "load diffusion model", "unet loader"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_names(),
                    tooltip="A model file in models/diffusion_models or models/checkpoints.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="Number type of the weights in memory. fp8 halves memory and loses some precision.",
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The model, for Extract Pathology Vector, Steer and KSampler.")],
        )

    @classmethod
    def execute(cls, model_name: str, weight_dtype: str) -> io.NodeOutput:
        return io.NodeOutput(load_dit(model_name, weight_dtype))
