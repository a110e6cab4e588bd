"""Workflows in API form, built node by node around EndoPhantom."""

from __future__ import annotations

from typing import Any

from medsteer_core.steering.recipes import REMOVE_FOCAL, SAMPLER_RECIPES, STEER_RECIPES

SAMPLING = {"steps": 20, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal"}
# An extraction of a few seconds, for nodes that only show its vector.
SMALL = {"samples": 8, "seed": 0, "steps": 8, "noise": "unpaired"}
POLYPS, CECUM = "polyps", "normal cecum"


class Phantom(dict):
    """A workflow with EndoPhantom that grows: each method adds nodes and gives the links of their outputs."""

    def __init__(self):
        super().__init__()
        self.model, self.clip, self.vae, *_ = self.add("MedSteer_LoadEndoPhantom")
        self.empty = self.add("CLIPTextEncode", clip=self.clip, text="")[0]

    def add(self, kind: str, **inputs: Any) -> list[list]:
        """A node of the class ``kind``: the links of its outputs, by their place."""
        number = str(len(self) + 1)
        self[number] = {"class_type": kind, "inputs": inputs}
        return [[number, place] for place in range(6)]

    def prompt(self, name: str) -> list:
        return self.add("CLIPTextEncode", clip=self.clip, text=f"An endoscopic image of {name}")[0]

    def latent(self, batch: int = 1) -> list:
        return self.add("EmptyLatentImage", width=128, height=128, batch_size=batch)[0]

    def vector(self, finding: str = POLYPS, **changes: Any) -> list:
        """Extract Pathology Vector against normal cecum, as the templates have it but for ``changes``."""
        links = {"model": self.model, "present": self.prompt(finding), "absent": self.prompt(CECUM)}
        others = {"negative": self.empty, "latent_image": self.latent(), "samples": 16, "seed": 1000, **SAMPLING}
        settings = {**links, **others, "noise": "same state", **changes}
        return self.add("MedSteer_ExtractPathologyVector", **settings)[0]

    def steered(self, vector: list, **changes: Any) -> list:
        """Steer with the recipe that takes a focal finding away, but for ``changes``."""
        links = {"model": self.model, "vector": vector, "sites": "all"}
        return self.add("MedSteer_Steer", **{**STEER_RECIPES[REMOVE_FOCAL], **links, **changes})[0]

    def pair(self, model: list, seed: int, batch: int = 1, **changes: Any) -> list[list]:
        """Counterfactual Sampler on polyps, as that recipe has it but for ``changes``."""
        links = {"model": model, "positive": self.prompt(POLYPS), "negative": self.empty}
        others = {"latent_image": self.latent(batch), "seed": seed, **SAMPLING, "strengths": "1"}
        settings = {**SAMPLER_RECIPES[REMOVE_FOCAL], **links, **others, **changes}
        return self.add("MedSteer_CounterfactualSampler", **settings)

    def sample(self, name: str, seed: int, batch: int = 1) -> list:
        """Images of a class by KSampler."""
        links = {"model": self.model, "positive": self.prompt(name), "negative": self.empty}
        others = {"latent_image": self.latent(batch), "seed": seed, **SAMPLING, "denoise": 1.0}
        return self.decoded(self.add("KSampler", **links, **others)[0])

    def decoded(self, samples: list, first: int | None = None, count: int = 1) -> list:
        """Images of latents: of all, or of ``count`` from ``first`` on."""
        if first is not None:
            samples = self.add("LatentFromBatch", samples=samples, batch_index=first, length=count)[0]
        return self.add("VAEDecode", samples=samples, vae=self.vae)[0]
