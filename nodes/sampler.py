"""The node that samples a factual image and its counterfactuals."""

from __future__ import annotations

from comfy_api.latest import io

from ..medsteer_core.host.canvas.notes import note
from ..medsteer_core.host.sampling import runs as sampling
from ..medsteer_core.host.sampling.counterfactual import Pair, multiples_of, sample_pair, strengths_problem
from ..medsteer_core.host.sampling.pair_request import ALL, PairRequest
from ..medsteer_core.steering.presets import CUSTOM
from ..medsteer_core.steering.recipes import OPEN, SAMPLER_RECIPES
from .lock_inputs import (
    computed_tokens_input,
    dilation_input,
    lock_input,
    mask_input,
    smoothing_input,
    start_input,
    threshold_input,
)
from .prompts import asked_size, prompt_text, steer_nodes
from .recipe_input import recipe_input
from .sampling_inputs import sampling_inputs
from .types import CATEGORY, Record

PROMPTS = ("positive", "negative", "counterfactual")


class CounterfactualSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_CounterfactualSampler",
            display_name="Counterfactual Sampler",
            category=f"{CATEGORY}/sampling",
            description=(
                "Makes pairs: the image of your prompt, and the same image with one finding taken away or added; a "
                "lock keeps the rest as it is."
            ),
            search_aliases=["paired sampler", "ksampler", "structure lock", "medsteer", "strength sweep"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "The steered model, from Steer; the factual image is made without the steering. With a "
                        "counterfactual prompt any model will do."
                    ),
                ),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt of both images, or of the factual one where the other has its own."
                ),
                io.Conditioning.Input("negative", tooltip="The negative prompt of both images, mostly empty."),
                io.Latent.Input("latent_image", tooltip="Empty latents, one for each pair, or an image to start from."),
                *sampling_inputs(
                    seed="Another seed gives another pair; both of its images start from the same noise.",
                    steps="Denoising steps of each image; more take longer.",
                    sampler_name="As in KSampler. Samplers that add noise as they go give both images the same.",
                    scheduler="As in KSampler: how the noise goes down from step to step.",
                ),
                io.String.Input(
                    "strengths",
                    default="1",
                    tooltip=(
                        "One counterfactual for each number: times the strength that Steer sets. 0.5, 1, 1.5 gives "
                        "three that share one factual."
                    ),
                ),
                lock_input(
                    OPEN,
                    "Keeps what lies outside the finding as it is. none: the whole image may change. concept map: "
                    "only where steering acts most. prediction difference: only where the two prompts' "
                    "predictions differ most. automatic: the one that there is. A connected mask comes before all.",
                ),
                threshold_input(
                    0.2,
                    "Lower lets more of the image change. For a lock by a map: the share of the map's largest "
                    "value from which on a pixel may change; 0: each map's own, where it parts best (Otsu).",
                ),
                dilation_input(
                    "Higher lets more of the image change. For a lock by a map: how many latent pixels the mask "
                    "is grown by.",
                ),
                io.Sampler.Input("sampler", optional=True, tooltip="Takes the place of sampler_name."),
                io.Sigmas.Input("sigmas", optional=True, tooltip="Takes the place of scheduler and steps."),
                io.Noise.Input("noise", optional=True, tooltip="Takes the place of seed."),
                mask_input(),
                io.Conditioning.Input(
                    "counterfactual",
                    optional=True,
                    tooltip=(
                        "A prompt for the counterfactual image alone. It takes the positive's place from "
                        "counterfactual_start on; the model need not be steered then, but may be."
                    ),
                ),
                start_input(
                    0.45,
                    "Later keeps more of the image. Where the counterfactual prompt begins: 0 is pure noise, 1 "
                    "the finished image.",
                    optional=True,
                ),
                smoothing_input(
                    "Higher gives rounder masks. For a lock by a map: how often the map is smoothed before the "
                    "threshold. 1 with threshold 0.3 gives masks of about the same size as 0 with 0.2.",
                    optional=True,
                ),
                computed_tokens_input(optional=True),
                io.Float.Input(
                    "kept_memory",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "GB of memory that computed_tokens 'in the mask' may use; 0: half of what is free. Where it "
                        "does not suffice, all tokens are computed."
                    ),
                ),
                recipe_input(
                    SAMPLER_RECIPES,
                    "What should change. remove focal: a finding of one place, such as a polyp, goes. remove "
                    "diffuse: one of the whole wall, such as colitis, goes. add: one comes. Sets the lock and "
                    "counterfactual_start; choose the same in Steer. custom: the inputs count.",
                ),
            ],
            outputs=[
                io.Latent.Output("factual", tooltip="The factual images: what KSampler gives without Steer."),
                io.Latent.Output(
                    "counterfactual",
                    tooltip="The counterfactual images; with several strengths, all of the first come first.",
                ),
                io.Mask.Output(
                    "concept_map",
                    tooltip="Where steering or the other prompt acts on the factual image; 1 is the most.",
                ),
                io.Mask.Output("mask", tooltip="Where the image could change: all of it without a lock."),
                io.String.Output("summary", tooltip="What was run, and where the mask came from."),
                Record.Output(
                    "record",
                    tooltip="How each pair was made, for Save Counterfactual Pairs: model, prompts, seed and all else.",
                ),
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
        model,
        positive,
        negative,
        latent_image,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        strengths,
        lock,
        lock_threshold,
        lock_dilation,
        sampler=None,
        sigmas=None,
        noise=None,
        mask=None,
        counterfactual=None,
        counterfactual_start=0.45,
        lock_smoothing=0,
        computed_tokens=ALL,
        kept_memory=0.0,
        recipe=CUSTOM,
    ) -> io.NodeOutput:
        request = request_of(
            cls.hidden, model, positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler, lock,
            lock_threshold, lock_dilation, sampler, sigmas, noise, mask, counterfactual, counterfactual_start,
            lock_smoothing, computed_tokens, kept_memory, recipe, multiples_of(strengths),
        )  # fmt: skip
        return output_of(sample_pair(model, request))


def output_of(pair: Pair, *more) -> io.NodeOutput:
    """The outputs of a node that samples pairs, with ``more`` of its own after them, and the summary on its face."""
    return io.NodeOutput(
        {"samples": pair.factual},
        {"samples": pair.counterfactual},
        pair.concept_map,
        pair.mask,
        pair.summary,
        pair.records,
        *more,
        ui=note(pair.summary),
    )


def request_of(
    hidden, model, positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler, lock, lock_threshold,
    lock_dilation, sampler=None, sigmas=None, noise=None, mask=None, counterfactual=None, counterfactual_start=0.45,
    lock_smoothing=0, computed_tokens=ALL, kept_memory=0.0, recipe=CUSTOM, multiples=(1.0,),
) -> PairRequest:  # fmt: skip
    """The inputs of a node that samples pairs, with what the graph says of them."""
    return PairRequest(
        positive=positive,
        negative=negative,
        latent=latent_image,
        seed=seed,
        cfg=cfg,
        schedule=sampling.schedule(model, steps, sampler_name, scheduler, sampler, sigmas),
        multiples=multiples,
        mask=mask,
        lock=lock,
        threshold=lock_threshold,
        dilation=lock_dilation,
        noise=noise,
        counterfactual=counterfactual,
        start_percent=counterfactual_start,
        smoothing=lock_smoothing,
        computed_tokens=computed_tokens,
        kept_gigabytes=kept_memory,
        recipe=recipe,
        asked_size=asked_size(hidden.prompt, hidden.unique_id, "latent_image"),
        steer_nodes=steer_nodes(hidden.prompt, hidden.unique_id),
        texts={name: prompt_text(hidden.prompt, hidden.unique_id, name) for name in PROMPTS},
    )
