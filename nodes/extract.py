"""The node that turns a pair of prompts into a pathology vector."""

from __future__ import annotations

from comfy_api.latest import io

from ..medsteer_core.host.canvas.notes import note
from ..medsteer_core.host.folders import samples as sample_folder
from ..medsteer_core.host.sampling import extraction
from ..medsteer_core.host.sampling import runs as sampling
from ..medsteer_core.pictures.summary import describe
from .prompts import prompt_text
from .sampling_inputs import sampling_inputs
from .types import CATEGORY, Vector

PROMPTS = ("present", "absent", "negative")


class ExtractPathologyVector(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_ExtractPathologyVector",
            display_name="Extract Pathology Vector",
            category=f"{CATEGORY}/vectors",
            description=(
                "Samples both prompts and finds, for every step and cross-attention block, the direction in which a "
                "finding moves the activations."
            ),
            search_aliases=["steering vector", "concept direction", "activation steering", "medsteer"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to be steered later; vectors fit only the model they come from."
                ),
                io.Conditioning.Input("present", tooltip="Prompt with the finding, such as 'polyps'."),
                io.Conditioning.Input("absent", tooltip="Prompt without it, such as 'normal cecum'."),
                io.Conditioning.Input(
                    "negative", tooltip="The negative prompt of classifier-free guidance, mostly empty."
                ),
                io.Latent.Input("latent_image", tooltip="Only its width and height count."),
                io.Int.Input(
                    "samples",
                    default=16,
                    min=1,
                    max=4096,
                    tooltip="Images sampled of each prompt. More is steadier and slower.",
                ),
                *sampling_inputs(
                    seed="Seed of the samples' noise. Use another seed for the images that you steer.",
                    steps="Denoising steps of every sample.",
                    sampler_name="The sampler to record with.",
                    scheduler="The noise schedule to record with.",
                ),
                io.Combo.Input(
                    "noise",
                    options=[extraction.SAME_STATE, extraction.PAIRED, extraction.UNPAIRED],
                    default=extraction.SAME_STATE,
                    tooltip=(
                        "same state: both prompts at every state, for the operator affine. paired: both prompts start "
                        "from the same noise. unpaired: from other noise (the paper)."
                    ),
                ),
                io.Sampler.Input("sampler", optional=True, tooltip="Overrides sampler_name."),
                io.Sigmas.Input("sigmas", optional=True, tooltip="Overrides scheduler and steps."),
                io.Int.Input(
                    "rank",
                    default=8,
                    min=1,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="Only for noise 'same state': how many directions a block and step have.",
                ),
                io.Combo.Input(
                    "estimator",
                    options=extraction.ESTIMATOR_NAMES,
                    default=extraction.MEAN_DIFFERENCE,
                    optional=True,
                    tooltip=(
                        "How samples become a direction. mean difference: the paper's. paired difference and principal "
                        "component: from pairs (noise 'paired'). lda: what tells the classes apart best. leace: what "
                        "the operator affine needs to erase the finding."
                    ),
                ),
                io.Boolean.Input(
                    "keep_samples",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Keeps what was seen of the samples on disk (activations, neither images nor texts), so that "
                        "a stopped extraction goes on and more samples add to those there."
                    ),
                ),
            ],
            outputs=[
                Vector.Output("vector", tooltip="The pathology vector, for Steer and Save Pathology Vector."),
                io.String.Output(
                    "summary", tooltip="What was recorded: prompts, samples, sites, steps, class gaps, separability."
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        present,
        absent,
        negative,
        latent_image,
        samples,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        noise,
        sampler=None,
        sigmas=None,
        rank=8,
        estimator=extraction.MEAN_DIFFERENCE,
        keep_samples=True,
    ) -> io.NodeOutput:
        request = extraction.Request(
            present=present,
            absent=absent,
            negative=negative,
            latent=latent_image,
            samples=samples,
            seed=seed,
            cfg=cfg,
            noise=noise,
            schedule=sampling.schedule(model, steps, sampler_name, scheduler, sampler, sigmas),
            texts={name: prompt_text(cls.hidden.prompt, cls.hidden.unique_id, name) for name in PROMPTS},
            rank=rank,
            estimator=estimator,
            store=sample_folder.store() if keep_samples else None,
        )
        remarks: list[str] = []
        vector = extraction.extract(model, request, remarks.append)
        summary = describe(vector)
        shown = "\n".join([summary, *remarks])
        return io.NodeOutput(vector, summary, ui=note(shown))
