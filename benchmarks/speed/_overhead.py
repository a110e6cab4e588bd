"""What the overhead benchmark measures: two models, ways to run them, and a sampler that times its model calls.

Vectors are random, since a time does not depend on what a direction says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.shared.lab import CFG, Lab
from benchmarks.speed.fullsize import FULL, HEADS, conditioning, weight
from medsteer_core.checkpoints.pixart_config import ALPHA
from medsteer_core.checkpoints.pixart_state import ORIGINAL, Sizes, layout, to_original
from medsteer_core.extraction.capture import ActivationSums
from medsteer_core.extraction.sample_watch import SampleWatch
from medsteer_core.extraction.token_pairs import SIDES, PairedActivations
from medsteer_core.steering.operators import Operator, make_operator
from medsteer_core.steering.plan import Steering
from medsteer_core.vectors.pathology_vector import PathologyVector, SiteDirections
from medsteer_core.vectors.schedule import SigmaWindow

RANK = 8  # of the vectors that affine uses, as Extract makes them
# The published operator, which the targets are of, and the default of Steer.
SUPPRESS = make_operator("suppress", strength=2.0, keep_norm=True)
AFFINE = make_operator("affine", strength=1.5, focus=1.0)
MOST_SAMPLES = 10**6  # more than are ever watched here


@dataclass(frozen=True)
class Stack:
    """A model with everything that a run of it takes; `schedule` is the host adapter's, of the steps to time."""

    model: Any
    positive: list
    negative: list
    noise: Tensor
    schedule: Any

    @property
    def device(self) -> torch.device:
        return self.model.load_device


def endophantom(steps: int) -> Stack:
    """The embedded model, one image of 128 pixels: as slight a network as anybody steers."""
    from medsteer_core.host.sampling import runs as sampling

    lab = Lab()
    schedule = sampling.schedule(lab.model, steps, "euler", "normal")
    return Stack(lab.model, lab.prompt("polyps"), lab.conditioning(""), lab.noise([1000]), schedule)


def pixart_xl_width(blocks: int, side: int) -> Stack:
    """Blocks of PixArt-XL's width and heads with random weights; a latent of `side`, batch 2 with its guidance."""
    from medsteer_core.host.loading import pixart
    from medsteer_core.host.sampling import runs as sampling

    sizes = Sizes(**{**vars(FULL), "format": ORIGINAL, "depth": blocks, "tokens": 120})
    half = torch.cuda.is_available() and not _on_cpu()
    generator = torch.Generator().manual_seed(0)
    state = {one.name: weight(one.shape, generator) for one in layout(sizes)}
    state = {name: value if half else value.float() for name, value in to_original(state, sizes, "random").items()}
    options = {"dtype": torch.bfloat16 if half else torch.float32}
    model = pixart.build(state, pixart.Recipe(sizes, HEADS, ALPHA), options, False)
    noise = torch.randn(1, 4, side, side, generator=generator)
    schedule = sampling.schedule(model, 2, "euler", "normal")
    one = replace(schedule, sigmas=schedule.sigmas[:2])  # a single, expensive call
    return Stack(model, conditioning(0), conditioning(1), noise, one)


def _on_cpu() -> bool:
    from comfy.cli_args import args

    return args.cpu


def activations(stack: Stack) -> tuple[int, tuple[int, ...], torch.dtype]:
    """How many sites the stack has, and the shape and dtype of what one gives in a model call."""
    from medsteer_core.host.patching.sites import find_sites

    first, *others = find_sites(stack.model.model.diffusion_model).values()
    seen: list[Tensor] = []
    handle = first.register_forward_hook(lambda _module, _args, output: seen.append(output))
    try:
        timed_run(stack, stack.model, nullcontext())
    finally:
        handle.remove()
    return 1 + len(others), tuple(seen[0].shape), seen[0].dtype


def random_vector(stack: Stack, seed: int, rank: int) -> PathologyVector:
    """Orthonormal directions at every site and step; with rank 8 they read along themselves."""
    from medsteer_core.host.patching.sites import find_sites, output_width

    generator = torch.Generator().manual_seed(seed)
    sigmas = stack.schedule.sigmas[stack.schedule.sigmas > 0]
    count = len(sigmas)

    def site(width: int) -> SiteDirections:
        bases = torch.linalg.qr(torch.randn(count, width, rank, generator=generator)).Q.mT.contiguous()
        gaps = torch.ones(count, rank)
        readers = {"readers": bases.clone(), "offsets": torch.zeros(count, rank)} if rank > 1 else {}
        projections = torch.stack([gaps, -gaps], 1) / 2
        return SiteDirections(bases, gaps, torch.zeros(count, width), projections, torch.ones(count, 2), **readers)

    sites = find_sites(stack.model.model.diffusion_model)
    return PathologyVector({name: site(output_width(module)) for name, module in sites.items()}, sigmas)


def steered(stack: Stack, operator: Operator, vectors: int = 1) -> Any:
    """The stack's model under so many vectors, each at every site, step and row."""
    from medsteer_core.host.patching import patch

    model, rank = stack.model, RANK if operator.needs_readers else 1
    for seed in range(vectors):
        vector = random_vector(stack, seed, rank)
        model = patch.steered(model, Steering(vector, operator, SigmaWindow(), vector.site_names))
    return model


@dataclass
class Clock:
    """Milliseconds of each model call: on the wall, or a GPU's own, and of this process's threads."""

    device: torch.device
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @contextmanager
    def call(self) -> Iterator[None]:
        if self.device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            begun = time.process_time()
            yield
            last.record()
            self.cpu.append(1e3 * (time.process_time() - begun))
            last.synchronize()
            self.wall.append(first.elapsed_time(last))
            return
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.wall.append(1e3 * (time.perf_counter() - wall))
        self.cpu.append(1e3 * (time.process_time() - cpu))


@torch.no_grad()
def timed_euler(model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None, clock=None) -> Tensor:
    """Euler's steps in the form of ComfyUI's sampler functions; a call is timed with all that the guider does."""
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        with clock.call():
            denoised = model(x, sigma * x.new_ones(x.shape[0]), **(extra_args or {}))
        x = x + (x - denoised) / sigma * (following - sigma)
    return x


def timed_run(stack: Stack, model: Any, around: AbstractContextManager) -> tuple[float, float]:
    """One run within `around`: the medians over its calls of the wall's and the threads' milliseconds."""
    import comfy.samplers

    from medsteer_core.host.sampling import runs as sampling

    clock = Clock(stack.device)
    sampler = comfy.samplers.KSAMPLER(timed_euler, extra_options={"clock": clock})
    with torch.inference_mode(), around:
        plan = replace(stack.schedule, sampler=sampler)
        sampling.sample(model, stack.positive, stack.negative, stack.noise, plan, CFG, 0)
    return float(np.median(clock.wall)), float(np.median(clock.cpu))


def ways(stack: Stack) -> dict[str, Callable[[], tuple[float, float]]]:
    """Every way to run the stack, by name: each gives the milliseconds of one run's calls."""
    from medsteer_core.host.patching import patch

    watch = SampleWatch(ActivationSums(), MOST_SAMPLES, most_bytes=10**9)
    pairs = PairedActivations()
    capturing = patch.observed(stack.model, watch)
    both = patch.observed(patch.observed(stack.model, pairs.side(SIDES[0])), pairs.side(SIDES[1]), "negative")
    numbers = iter(range(MOST_SAMPLES))
    reference = ReferenceWay(stack)
    models = {
        "unsteered": (stack.model, nullcontext),
        "unsteered_again": (stack.model, nullcontext),
        "steered_1": (steered(stack, SUPPRESS), nullcontext),
        "steered_2": (steered(stack, SUPPRESS, 2), nullcontext),
        "steered_4": (steered(stack, SUPPRESS, 4), nullcontext),
        "affine": (steered(stack, AFFINE), nullcontext),
        "capture": (capturing, lambda: watch.run([next(numbers)])),
        "capture_pairs": (both, lambda: pairs.run([next(numbers)])),
        "reference_steered": (stack.model, reference.hooked),
    }

    def way(model: Any, around: Callable[[], AbstractContextManager]) -> Callable[[], tuple[float, float]]:
        return lambda: timed_run(stack, model, around())

    return {name: way(*how) for name, how in models.items()}


class ReferenceWay:
    """Steering as METHOD describes the published repositories' way of it, written anew for comparison.

    Directions are numpy arrays, and in each block one of them is made a tensor; the whole activation goes to the host
    in each block, though nothing reads it; suppress, strength 2, rescaled to each token's former norm.
    """

    def __init__(self, stack: Stack) -> None:
        from medsteer_core.host.patching.sites import find_sites

        vector = random_vector(stack, 0, 1)
        self._sites: Sequence[tuple[str, Any]] = list(find_sites(stack.model.model.diffusion_model).items())
        self._directions = {name: site.directions[0, 0].numpy() for name, site in vector.sites.items()}
        self.kept: dict[str, np.ndarray] = {}

    def steer(self, name: str, output: Tensor) -> Tensor:
        # `copy`: on a CPU the way to the host would be none at all.
        self.kept[name] = output.detach().float().cpu().numpy().copy()
        direction = torch.tensor(self._directions[name]).to(device=output.device, dtype=output.dtype)
        along = (output * direction).sum(dim=-1, keepdim=True)
        moved = output - 2.0 * along.clamp(min=0) * direction
        return moved * (output.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True).clamp(min=1e-8))

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        try:
            for name, module in self._sites:
                hook = lambda _module, _args, output, name=name: self.steer(name, output)  # noqa: E731
                handles.append(module.register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.kept.clear()
