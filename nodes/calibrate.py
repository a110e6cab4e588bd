"""The node that finds a strength for each image."""

from __future__ import annotations

import json

from comfy_api.latest import io

from ..medsteer_core.host.folders import judges as judge_folder
from .judge_inputs import class_inputs
from .sampler import CounterfactualSampler, output_of, request_of
from .types import CATEGORY

_LEFT_OUT, _AFTER = "strengths", "latent_image"


class CalibrateStrength(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        sampler = CounterfactualSampler.define_schema()
        inputs = [each for each in sampler.inputs if each.id != _LEFT_OUT]
        place = 1 + next(place for place, each in enumerate(inputs) if each.id == _AFTER)
        own = [
            io.Vae.Input("vae", tooltip="The VAE that belongs to the model: the judge looks at images."),
            io.Combo.Input(
                "judge",
                options=judge_folder.names(),
                default=judge_folder.EMBEDDED,
                tooltip=(
                    "Says whether the finding changed. EndoPhantom: its own judge, which knows its drawings only. "
                    "none: the model itself, by the prompt at target. Others are in models/medsteer/judges."
                ),
            ),
            *class_inputs(),
            io.Int.Input(
                "passes",
                default=5,
                min=1,
                max=32,
                tooltip="More finds the strength more closely and takes longer: counterfactuals tried of each image.",
            ),
            io.Float.Input(
                "most",
                default=2.0,
                min=0.01,
                max=100.0,
                step=0.05,
                tooltip="Where the search ends: times the strength that Steer sets.",
            ),
        ]
        target = io.Conditioning.Input(
            "target",
            optional=True,
            tooltip="With judge none: the prompt of what the images should become. Some are drawn to compare with.",
        )
        return io.Schema(
            node_id="MedSteer_CalibrateStrength",
            display_name="Calibrate Strength",
            category=f"{CATEGORY}/sampling",
            description=(
                "Makes pairs with the least strength that changes the finding, for each image its own, as a judge sees "
                "it: what is changed more than needed costs structure."
            ),
            search_aliases=["least strength", "bisection", "dose", "auto strength", "flip", "medsteer"],
            inputs=[*inputs[:place], *own, *inputs[place:], target],
            outputs=[
                *sampler.outputs,
                io.String.Output(
                    "strengths",
                    tooltip="Of each image the multiple found (null: none flipped it), and what was tried, as JSON.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(
        cls, judge: str | None, source_class: str | None = None, target_class: str | None = None
    ) -> bool | str:
        # None: linked to another node, so not known yet
        return judge_folder.class_problem(judge, source_class, target_class) or True

    @classmethod
    def fingerprint_inputs(cls, judge: str | None = None, **_) -> str:
        return "" if judge is None else judge_folder.state(judge)

    @classmethod
    def execute(
        cls, model, latent_image, vae, judge, source_class, target_class, passes, most, target=None, **inputs
    ) -> io.NodeOutput:
        from ..medsteer_core.host.sampling.calibration import calibrate, told
        from ..medsteer_core.host.sampling.flips import ByJudge, ByTarget

        request, by = request_of(cls.hidden, model, latent_image=latent_image, **inputs), judge_folder.judge_of(judge)
        flips = ByTarget(model, request, target) if by is None else ByJudge(vae, by, source_class, target_class)
        made = calibrate(model, request, flips, passes, most)
        return output_of(made.pair, json.dumps(told(made), indent=1))
