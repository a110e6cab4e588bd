"""The node that puts two concepts into several prompts each."""

from __future__ import annotations

from comfy_api.latest import io

from ..medsteer_core.extraction.prompt_contexts import DEFAULT, filled
from ..medsteer_core.host.canvas.notes import note
from ..medsteer_core.host.sampling.contexts import encode_contexts
from .types import CATEGORY


class PromptContexts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_PromptContexts",
            display_name="Prompt Contexts",
            category=f"{CATEGORY}/vectors",
            description="Puts two concepts into several wordings: a vector then learns the finding, not the wording.",
            search_aliases=["prompt templates", "prompt ensemble", "contrastive prompts", "medsteer"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder."),
                io.String.Input("present", default="polyps", tooltip="The concept with the finding."),
                io.String.Input("absent", default="normal cecum", tooltip="The concept without it."),
                io.String.Input(
                    "templates",
                    default=DEFAULT,
                    multiline=True,
                    tooltip="One prompt a line; {concept} stands where the concept goes.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("present", tooltip="For Extract's input of that name."),
                io.Conditioning.Output("absent", tooltip="For Extract's input of that name."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, clip, present, absent, templates) -> io.NodeOutput:
        texts = [filled(templates, concept) for concept in (present, absent)]
        shown = "\n".join(texts[0])
        encoded = [encode_contexts(clip, some) for some in texts]
        return io.NodeOutput(*encoded, ui=note(shown))
