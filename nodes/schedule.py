"""Nodes that give noise schedules."""

from __future__ import annotations

from comfy_api.latest import io

from ..medsteer_core.checkpoints.pixart_sigmas import TRAINING_STEPS, pixart_sigmas
from .types import CATEGORY


class PixArtSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_PixArtSigmas",
            display_name="PixArt-alpha Sigmas",
            category=f"{CATEGORY}/sampling",
            description="Gives the paper's noise levels for PixArt-alpha, to repeat published results.",
            search_aliases=["dpm-solver", "diffusers schedule", "scheduler", "medsteer paper"],
            inputs=[
                io.Int.Input(
                    "steps", default=20, min=1, max=TRAINING_STEPS - 1, tooltip="Denoising steps; the paper takes 20."
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Below 1 starts from an image, not from pure noise: the last steps of a longer schedule.",
                ),
            ],
            outputs=[
                io.Sigmas.Output(
                    "sigmas", tooltip="For the sigmas inputs of Extract Pathology Vector, SamplerCustom and Import."
                )
            ],
        )

    @classmethod
    def execute(cls, steps: int, denoise: float) -> io.NodeOutput:
        return io.NodeOutput(pixart_sigmas(steps, denoise))
