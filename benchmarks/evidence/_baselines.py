"""What steering is compared with: four ways to make a counterfactual by changing the prompt.

Every function takes the lab, the source and target class, and a chunk of factual images: their ``noise`` and
``latents``, both ``(n, C, H, W)``, and gives counterfactual latents. The settings are the factual's (`_lab`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shared.lab import CFG, STEPS, Lab

# SDEdit adds fresh noise, of another seed than any image's.
FRESH_NOISE = 1_000_000
# Recorded activations of one image take tens of megabytes: few at a time.
INJECTED_BATCH = 5

Tape = dict[tuple[str, float, int], Tensor]


def reprompt(lab: Lab, source: str, target: str, noise: Tensor, share: float) -> Tensor:
    """The same noise with the target prompt, which takes over after ``share`` of the schedule."""
    before, after = lab.prompt(source), lab.prompt(target)
    if share == 0:
        return lab.sample(lab.model, after, noise)
    return lab.sample(lab.model, [*_during(before, 0.0, share), *_during(after, share, 1.0)], noise)


def _during(conditioning: list, start: float, end: float) -> list:
    """A CONDITIONING that holds between two shares of the schedule, as ConditioningSetTimestepRange makes it."""
    return [[tensor, {**options, "start_percent": start, "end_percent": end}] for tensor, options in conditioning]


def sdedit(lab: Lab, target: str, latents: Tensor, seeds: Sequence[int], denoise: float) -> Tensor:
    """SDEdit (Meng et al. 2022): fresh noise on the factual latents, then the target prompt; KSampler's ``denoise``."""
    fresh = lab.noise([FRESH_NOISE + seed for seed in seeds])
    return lab.resample(lab.prompt(target), latents, fresh, lab.denoise_sigmas(denoise))


def ddim_inversion(lab: Lab, source: str, target: str, latents: Tensor, depth: float) -> Tensor:
    """DDIM inversion (Song et al. 2021): the factual run backwards at cfg 1, then forwards with the target prompt.

    ``depth`` is the share of the steps that are inverted. Backwards starts at sigma 1e-4, as core's Flip Sigmas does.
    """
    steps = round(depth * STEPS)
    down = lab.schedule.sigmas[-(steps + 1) :]
    up = down.flip(0).clone()
    up[0] = up[0].clamp_min(1e-4)
    none = torch.zeros_like(latents)
    inverted = lab.resample(lab.prompt(source), latents, none, up, cfg=1.0)
    return lab.resample(lab.prompt(target), inverted, none, down, cfg=CFG)


def pnp(lab: Lab, source: str, target: str, noise: Tensor, share: float) -> Tensor:
    """Plug-and-Play (Tumanyan et al. 2023) for a diffusion transformer.

    From the same noise with the target prompt; during the first ``share`` of the steps the outputs of every
    self-attention and of the middle block are those of the source run, for the rows of both conditionings.
    """
    steps = round(share * STEPS)
    network, parts = lab.model.model.diffusion_model, []
    for part in noise.split(INJECTED_BATCH):
        with recording(network) as tape:
            # the source run up to where injection ends; the rest of it is not needed
            lab.resample(lab.prompt(source), torch.zeros_like(part), part, lab.schedule.sigmas[: steps + 1])
        with injecting(network, tape):
            parts.append(lab.sample(lab.model, lab.prompt(target), part))
    return torch.cat(parts)


@contextmanager
def recording(network: nn.Module) -> Iterator[Tape]:
    """Keep what the injected modules give: by module, noise level and index of the conditioning."""
    tape: Tape = {}

    def record(key: tuple[str, float, int], rows: Tensor) -> Tensor:
        tape[key] = rows.clone()
        return rows

    with _visiting(network, record):
        yield tape


@contextmanager
def injecting(network: nn.Module, tape: Tape) -> Iterator[None]:
    """Put what was recorded in place of what the modules give; elsewhere nothing changes."""
    with _visiting(network, lambda key, rows: tape.get(key, rows)):
        yield


def injected_modules(network: nn.Module) -> dict[str, nn.Module]:
    """Every self-attention of a PixArt, and its middle block."""
    middle = len(network.blocks) // 2
    attentions = {f"blocks.{index}.attn": block.attn for index, block in enumerate(network.blocks)}
    return {**attentions, f"blocks.{middle}": network.blocks[middle]}


@contextmanager
def _visiting(network: nn.Module, visit: Callable[[tuple[str, float, int], Tensor], Tensor]) -> Iterator[None]:
    """Hooks that show each conditioning's rows of every injected module to ``visit``; removed whatever happens."""
    call: dict[str, Any] = {}

    def begin(_module: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        options = kwargs["transformer_options"]
        call.update(sigma=float(options["sigmas"].max()), conds=options["cond_or_uncond"])

    def changed(name: str, output: Tensor) -> Tensor:
        chunks = output.chunk(len(call["conds"]))
        keys = [(name, call["sigma"], index) for index in call["conds"]]
        return torch.cat([visit(key, rows) for key, rows in zip(keys, chunks, strict=True)])

    handles = [network.register_forward_pre_hook(begin, with_kwargs=True)]
    try:
        for name, module in injected_modules(network).items():
            handles.append(module.register_forward_hook(lambda _m, _args, out, name=name: changed(name, out)))
        yield
    finally:
        for handle in handles:
            handle.remove()
