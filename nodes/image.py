"""The node that edits real images."""

from __future__ import annotations

from comfy_api.latest import io

from ..medsteer_core.host.canvas.notes import note
from ..medsteer_core.host.sampling import runs as sampling
from ..medsteer_core.host.sampling.counterfactual import multiples_of, strengths_problem
from ..medsteer_core.host.sampling.image_edit import MODELS_SIZE, SIZES, edit_images
from ..medsteer_core.host.sampling.pair_request import ALL, AUTOMATIC, PairRequest
from ..medsteer_core.steering.presets import CUSTOM
from ..medsteer_core.steering.recipes import IMAGE_RECIPES
from .lock_inputs import (
    computed_tokens_input,
    dilation_input,
    lock_input,
    mask_input,
    smoothing_input,
    start_input,
    threshold_input,
)
from .prompts import prompt_text, steer_nodes
from .recipe_input import recipe_input
from .sampling_inputs import cfg_input, scheduler_input, steps_input
from .types import CATEGORY, Record

PROMPTS = ("positive", "negative", "counterfactual")


class CounterfactualOfImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_CounterfactualOfImage",
            display_name="Counterfactual of Image",
            category=f"{CATEGORY}/sampling",
            description=(
                "Takes one finding out of your own image, or puts one in, and leaves the rest its own pixels: what the "
                "model thinks, not what would have been."
            ),
            search_aliases=["real image", "edit", "inversion", "flowedit", "ddim inversion", "img2img", "medsteer"],
            inputs=[
                io.Image.Input("image", tooltip="Your images, of any size; all of a batch have the same finding."),
                io.Model.Input(
                    "model",
                    tooltip=(
                        "The model that draws the change. From Steer it is moved along the vector; with a "
                        "counterfactual prompt any model will do."
                    ),
                ),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Conditioning.Input("positive", tooltip="A prompt for what is in the image, the finding included."),
                io.Conditioning.Input("negative", tooltip="The negative prompt, mostly empty."),
                steps_input("Denoising steps; more take longer."),
                cfg_input(3.0, "Higher changes more (classifier-free guidance scale)."),
                scheduler_input("As in KSampler: how the noise goes down from step to step."),
                io.String.Input(
                    "strengths",
                    default="1",
                    tooltip="One counterfactual for each number: times the strength that Steer sets. 0: no steering.",
                ),
                lock_input(
                    AUTOMATIC,
                    "Keeps your own pixels outside the finding. none: the whole image may change. concept map: "
                    "only where steering acts most. prediction difference: only where the two prompts' "
                    "predictions differ most. automatic: the one that there is. A connected mask comes before all.",
                ),
                threshold_input(
                    0.0,
                    "Lower lets more of the image change: from which share of the map's largest value on. 0: each "
                    "image's own, where its map parts best (Otsu).",
                ),
                dilation_input("Higher lets more of the image change: latent pixels by which the mask is grown."),
                smoothing_input(
                    "Higher gives rounder masks: how often the map is smoothed before the threshold.", optional=False
                ),
                start_input(
                    0.35,
                    "Later keeps more of the image. Where the counterfactual prompt begins: 0 is pure noise, 1 "
                    "the finished image. Steer has a window of its own.",
                    optional=False,
                ),
                io.Combo.Input(
                    "size",
                    options=list(SIZES),
                    default=MODELS_SIZE,
                    advanced=True,
                    tooltip=(
                        "At which size the model sees the image. the model's: scaled to the pixels that it was made "
                        "for, and the change scaled back. the image's: as it is."
                    ),
                ),
                computed_tokens_input(optional=False),
                io.Conditioning.Input(
                    "counterfactual",
                    optional=True,
                    tooltip="A prompt for what the image should show instead; with it no vector is needed.",
                ),
                mask_input(),
                io.String.Input(
                    "group",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Keeps a patient's images in one split of a data set: a name for all images of the batch, or a "
                        "line for each. Only a hash of it is kept."
                    ),
                ),
                io.Sigmas.Input("sigmas", optional=True, tooltip="Takes the place of scheduler and steps."),
                recipe_input(
                    IMAGE_RECIPES,
                    "What should change. remove focal: a finding of one place, such as a polyp, goes. remove "
                    "diffuse: one of the whole wall, such as colitis, goes. add: one comes. Choose the same in Steer. "
                    "custom: the inputs count.",
                ),
            ],
            outputs=[
                io.Image.Output("factual", tooltip="Your images as they came."),
                io.Image.Output(
                    "counterfactual",
                    tooltip=(
                        "The images with the finding changed, in their own pixels and size; with several strengths, "
                        "all of the first come first."
                    ),
                ),
                io.Mask.Output("concept_map", tooltip="Where the change acts on the image; 1 is the most."),
                io.Mask.Output("mask", tooltip="Where the image could change; outside of it it is yours to the bit."),
                io.Latent.Output("latent", tooltip="The counterfactuals' latents, at the size that the model saw."),
                io.String.Output("summary", tooltip="What was done, where the mask came from, and what it cost."),
                Record.Output("record", tooltip="How each pair was made, for Save Counterfactual Pairs."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, strengths: str | None = None) -> bool | str:
        # None: linked to another node, so not known yet
        return strengths is None or strengths_problem(strengths) or True

    @classmethod
    def execute(
        cls,
        image,
        model,
        vae,
        positive,
        negative,
        steps,
        cfg,
        scheduler,
        strengths,
        lock,
        lock_threshold,
        lock_dilation,
        lock_smoothing,
        counterfactual_start,
        size,
        computed_tokens=ALL,
        counterfactual=None,
        mask=None,
        group="",
        sigmas=None,
        recipe=CUSTOM,
    ) -> io.NodeOutput:
        request = PairRequest(
            positive=positive,
            negative=negative,
            latent={},
            seed=0,
            cfg=cfg,
            schedule=sampling.schedule(model, steps, "euler", scheduler, None, sigmas),
            multiples=multiples_of(strengths),
            mask=mask,
            lock=lock,
            threshold=lock_threshold,
            dilation=lock_dilation,
            counterfactual=counterfactual,
            start_percent=counterfactual_start,
            smoothing=lock_smoothing,
            computed_tokens=computed_tokens,
            recipe=recipe,
            steer_nodes=steer_nodes(cls.hidden.prompt, cls.hidden.unique_id),
            texts={name: prompt_text(cls.hidden.prompt, cls.hidden.unique_id, name) for name in PROMPTS},
        )
        pair = edit_images(model, vae, image, request, size, group)
        return io.NodeOutput(
            pair.factual,
            pair.counterfactual,
            pair.concept_map,
            pair.mask,
            {"samples": pair.pair.counterfactual},
            pair.summary,
            pair.records,
            ui=note(pair.summary),
        )
