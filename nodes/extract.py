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
                "Learns from a prompt with a finding and one without it what the finding changes inside the model, as "
                "a pathology vector for Steer."
            ),
            search_aliases=["steering vector", "concept direction", "activation steering", "medsteer"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to be steered later; a vector fits only the model that it comes from."
                ),
                io.Conditioning.Input("present", tooltip="Prompt with the finding, such as 'polyps'."),
                io.Conditioning.Input("absent", tooltip="Prompt without it, such as 'normal cecum'."),
                io.Conditioning.Input("negative", tooltip="The negative prompt, mostly empty."),
                io.Latent.Input(
                    "latent_image", tooltip="Gives the samples' width and height; nothing else of it counts."
                ),
                io.Int.Input(
                    "samples",
                    default=16,
                    min=1,
                    max=4096,
                    tooltip=(
                        "More is steadier and slower. Images sampled of each prompt; with noise 'same state' of both "
                        "together."
                    ),
                ),
                *sampling_inputs(
                    seed="Another seed samples other images. Use another one for the images that you steer.",
                    steps="Denoising steps of every sample; more take longer.",
                    sampler_name="The sampler of the samples; the vector works with others too.",
                    scheduler="The noise schedule of the samples; the vector works with others too.",
                ),
                io.Combo.Input(
                    "noise",
                    options=[extraction.SAME_STATE, extraction.PAIRED, extraction.UNPAIRED],
                    default=extraction.SAME_STATE,
                    tooltip=(
                        "How the two prompts are compared. same state: in the same half-made images, for the operator "
                        "affine. paired: from the same noise. unpaired: from different noise (the paper)."
                    ),
                ),
                io.Sampler.Input("sampler", optional=True, tooltip="Takes the place of sampler_name."),
                io.Sigmas.Input("sigmas", optional=True, tooltip="Takes the place of scheduler and steps."),
                io.Int.Input(
                    "rank",
                    default=8,
                    min=1,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "More directions hold more of what the finding changes: how many a site and step have, for "
                        "noise 'same state' only."
                    ),
                ),
                io.Combo.Input(
                    "estimator",
                    options=extraction.ESTIMATOR_NAMES,
                    default=extraction.MEAN_DIFFERENCE,
                    optional=True,
                    tooltip=(
                        "How the samples become a vector, except with noise 'same state'. mean difference: the "
                        "paper's. paired difference and principal component: from pairs (noise 'paired'). lda: what "
                        "tells the classes apart best. leace: what the operator affine needs to erase the finding."
                    ),
                ),
                io.Boolean.Input(
                    "keep_samples",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Lets a stopped extraction go on, and more samples add to those there: what was seen of them "
                        "is kept on disk (activations, neither images nor texts)."
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
