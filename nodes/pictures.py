"""The nodes that draw: a vector, pairs of images, and a sweep of strengths.

What draws is imported when a node runs, so that ComfyUI's start does not wait for it.
"""

from __future__ import annotations

import json

import torch
from comfy_api.latest import io, ui

from ..medsteer_core.host.canvas.notes import note
from ..medsteer_core.host.folders import judges as judge_folder
from ..medsteer_core.host.sampling import counterfactual as sampled
from ..medsteer_core.pictures.summary import describe
from ..medsteer_core.scores.images import channels_first, compare_pairs
from .judge_inputs import class_inputs
from .types import CATEGORY, Vector

# The workflow goes into the preview's PNG, as core's Preview Image does it.
_METADATA = [io.Hidden.prompt, io.Hidden.extra_pnginfo]


class InspectVector(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_InspectVector",
            display_name="Inspect Pathology Vector",
            category=f"{CATEGORY}/vectors",
            description=(
                "Draws how well a pathology vector tells images with the finding from those without, and how far to "
                "rely on it."
            ),
            search_aliases=["plot vector", "heat map", "auroc", "separability", "histogram", "medsteer"],
            inputs=[Vector.Input("vector", tooltip="From Extract, Load, Import or Combine Pathology Vectors.")],
            outputs=[
                io.Image.Output("picture", tooltip="The picture that the node shows, 1060 pixels wide."),
                io.String.Output("summary", tooltip="The vector in a few lines: prompts, samples, sites, warnings."),
            ],
            hidden=_METADATA,
            is_output_node=True,
        )

    @classmethod
    def execute(cls, vector) -> io.NodeOutput:
        from ..medsteer_core.pictures.vector_plot import vector_picture

        picture = _as_image(vector_picture(vector))
        return io.NodeOutput(picture, describe(vector), ui=ui.PreviewImage(picture, cls=cls))


class CounterfactualPanel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_CounterfactualPanel",
            display_name="Counterfactual Panel",
            category=f"{CATEGORY}/evaluate",
            description="Shows each pair side by side with what changed, and says in words whether it worked.",
            search_aliases=["side by side", "difference", "concept map", "ssim", "verdict", "judge", "medsteer"],
            inputs=[
                io.Image.Input("factual", tooltip="The unsteered images."),
                io.Image.Input(
                    "counterfactual", tooltip="The steered images of the same seeds: one for each factual image."
                ),
                io.Mask.Input(
                    "concept_map",
                    optional=True,
                    tooltip="Shows as a fourth tile where steering acts: Counterfactual Sampler's output of that name.",
                ),
                io.Combo.Input(
                    "judge",
                    options=judge_folder.names(),
                    default=judge_folder.EMBEDDED,
                    optional=True,
                    tooltip=(
                        "Says what it sees before and after. EndoPhantom: its own judge, which knows its drawings "
                        "only. none: SSIM alone. Others are in models/medsteer/judges."
                    ),
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "What lies outside should be kept, and is measured where the judge marks no findings: "
                        "Counterfactual Sampler's output of that name."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output("panel", tooltip="A row for each of the first 4 pairs, and the legends."),
                io.String.Output(
                    "metrics",
                    tooltip=(
                        "How alike the images of each pair are (SSIM, PSNR in dB), and the share of pixels that "
                        "changed, as JSON."
                    ),
                ),
                io.String.Output(
                    "verdict",
                    tooltip="Whether it worked: what the judge sees before and after, and how well the rest was kept.",
                ),
            ],
            hidden=_METADATA,
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, judge: str | None = judge_folder.NONE) -> bool | str:
        # None: linked to another node, so not known yet
        return judge is None or judge_folder.problem(judge) or True

    @classmethod
    def fingerprint_inputs(cls, judge: str | None = None, **_) -> str:
        return "" if judge is None else judge_folder.state(judge)

    @classmethod
    def execute(
        cls,
        factual: torch.Tensor,
        counterfactual: torch.Tensor,
        concept_map: torch.Tensor | None = None,
        judge: str = judge_folder.NONE,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        from ..medsteer_core.pictures.panel import fitted_maps, pair_panel
        from ..medsteer_core.scores.verdict import verdict

        first, second = channels_first(factual), channels_first(counterfactual)
        panel = _as_image(pair_panel(first, second, concept_map))
        metrics = json.dumps(compare_pairs(first, second), indent=1)
        allowed = None if mask is None else fitted_maps(mask, len(first), first.shape[-2:], "mask") >= 0.5
        said = verdict(first, second, judge_folder.judge_of(judge), allowed)
        shown = {**ui.PreviewImage(panel, cls=cls).as_dict(), **note(said).as_dict()}
        return io.NodeOutput(panel, metrics, said, ui=shown)


class StrengthSweep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_StrengthSweep",
            display_name="Strength Sweep",
            category=f"{CATEGORY}/evaluate",
            description="Shows each pair at several strengths side by side, with the judge's score under each image.",
            search_aliases=["grid", "xy plot", "flip rate", "judge", "dose response", "medsteer"],
            inputs=[
                io.Image.Input("factual", tooltip="The unsteered images: one row of the grid for each."),
                io.Image.Input(
                    "counterfactual",
                    tooltip="Counterfactual Sampler's, decoded: all images of the first strength come first.",
                ),
                io.String.Input(
                    "strengths", default="1", tooltip="The same text as in Counterfactual Sampler, such as 0.5, 1, 1.5."
                ),
                io.Combo.Input(
                    "judge",
                    options=judge_folder.names(),
                    default=judge_folder.EMBEDDED,
                    tooltip=(
                        "Says what is in each image. EndoPhantom: its own judge, which knows its drawings only. none: "
                        "SSIM alone. Others are in models/medsteer/judges."
                    ),
                ),
                *class_inputs(),
            ],
            outputs=[
                io.Image.Output("grid", tooltip="Factual first, then a column for each strength."),
                io.String.Output("scores", tooltip="Every pair's score and each strength's flip rate, as JSON."),
                io.String.Output("table", tooltip="The same pairs as CSV: a row for each image and strength."),
            ],
            hidden=_METADATA,
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls,
        judge: str | None,
        source_class: str | None = None,
        target_class: str | None = None,
        strengths: str | None = None,
    ) -> bool | str:
        # None: linked to another node, so not known yet
        if strengths is not None and (unfit := sampled.strengths_problem(strengths)):
            return unfit
        return judge_folder.class_problem(judge, source_class, target_class) or True

    @classmethod
    def fingerprint_inputs(cls, judge: str | None = None, **_) -> str:
        return "" if judge is None else judge_folder.state(judge)

    @classmethod
    def execute(
        cls, factual: torch.Tensor, counterfactual: torch.Tensor, strengths, judge, source_class, target_class
    ) -> io.NodeOutput:
        from ..medsteer_core.pictures.sweep import records, sweep, sweep_picture, table

        first, second = channels_first(factual), channels_first(counterfactual)
        multiples, by = sampled.multiples_of(strengths), judge_folder.judge_of(judge)
        found = sweep(first, second, multiples, source_class, target_class, by, judge)
        grid = _as_image(sweep_picture(first, second, found))
        scores = json.dumps(records(found), indent=1)
        return io.NodeOutput(grid, scores, table(found), ui=ui.PreviewImage(grid, cls=cls))


def _as_image(picture: torch.Tensor) -> torch.Tensor:
    """A picture (3, H, W) as ComfyUI's IMAGE."""
    return picture.movedim(0, -1)[None]
