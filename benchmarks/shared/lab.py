"""EndoPhantom in this process's ComfyUI, for benchmarks that make thousands of images: no server, no files in between.

Sampling, steering and extraction are the host adapter's, as the nodes call it. Image i has a seed of its own, so that
an image does not depend on how many are made together.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.shared.command import as_saved
from medsteer_core.run.server import comfyui_from_environment

SIDE = 128
STEPS, SAMPLER, SCHEDULER, CFG = 20, "euler", "normal", 4.0
BATCH = 20


def start_comfyui(cpu: bool = False) -> Path:
    """Make ComfyUI's modules importable here; before anything of ``medsteer_core.host``. Returns its folder."""
    folder = comfyui_from_environment()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # before this checkout: `nodes` means ComfyUI's
    from comfy.cli_args import args  # reads no command line unless ComfyUI's main.py asks for it

    args.cpu = args.cpu or cpu or not torch.cuda.is_available()
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False
    return folder


def comfyui_version() -> str:
    """ComfyUI's version; after `start_comfyui`."""
    import comfyui_version

    return comfyui_version.__version__


class Lab:
    """The embedded model, ready to make images. Make one after `start_comfyui`."""

    def __init__(self) -> None:
        from medsteer_core.host.loading import embedded
        from medsteer_core.host.sampling import runs as sampling

        self.model, self.clip, self.vae = embedded.load_endophantom()
        self.schedule = sampling.schedule(self.model, STEPS, SAMPLER, SCHEDULER)
        self.latent = {"samples": torch.zeros(1, 4, SIDE // 8, SIDE // 8), "downscale_ratio_spacial": 8}
        self._known: dict[str, list] = {}

    def conditioning(self, text: str) -> list:
        """A prompt as CONDITIONING; one object for one text."""
        if text not in self._known:
            self._known[text] = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))
        return self._known[text]

    def prompt(self, name: str) -> list:
        """The conditioning of a class, by the paper's template."""
        return self.conditioning(f"An endoscopic image of {name}")

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """The noise that ComfyUI gives a single image of each seed: ``(len(seeds), C, H, W)``."""
        from medsteer_core.host.sampling import runs as sampling

        like = sampling.empty_latent(self.model, self.latent)
        return torch.cat([sampling.noise_for(like, seed, [0]) for seed in seeds])

    def sample(self, model: Any, positive: list, noise: Tensor, cfg: float = CFG, seed: int = 0) -> Tensor:
        """Latents from ``noise`` on an empty latent, `BATCH` images at a time."""
        from medsteer_core.host.sampling import runs as sampling

        empty = self.conditioning("")
        parts = [sampling.sample(model, positive, empty, part, self.schedule, cfg, seed) for part in noise.split(BATCH)]
        return torch.cat(parts)

    def resample(self, positive: list, latents: Tensor, noise: Tensor, sigmas: Tensor, cfg: float = CFG) -> Tensor:
        """Latents after the steps of ``sigmas`` from ``latents`` and ``noise``, `BATCH` images at a time, unsteered.

        Zero noise goes on from latents as they are; rising sigmas invert them into noise.
        """
        from medsteer_core.host.sampling import runs as sampling

        plan, empty = self.steps(sigmas), self.conditioning("")
        parts = zip(latents.split(BATCH), noise.split(BATCH), strict=True)
        return torch.cat([sampling.resample(self.model, positive, empty, *part, plan, cfg, 0) for part in parts])

    def steps(self, sigmas: Tensor) -> Any:
        """The lab's sampler over other noise levels."""
        return replace(self.schedule, sigmas=sigmas)

    def denoise_sigmas(self, denoise: float) -> Tensor:
        """The noise levels that KSampler takes at this ``denoise``: its last `STEPS` steps of a longer schedule."""
        from medsteer_core.host.sampling import runs as sampling

        return sampling.schedule(self.model, int(STEPS / denoise), SAMPLER, SCHEDULER).sigmas[-(STEPS + 1) :]

    def images(self, latents: Tensor) -> Tensor:
        """Decoded images ``(n, 3, H, W)``, rounded to 8 bits as a saved PNG is."""
        decoded = torch.cat([self.vae.decode(part) for part in latents.split(BATCH)])
        return as_saved(decoded[..., :3].movedim(-1, 1))

    def extract(self, present: str, absent: str, samples: int = 16, seed: int = 1000, noise: str = "paired") -> Any:
        """A pathology vector between two classes."""
        from medsteer_core.host.sampling import extraction

        request = extraction.Request(
            self.prompt(present), self.prompt(absent), self.conditioning(""), self.latent, samples, seed, CFG, noise,
            self.schedule, {"present": present, "absent": absent, "negative": ""},
        )  # fmt: skip
        return extraction.extract(self.model, request)
