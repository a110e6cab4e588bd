"""The node that samples a factual image and its counterfactuals in one run."""

from __future__ import annotations

from comfy_api.latest import io

from ..medsteer_core.host.canvas.notes import note
from ..medsteer_core.host.sampling import counterfactual
from ..medsteer_core.host.sampling import runs as sampling
from .prompts import prompt_text
from .sampling_inputs import sampling_inputs
from .types import CATEGORY, Record

PROMPTS = ("positive", "negative")


class CounterfactualSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_CounterfactualSampler",
            display_name="Counterfactual Sampler",
            category=f"{CATEGORY}/sampling",
            description=(
                "Samples the factual image and its counterfactuals from the same noise in one run, and can lock what "
                "lies outside the finding."
            ),
            search_aliases=["paired sampler", "ksampler", "structure lock", "medsteer", "strength sweep"],
            inputs=[
                io.Model.Input("model", tooltip="The steered model, from Steer. The factual image is made without it."),
                io.Conditioning.Input("positive", tooltip="The prompt of both images."),
                io.Conditioning.Input("negative", tooltip="The negative prompt of both images, mostly empty."),
                io.Latent.Input("latent_image", tooltip="Empty latents, one for each pair, or an image to start from."),
                *sampling_inputs(
                    seed="Seed of the noise that both images share.",
                    steps="Denoising steps.",
                    sampler_name="The sampler. Those that add noise as they go give both images the same.",
                    scheduler="The noise schedule.",
                ),
                io.String.Input(
                    "strengths",
                    default="1",
                    tooltip=(
                        "One counterfactual for each number: times the strength that Steer sets. 0.5, 1, 1.5 gives "
                        "three that share one factual."
                    ),
                ),
                io.Combo.Input(
                    "lock",
                    options=list(counterfactual.LOCKS),
                    default=counterfactual.OPEN,
                    tooltip=(
                        "none: the whole image may change. concept map: only where the steering acts most (one more "
                        "factual run finds out where). A connected mask comes before both."
                    ),
                ),
                io.Float.Input(
                    "lock_threshold",
                    default=0.2,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="For lock 'concept map': a pixel may change from this share of the map's largest value on.",
                ),
                io.Int.Input(
                    "lock_dilation",
                    default=1,
                    min=0,
                    max=64,
                    advanced=True,
                    tooltip="For lock 'concept map': how many latent pixels the mask is grown by.",
                ),
                io.Sampler.Input("sampler", optional=True, tooltip="Overrides sampler_name."),
                io.Sigmas.Input("sigmas", optional=True, tooltip="Overrides scheduler and steps."),
                io.Noise.Input("noise", optional=True, tooltip="Overrides seed."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the image may change (white). Adding a finding needs one to be locked in place.",
                ),
            ],
            outputs=[
                io.Latent.Output("factual", tooltip="The unsteered images."),
                io.Latent.Output(
                    "counterfactual", tooltip="The steered images; with several strengths, all of the first come first."
                ),
                io.Mask.Output("concept_map", tooltip="Where the steering acts on the factual image; 1 is the most."),
                io.Mask.Output("mask", tooltip="Where the image could change: all of it without a lock."),
                io.String.Output("summary", tooltip="What was run, and where the mask came from."),
                Record.Output(
                    "record",
                    tooltip="How each pair was made, for Save Counterfactual Pairs: model, prompts, seed, all.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            has_intermediate_output=True,
        )

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
    ) -> io.NodeOutput:
        request = counterfactual.PairRequest(
            positive=positive,
            negative=negative,
            latent=latent_image,
            seed=seed,
            cfg=cfg,
            schedule=sampling.schedule(model, steps, sampler_name, scheduler, sampler, sigmas),
            multiples=counterfactual.multiples_of(strengths),
            mask=mask,
            lock=lock,
            threshold=lock_threshold,
            dilation=lock_dilation,
            noise=noise,
            texts={name: prompt_text(cls.hidden.prompt, cls.hidden.unique_id, name) for name in PROMPTS},
        )
        pair = counterfactual.sample_pair(model, request)
        return io.NodeOutput(
            {"samples": pair.factual},
            {"samples": pair.counterfactual},
            pair.concept_map,
            pair.mask,
            pair.summary,
            pair.records,
            ui=note(pair.summary),
        )
