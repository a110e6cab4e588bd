"""The node that draws phantoms whose truth is known."""

from __future__ import annotations

from comfy_api.latest import io

from ..medsteer_core.endophantom.phantom import CLASSES
from .types import CATEGORY


class PhantomImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_PhantomImage",
            display_name="Phantom Image",
            category=f"{CATEGORY}/images",
            description=(
                "Draws endoscopy phantoms to try things on: an image with a finding, and the same scene without it as "
                "the truth to compare with."
            ),
            search_aliases=["example image", "test image", "ground truth", "render", "endophantom", "medsteer"],
            inputs=[
                io.Combo.Input(
                    "shows", options=list(CLASSES), default="polyps", tooltip="What the image shows, as a class."
                ),
                io.Combo.Input(
                    "truth_shows",
                    options=list(CLASSES),
                    default="normal cecum",
                    tooltip="What the same scene shows in the truth: what a perfect counterfactual would be.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**62,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Another seed draws another scene.",
                ),
                io.Int.Input("width", default=128, min=16, max=2048, tooltip="Pixels; EndoPhantom draws 128 x 128."),
                io.Int.Input("height", default=128, min=16, max=2048, tooltip="Pixels; EndoPhantom draws 128 x 128."),
                io.Int.Input("batch_size", default=1, min=1, max=256, tooltip="How many scenes."),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The scenes with what they show."),
                io.Image.Output("truth", tooltip="The same scenes with what the truth shows."),
                io.Mask.Output("mask", tooltip="Where the two differ."),
            ],
        )

    @classmethod
    def execute(cls, shows, truth_shows, seed, width, height, batch_size) -> io.NodeOutput:
        from ..medsteer_core.endophantom.true_pairs import true_pairs  # draws only when it runs

        drawn = true_pairs(shows, truth_shows, batch_size, seed, (height, width))
        return io.NodeOutput(drawn.image.movedim(1, -1), drawn.truth.movedim(1, -1), drawn.mask)
