"""The node that steers a model along a pathology vector."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..medsteer_core.host.canvas.notes import note
from ..medsteer_core.host.patching.steer import steer
from ..medsteer_core.steering.presets import CUSTOM, PRESETS
from ..medsteer_core.steering.recipes import STEER_RECIPES
from ..medsteer_core.vectors.schedule import CONSTANT, CURVES
from .recipe_input import recipe_input
from .types import CATEGORY, Vector

KEEP_NORM = "Keeps every steered token at its former length, as the paper does."


def _strength(default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input("strength", default=default, min=-100.0, max=100.0, step=0.05, round=0.001, tooltip=tooltip)


def _keep_norm(default: bool) -> io.Boolean.Input:
    return io.Boolean.Input("keep_norm", default=default, advanced=True, tooltip=KEEP_NORM)


class Steer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_Steer",
            display_name="Steer",
            category=f"{CATEGORY}/steering",
            description="Takes a finding out of what a model draws, or puts one in, with a pathology vector.",
            search_aliases=["medsteer", "counterfactual", "activation steering", "remove finding", "suppress concept"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that the vector was extracted from. It is not changed itself."
                ),
                Vector.Input("vector", tooltip="From Extract or Load Pathology Vector."),
                io.DynamicCombo.Input(
                    "operator",
                    options=[
                        io.DynamicCombo.Option(
                            "affine",
                            [
                                _strength(
                                    1.5,
                                    "Higher changes more: 0 nothing, 1 as far as the absent prompt would go, "
                                    "beyond exaggerates; 1.5 to 2 make up for focus. Wants a vector with noise "
                                    "'same state' or estimator leace.",
                                ),
                                io.Float.Input(
                                    "focus",
                                    default=1.0,
                                    min=0.0,
                                    max=10.0,
                                    step=0.1,
                                    tooltip=(
                                        "Higher keeps more of the rest: it spares the tokens in which little would "
                                        "change. 0 steers all; 1 suits taking a finding away, 1.5 adding one."
                                    ),
                                ),
                                _keep_norm(False),
                            ],
                        ),
                        io.DynamicCombo.Option(
                            "suppress",
                            [
                                _strength(
                                    2.0,
                                    "Higher changes more: 0 nothing, 1 removes the finding's part, 2 reflects it "
                                    "(the paper).",
                                ),
                                _keep_norm(True),
                            ],
                        ),
                        io.DynamicCombo.Option("ablate", [_keep_norm(False)]),
                        io.DynamicCombo.Option(
                            "add",
                            [
                                _strength(
                                    1.0,
                                    "Higher changes more: 0 nothing, 1 as far as the two prompts' means lie apart "
                                    "(the class gap).",
                                ),
                                io.Combo.Input(
                                    "toward",
                                    options=["present", "absent"],
                                    default="present",
                                    tooltip="present adds the finding, absent takes it away.",
                                ),
                                _keep_norm(False),
                            ],
                        ),
                        io.DynamicCombo.Option(
                            "set",
                            [
                                _strength(
                                    1.0,
                                    "Higher changes more: 0 nothing, 1 moves every token to the class's mean, 1.5 "
                                    "goes beyond.",
                                ),
                                io.Combo.Input(
                                    "toward",
                                    options=["absent", "present"],
                                    default="absent",
                                    tooltip="Whose mean: absent takes the finding away, present adds it.",
                                ),
                                _keep_norm(False),
                            ],
                        ),
                        io.DynamicCombo.Option(
                            "switch",
                            [
                                _strength(
                                    1.0,
                                    "Higher changes more: takes this many times the finding's part away and adds "
                                    "as much along the vector at the input target.",
                                ),
                                _keep_norm(False),
                            ],
                        ),
                    ],
                    tooltip=(
                        "How the finding changes. affine: what its prompt put in is replaced, token by token. "
                        "suppress: it is taken away (the paper). ablate: removes all that lies along the vector. add: "
                        "pushes toward a class. set: moves to a class's mean. switch: one finding for another."
                    ),
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.45,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Later keeps more of the image. Where in the denoising steering begins (0 = pure noise); 0 "
                        "for a published method."
                    ),
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the denoising steering ends (1 = finished image).",
                ),
                io.String.Input(
                    "sites",
                    default="all",
                    advanced=True,
                    tooltip=(
                        "Which sites of the model are steered: all, numbers in their order such as 0-3,8, a name "
                        "pattern with *, or auto: those that tell the classes apart."
                    ),
                ),
                io.String.Input(
                    "rows",
                    default="all",
                    advanced=True,
                    tooltip=(
                        "Which prompt's part of a model call is steered: all, positive, negative, or another name of "
                        "the guider."
                    ),
                ),
                io.Combo.Input(
                    "preset",
                    options=[CUSTOM, *PRESETS],
                    default=CUSTOM,
                    optional=True,
                    tooltip=(
                        "A published method instead of operator, sites and rows, which then don't count; the window "
                        "stays. custom: the other inputs count."
                    ),
                ),
                io.Combo.Input(
                    "curve",
                    options=list(CURVES),
                    default=CONSTANT,
                    optional=True,
                    advanced=True,
                    tooltip="How strength changes over the window: constant, from 0 up, down to 0, or up and down.",
                ),
                Vector.Input(
                    "target",
                    optional=True,
                    tooltip="The finding that takes the first one's place, for the operator switch.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where to steer: white fully, black not at all. Any size; soft edges count in part.",
                ),
                recipe_input(
                    STEER_RECIPES,
                    "What should change. remove focal: a finding of one place, such as a polyp, goes. remove "
                    "diffuse: one of the whole wall, such as colitis, goes. add: one comes. Sets operator, "
                    "strength, focus, window and rows; choose the same in Counterfactual Sampler. custom: the "
                    "inputs count.",
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The steered model, for KSampler. Steer nodes can be chained.")],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        vector,
        start_percent: float,
        end_percent: float,
        sites: str,
        rows: str,
        operator: dict[str, Any] | None = None,
        preset: str = CUSTOM,
        curve: str = CONSTANT,
        target=None,
        mask=None,
        recipe: str = CUSTOM,
    ) -> io.NodeOutput:
        parameters = dict(operator or {})  # ComfyUI passes nothing for an operator that it does not know
        name = parameters.pop("operator", None)
        window = (start_percent, end_percent)
        steered, text = steer(
            model, vector, name, parameters, *window, sites, rows, preset, curve, target, mask, recipe
        )
        return io.NodeOutput(steered, ui=note(text))
