"""The noise levels at which PixArt-alpha is sampled in the paper: those of diffusers' DPM-Solver++ scheduler.

PixArt-XL-2-512x512 ships DPMSolverMultistepScheduler with 1000 training steps of linear betas from 0.0001 to 0.02 and
timesteps spaced evenly ("linspace"); MedSteer (arXiv 2603.07066) and PolypSteer take 20 of them.
"""

import numpy as np
import torch
from torch import Tensor

from ..errors import MedSteerError

PIXART_SCHEDULE = "PixArt-alpha DPM-Solver++ (diffusers)"
TRAINING_STEPS, FIRST_BETA, LAST_BETA = 1000, 0.0001, 0.02


def pixart_timesteps(steps: int) -> list[int]:
    """The training timesteps of `steps` denoising steps, from 999 down; 0 is left out.

    Raises MedSteerError for less than 1 step and for more than there are.
    """
    if not 1 <= steps < TRAINING_STEPS:
        raise MedSteerError(
            f"PixArt-alpha's schedule was asked for {steps} steps; 1 to {TRAINING_STEPS - 1} were expected (with "
            "denoise below 1 it is steps / denoise that counts)."
        )
    spaced = np.linspace(0, TRAINING_STEPS - 1, steps + 1).round()
    return [int(timestep) for timestep in spaced[:0:-1]]


def pixart_sigmas(steps: int, denoise: float = 1.0) -> Tensor:
    """(steps + 1,) float32: sqrt((1 - abar) / abar) at `pixart_timesteps`, then 0.

    `denoise` below 1 takes the last `steps` of a schedule of `steps / denoise`, as ComfyUI's schedulers do.
    """
    if not 0 < denoise <= 1:  # also false for NaN
        raise MedSteerError(f"denoise is {denoise}; more than 0 and at most 1 was expected.")
    betas = torch.linspace(FIRST_BETA, LAST_BETA, TRAINING_STEPS, dtype=torch.float64)
    abar = torch.cumprod(1 - betas, dim=0)
    sigmas = ((1 - abar) / abar).sqrt()[pixart_timesteps(int(steps / denoise))]
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()[-(steps + 1) :]
