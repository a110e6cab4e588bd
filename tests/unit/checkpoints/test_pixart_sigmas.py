"""The paper's noise schedule, against diffusers' own scheduler."""

import math

import pytest
import torch

from medsteer_core.checkpoints.pixart_sigmas import pixart_sigmas, pixart_timesteps
from medsteer_core.errors import MedSteerError

STEPS = [1, 2, 7, 14, 20, 25, 50, 100, 500, 999]


def scheduler(steps):
    """diffusers' scheduler with the values that PixArt-XL-2-512x512 ships."""
    diffusers = pytest.importorskip("diffusers")
    made = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear", solver_order=2,
        prediction_type="epsilon", algorithm_type="dpmsolver++", solver_type="midpoint", lower_order_final=True,
        use_karras_sigmas=False, timestep_spacing="linspace", steps_offset=0, final_sigmas_type="zero",
    )  # fmt: skip
    made.set_timesteps(steps)
    return made


@pytest.mark.parametrize("steps", STEPS)
def test_the_timesteps_are_diffusers(steps):
    assert pixart_timesteps(steps) == scheduler(steps).timesteps.tolist()


@pytest.mark.parametrize("steps", STEPS)
def test_the_sigmas_are_diffusers(steps):
    made, ours = scheduler(steps), pixart_sigmas(steps)
    assert ours.shape == (steps + 1,) and ours.dtype == torch.float32
    # diffusers rounds abar to float32, so that 1 - abar has lost digits where abar is nearly 1: below timestep 20.
    torch.testing.assert_close(ours, made.sigmas, rtol=1e-5 if steps <= 50 else 1e-4, atol=0)
    rough = torch.tensor(pixart_timesteps(steps)) >= 20
    torch.testing.assert_close(ours[:-1][rough], made.sigmas[:-1][rough], rtol=1e-5, atol=0)


def test_the_papers_twenty_steps_without_diffusers():
    assert pixart_timesteps(20)[:3] == [999, 949, 899] and pixart_timesteps(20)[-1] == 50
    sigmas = pixart_sigmas(20)
    # abar at 999 is the product of 1 - beta over all betas
    abar = math.prod(1 - (0.0001 + (0.02 - 0.0001) * step / 999) for step in range(1000))
    assert sigmas[0].item() == pytest.approx(math.sqrt((1 - abar) / abar), rel=1e-6)
    assert sigmas[-1] == 0 and bool((sigmas[1:] < sigmas[:-1]).all())


def test_denoise_takes_the_last_steps_of_a_longer_schedule():
    assert torch.equal(pixart_sigmas(10, 0.5), pixart_sigmas(20)[-11:])
    assert torch.equal(pixart_sigmas(20, 1.0), pixart_sigmas(20))


@pytest.mark.parametrize(("steps", "denoise"), [(0, 1.0), (1000, 1.0), (-1, 1.0), (500, 0.4)])
def test_more_steps_than_there_are_timesteps_are_refused(steps, denoise):
    with pytest.raises(MedSteerError, match="1 to 999 were expected"):
        pixart_sigmas(steps, denoise)


@pytest.mark.parametrize("denoise", [0.0, -1.0, 1.5, math.nan])
def test_a_denoise_outside_of_0_to_1_is_refused(denoise):
    with pytest.raises(MedSteerError, match="more than 0 and at most 1"):
        pixart_sigmas(20, denoise)
