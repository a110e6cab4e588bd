"""The node that applies a PEFT LoRA."""

from __future__ import annotations

from comfy_api.latest import io

from ..medsteer_core.host.canvas.notes import note
from ..medsteer_core.host.loading import lora
from .types import CATEGORY


class LoadPEFTLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_LoadPEFTLoRA",
            display_name="Load PEFT LoRA",
            category=f"{CATEGORY}/loaders",
            description=(
                "Adds a LoRA that Hugging Face's peft saved, such as the published MedSteer weights, to a model and "
                "its text encoder."
            ),
            search_aliases=["lora", "peft", "adapter_model", "medsteer weights", "text encoder lora"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the LoRA was trained on. It is not changed itself."),
                io.Combo.Input(
                    "lora_name",
                    options=lora.names(),
                    tooltip=(
                        "A folder in models/loras with adapter_model.safetensors and adapter_config.json, or a folder "
                        "of such folders, whose parts are all applied."
                    ),
                ),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How much the LoRA changes the images: 1 as trained, 0 leaves the model as it is.",
                ),
                io.Float.Input(
                    "strength_clip",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip=(
                        "How much the LoRA changes the reading of prompts: 1 as trained, 0 leaves the text encoder as "
                        "it is."
                    ),
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder. Needed for a LoRA with a part for it, unless strength_clip is 0.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model with the LoRA."),
                io.Clip.Output("clip", tooltip="The text encoder with the LoRA; nothing when none is connected."),
                io.String.Output(
                    "report",
                    tooltip="What of each part was applied, what was missing, and what has no place in this model.",
                ),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None) -> bool | str:
        # None: linked to another node, so not known yet
        return lora_name is None or lora.problem(lora_name) or True

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None) -> str:
        return "" if lora_name is None else lora.state(lora_name)

    @classmethod
    def execute(cls, model, lora_name: str, strength_model: float, strength_clip: float, clip=None) -> io.NodeOutput:
        model, clip, report = lora.apply_lora(model, clip, lora_name, strength_model, strength_clip)
        return io.NodeOutput(model, clip, report, ui=note(report))
