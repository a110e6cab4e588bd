"""Nodes that load a diffusion transformer."""

from __future__ import annotations

from comfy_api.latest import io

from ..medsteer_core.host.canvas.notes import note
from ..medsteer_core.host.loading.checkpoints import AUTO, FAMILIES, WEIGHT_DTYPES, load_described, model_names
from ..medsteer_core.host.loading.embedded import load_endophantom
from .types import CATEGORY


class LoadEndoPhantom(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_LoadEndoPhantom",
            display_name="Load EndoPhantom",
            category=f"{CATEGORY}/loaders",
            description=(
                "Loads the small practice model that comes with MedSteer and draws endoscopy phantoms; nothing is "
                "downloaded."
            ),
            search_aliases=["endoscopy", "phantom", "medsteer", "demo model"],
            outputs=[
                io.Model.Output(
                    "model", tooltip="The model: it draws endoscopy phantoms of 128x128 pixels (a PixArt)."
                ),
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
            description=(
                "Loads an image model that can be steered, such as a PixArt, in ComfyUI's or diffusers' format, from "
                "one file or from shards."
            ),
            search_aliases=["pixart", "diffusion transformer", "load diffusion model", "unet loader"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_names(),
                    tooltip=(
                        "A model in models/diffusion_models or models/checkpoints. One in shards stands as its "
                        ".safetensors.index.json."
                    ),
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    advanced=True,
                    tooltip="fp8 takes half the memory and loses some precision: the number type of the weights.",
                ),
                io.Combo.Input(
                    "family",
                    options=list(FAMILIES),
                    default=AUTO,
                    optional=True,
                    tooltip=(
                        "Which PixArt it is; a wrong choice gives washed-out or over-contrasted images, since alpha "
                        "has the latent scale of SD 1.5's VAE and Sigma that of SDXL's. auto reads it from the file "
                        "and says on the node what it found."
                    ),
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The model, for Extract Pathology Vector, Steer and KSampler.")],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, model_name: str, weight_dtype: str, family: str = AUTO) -> io.NodeOutput:
        loaded = load_described(model_name, weight_dtype, family)
        return io.NodeOutput(loaded.model, ui=note(loaded.text))
