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
            description="Makes one pathology vector of two: sum, difference, mean, one without the other, or both.",
            search_aliases=["add vectors", "subtract vectors", "orthogonalise", "orthogonalize", "vector arithmetic"],
            inputs=[
                Vector.Input("a", tooltip="From Extract or Load Pathology Vector. Its noise levels are the result's."),
                Vector.Input("b", tooltip="Another vector of the same model and LoRAs; any sampler and steps."),
                io.Combo.Input(
                    "how",
                    options=list(HOW),
                    default=HOW[0],
                    tooltip=(
                        "add, subtract, average: of the two displacements, gap times direction. orthogonalise a "
                        "against b: what of a does not move b's finding. joint subspace: both at once, as one vector."
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
