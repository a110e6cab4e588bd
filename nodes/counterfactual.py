"""The node that compares a factual and a counterfactual image."""

from __future__ import annotations

import json

import torch
from comfy_api.latest import io

from ..medsteer_core.host.canvas.notes import note
from ..medsteer_core.scores.images import channels_first, compare_pairs, in_words
from .types import CATEGORY


class CounterfactualCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_CounterfactualCompare",
            display_name="Counterfactual Compare",
            category=f"{CATEGORY}/evaluate",
            description="Shows in colour what changed between the two images of a pair, and measures how much.",
            search_aliases=["difference map", "ssim", "pair metrics", "medsteer"],
            inputs=[
                io.Image.Input("factual", tooltip="The unsteered image."),
                io.Image.Input("counterfactual", tooltip="The steered image from the same seed; same size and batch."),
            ],
            outputs=[
                io.Image.Output(
                    "difference",
                    tooltip=(
                        "What changed, with a legend: orange is brighter in the counterfactual, purple darker. The "
                        "first 8 pairs."
                    ),
                ),
                io.String.Output(
                    "metrics",
                    tooltip=(
                        "How alike the images of each pair are (SSIM, PSNR in dB), and the share of pixels that "
                        "changed, as JSON."
                    ),
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, factual: torch.Tensor, counterfactual: torch.Tensor) -> io.NodeOutput:
        from ..medsteer_core.pictures.difference import difference_image  # ComfyUI's start does not wait for what draws

        first, second = (channels_first(image) for image in (factual, counterfactual))
        compared = compare_pairs(first, second)
        metrics = json.dumps(compared, indent=1)
        difference = difference_image(first, second).movedim(0, -1)[None]
        return io.NodeOutput(difference, metrics, ui=note(metrics, in_words(compared)))
