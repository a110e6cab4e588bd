"""The node that does arithmetic with pathology vectors."""

from __future__ import annotations

from comfy_api.latest import io

from ..medsteer_core.host.canvas.notes import note
from ..medsteer_core.pictures.summary import describe
from ..medsteer_core.vectors.algebra import HOW, WEIGHTED, combine
from .types import CATEGORY, Vector


def _weight(name: str, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=1.0, min=-100.0, max=100.0, step=0.05, round=0.001, tooltip=tooltip)


class CombineVectors(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_CombineVectors",
            display_name="Combine Pathology Vectors",
            category=f"{CATEGORY}/vectors",
            description=(
                "Makes one pathology vector of two: both findings at once, one without the other, or the mean of two "
                "wordings."
            ),
            search_aliases=["add vectors", "subtract vectors", "orthogonalise", "orthogonalize", "vector arithmetic"],
            inputs=[
                Vector.Input(
                    "a",
                    tooltip="The first vector, from Extract or Load Pathology Vector. The result has its noise levels.",
                ),
                Vector.Input(
                    "b", tooltip="The second vector, of the same model and LoRAs; sampler and steps may differ."
                ),
                io.Combo.Input(
                    "how",
                    options=list(HOW),
                    default=HOW[0],
                    tooltip=(
                        "What you get. add: both findings along one direction. subtract: a less b, such as dyed "
                        "polyps less polyps. average: one finding from two wordings. orthogonalise a against b: a "
                        "without moving b's finding. joint subspace: both findings, each along its own direction."
                    ),
                ),
                _weight("weight_a", "How much of a counts, for add, subtract and average."),
                _weight("weight_b", "How much of b counts, for add, subtract and average."),
            ],
            outputs=[
                Vector.Output("vector", tooltip="The combined vector, for Steer or Save Pathology Vector."),
                io.String.Output("report", tooltip="What was combined, how much the two overlap, and any warnings."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, a, b, how: str, weight_a: float, weight_b: float) -> io.NodeOutput:
        vector = combine(a, b, how, weight_a, weight_b)
        report = describe(vector)
        if how not in WEIGHTED and (weight_a, weight_b) != (1.0, 1.0):
            report += f"\nThe weights do not count for '{how}'."
        return io.NodeOutput(vector, report, ui=note(report))
