"""The inputs that name a pair's classes, of the nodes that ask a judge about it."""

from __future__ import annotations

from comfy_api.latest import io


def class_inputs() -> list[io.String.Input]:
    """source_class and target_class."""
    return [
        io.String.Input(
            "source_class", default="polyps", tooltip="The class of the factual images, as the judge calls it."
        ),
        io.String.Input("target_class", default="normal cecum", tooltip="The class that they should become."),
    ]
