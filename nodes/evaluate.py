"""The nodes that tell an effect from a control: an evaluation of pairs, and a vector of drawn directions."""

from __future__ import annotations

import json

import torch
from comfy_api.latest import io, ui

from ..medsteer_core.dataset.records import COUNTERFACTUAL, RANDOM, REPROMPT, STRENGTH_ZERO
from ..medsteer_core.host.canvas.notes import note
from ..medsteer_core.host.folders import judges as judge_folder
from ..medsteer_core.scores.images import channels_first
from .judge_inputs import class_inputs
from .prompts import mask_in_graph
from .types import CATEGORY, Vector


class EvaluatePairs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_EvaluatePairs",
            display_name="Evaluate Pairs",
            category=f"{CATEGORY}/evaluate",
            description=(
                "Counts how often the finding changed as wanted, measures what else changed, and compares with "
                "controls."
            ),
            search_aliases=["flip rate", "judge", "control", "null test", "lpips", "ssim", "psnr", "medsteer"],
            inputs=[
                io.Image.Input("factual", tooltip="The unsteered images."),
                io.Image.Input("counterfactual", tooltip="The steered images: one for each factual image."),
                io.Combo.Input(
                    "judge",
                    options=[name for name in judge_folder.names() if name != judge_folder.NONE],
                    default=judge_folder.EMBEDDED,
                    tooltip=(
                        "Says what is in each image. EndoPhantom: its own judge, which knows its drawings only. "
                        "Others are in models/medsteer/judges."
                    ),
                ),
                *class_inputs(),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "Marks the finding where the judge marks none: one mask, or one for each pair; Counterfactual "
                        "Sampler's concept_map, or your own."
                    ),
                ),
                io.Image.Input(
                    "strength_0",
                    optional=True,
                    tooltip="Control: of strengths 0, 1 the images of 0. Must be identical to the factual images.",
                ),
                io.Image.Input(
                    "random_direction",
                    optional=True,
                    tooltip="Control: steered the same way with a vector from Random Direction. Should flip less.",
                ),
                io.Image.Input(
                    "reprompted",
                    optional=True,
                    tooltip="Control: the target's prompt at the same seed, from KSampler. Should keep less.",
                ),
            ],
            outputs=[
                io.String.Output("report", tooltip="Every number of every arm and pair, as JSON."),
                io.String.Output("table", tooltip="A row for each arm as text, with denominators and notes."),
                io.Image.Output("plot", tooltip="The picture that the node shows, 1060 pixels wide."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls, judge: str | None, source_class: str | None = None, target_class: str | None = None
    ) -> bool | str:
        # None: linked to another node, so not known yet
        unfit = "" if judge is None else _problem(judge)
        return unfit or judge_folder.class_problem(judge, source_class, target_class) or True

    @classmethod
    def fingerprint_inputs(cls, judge: str | None = None, **_) -> str:
        return "" if judge is None else judge_folder.state(judge)

    @classmethod
    def execute(
        cls,
        factual: torch.Tensor,
        counterfactual: torch.Tensor,
        judge: str,
        source_class: str,
        target_class: str,
        mask: torch.Tensor | None = None,
        strength_0: torch.Tensor | None = None,
        random_direction: torch.Tensor | None = None,
        reprompted: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        from ..medsteer_core.errors import MedSteerError
        from ..medsteer_core.evaluation.plot import evaluation_picture
        from ..medsteer_core.evaluation.report import evaluate_batches
        from ..medsteer_core.evaluation.table import in_short, text
        from ..medsteer_core.host.canvas.progress import counter

        if problem := _problem(judge):
            raise MedSteerError(problem)
        given = {
            COUNTERFACTUAL: counterfactual, STRENGTH_ZERO: strength_0, RANDOM: random_direction, REPROMPT: reprompted,
        }  # fmt: skip
        arms = {arm: channels_first(images) for arm, images in given.items() if images is not None}
        report = evaluate_batches(
            channels_first(factual),
            arms,
            source_class,
            target_class,
            judge_folder.judge_of(judge),
            mask=mask,
            mask_source=mask_in_graph(cls.hidden.prompt, cls.hidden.unique_id, "mask"),
            after_each=counter(len(factual) * len(arms)),
        )
        table = text(report)
        plot = evaluation_picture([report]).movedim(0, -1)[None]
        shown = {**ui.PreviewImage(plot, cls=cls).as_dict(), **note(table, in_short(report)).as_dict()}
        return io.NodeOutput(json.dumps(report, indent=1), table, plot, ui=shown)


class RandomDirection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_RandomDirection",
            display_name="Random Direction",
            category=f"{CATEGORY}/vectors",
            description=(
                "Makes a control for a pathology vector: the same vector with directions drawn at random, which "
                "should not work."
            ),
            search_aliases=["control", "null direction", "baseline", "medsteer"],
            inputs=[
                Vector.Input("vector", tooltip="The vector that the pairs are steered with."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Another seed draws other directions. Use several: one draw is one sample.",
                ),
                Vector.Input(
                    "within_class",
                    optional=True,
                    tooltip=(
                        "Makes the control stricter: draws then lie where images of one class differ. Connect two "
                        "vectors of the same prompts, noise unpaired, other seeds, subtracted by Combine. Without it "
                        "every direction is as likely."
                    ),
                ),
            ],
            outputs=[
                Vector.Output("vector", tooltip="The drawn vector, for Steer."),
                io.String.Output("report", tooltip="How it was drawn, and how far operators push with it."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, vector, seed: int, within_class=None) -> io.NodeOutput:
        from ..medsteer_core.vectors.random_direction import describe_drawn, random_direction

        control = random_direction(vector, seed, within_class)
        report = describe_drawn(vector, control)
        return io.NodeOutput(control, report, ui=note(report))


def _problem(judge: str) -> str:
    if judge == judge_folder.NONE:
        return "judge is 'none'; a judge was expected, since flips are its word. Counterfactual Panel needs none."
    return judge_folder.problem(judge)
