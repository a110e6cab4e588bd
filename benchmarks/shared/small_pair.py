"""The smallest workflow that makes and saves a pair: EndoPhantom, a vector of two samples, three steps."""

from __future__ import annotations

from typing import Any

from benchmarks.shared.command import node

SIDE, STEPS = 64, 3


def workflow(side: int = SIDE, steps: int = STEPS) -> dict[str, Any]:
    """A small pair workflow of EndoPhantom in API format, with a vector from two samples."""
    sampling = {"steps": steps, "cfg": 4, "sampler_name": "euler", "scheduler": "normal"}
    latents = {"width": side, "height": side, "batch_size": 1}
    made = {"samples": 2, "seed": 1000, **sampling, "noise": "same state", "rank": 1, "keep_samples": False}
    steer = {"operator": "suppress", "operator.strength": 2, "operator.keep_norm": True, "start_percent": 0,
             "end_percent": 1, "sites": "all", "rows": "all"}  # fmt: skip
    paired = {"seed": 1, **sampling, "strengths": "1", "lock": "none", "lock_threshold": 0.2, "lock_dilation": 1}
    saved = {"folder": "medsteer/pairs", "source_class": "polyps", "target_class": "normal cecum", "split": "auto",
             "judge": "none", "boxes": "none", "metadata": "workflow and record", "arm": "counterfactual",
             "finding_in": "auto", "validation_fraction": 0.1, "test_fraction": 0.1}  # fmt: skip
    return {
        "1": node("MedSteer_LoadEndoPhantom", "Load EndoPhantom", {}),
        "2": node("CLIPTextEncode", "Finding present", {"text": "An endoscopic image of polyps", "clip": ["1", 1]}),
        "3": node("CLIPTextEncode", "Finding absent", {"text": "", "clip": ["1", 1]}),
        "4": node("CLIPTextEncode", "Negative prompt", {"text": "", "clip": ["1", 1]}),
        "5": node("EmptyLatentImage", "Image size", latents),
        "6": node("MedSteer_ExtractPathologyVector", "Extract Pathology Vector",
                  {**made, "model": ["1", 0], "present": ["2", 0], "absent": ["3", 0], "negative": ["4", 0],
                   "latent_image": ["5", 0]}),
        "7": node("MedSteer_Steer", "Steer", {**steer, "model": ["1", 0], "vector": ["6", 0]}),
        "8": node("MedSteer_CounterfactualSampler", "Counterfactual Sampler",
                  {**paired, "model": ["7", 0], "positive": ["2", 0], "negative": ["4", 0], "latent_image": ["5", 0]}),
        "10": node("VAEDecode", "Decode factual", {"samples": ["8", 0], "vae": ["1", 2]}),
        "11": node("VAEDecode", "Decode counterfactual", {"samples": ["8", 1], "vae": ["1", 2]}),
        "12": node("MedSteer_SaveCounterfactualPairs", "Save Counterfactual Pairs",
                   {**saved, "factual": ["10", 0], "counterfactual": ["11", 0], "record": ["8", 5]}),
    }  # fmt: skip
