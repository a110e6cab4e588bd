"""The inputs that every node which samples has, in the order in which saved workflows know them."""

from __future__ import annotations

from comfy_api.latest import io

from ..medsteer_core.host.sampling.runs import SAMPLERS, SCHEDULERS


def steps_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input("steps", default=20, min=1, max=10000, tooltip=tooltip)


def cfg_input(default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input("cfg", default=default, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=tooltip)


def scheduler_input(tooltip: str) -> io.Combo.Input:
    return io.Combo.Input("scheduler", options=SCHEDULERS, default="normal", tooltip=tooltip)


def sampling_inputs(seed: str, steps: str, sampler_name: str, scheduler: str) -> list:
    """seed, steps, cfg, sampler_name and scheduler; the arguments are the tooltips in which nodes differ."""
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=io.ControlAfterGenerate.fixed,
            tooltip=seed,
        ),
        steps_input(steps),
        cfg_input(4.0, "Higher follows the prompt more closely (classifier-free guidance scale)."),
        io.Combo.Input("sampler_name", options=SAMPLERS, default="euler", tooltip=sampler_name),
        scheduler_input(scheduler),
    ]
