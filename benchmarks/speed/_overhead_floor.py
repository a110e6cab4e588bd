"""What an operator costs by itself, against the time in which a machine could move the bytes that it must."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.speed._overhead import AFFINE, RANK, SUPPRESS
from medsteer_core.steering.operators import Operator, make_operator
from medsteer_core.steering.plan import Steering, SteeringPlan
from medsteer_core.steering.prepared import PreparedPlan
from medsteer_core.vectors.pathology_vector import PathologyVector, SiteDirections
from medsteer_core.vectors.schedule import SigmaWindow

OPERATORS: dict[str, tuple[Operator, int]] = {
    "suppress": (SUPPRESS, 1),
    "suppress 1.5, norm kept": (make_operator("suppress", strength=1.5, keep_norm=True), 1),
    "affine (default)": (AFFINE, RANK),
}
BIG = 1 << 28  # bytes; far beyond every cache


def bandwidth(bytes_copied: int, device: torch.device, repeats: int) -> float:
    """Bytes a second that a copy of so many reads and writes, the median of the repeats."""
    source = torch.ones(bytes_copied // 4, device=device)
    target = torch.empty_like(source)
    return 2 * bytes_copied / (1e-6 * microseconds(lambda: target.copy_(source), device, repeats))


def operators(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Each operator at a site of `shape` (rows, tokens, C), as a steered call applies it.

    It must read and write the activation once. The floor is that at the bandwidth of memory; `warm` is it at that of a
    copy of this very size, which stays in a cache where the cache is large enough.
    """
    activation = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    size = activation.numel() * activation.element_size()
    memory, warm = bandwidth(BIG, device, 7), bandwidth(size, device, repeats)
    floor, warm_floor = (1e6 * 2 * size / rate for rate in (memory, warm))
    rows = {}
    for name, (operator, rank) in OPERATORS.items():
        own = _own_time(activation, operator, rank, repeats)
        rows[name] = {
            "microseconds": round(own, 2), "times_floor": round(own / floor, 3),
            "times_warm_floor": round(own / warm_floor, 3),
        }  # fmt: skip
    return {
        "shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "bytes_moved": 2 * size,
        "memory_gb_s": round(memory / 1e9, 2), "warm_gb_s": round(warm / 1e9, 2),
        "floor_microseconds": round(floor, 3), "warm_floor_microseconds": round(warm_floor, 3), "operators": rows,
    }  # fmt: skip


def _own_time(activation: Tensor, operator: Operator, rank: int, repeats: int) -> float:
    width, device = activation.shape[-1], activation.device
    basis = torch.linalg.qr(torch.randn(1, width, rank, generator=torch.Generator().manual_seed(1))).Q.mT.contiguous()
    ones = torch.ones(1, rank)
    site = SiteDirections(
        basis, ones, torch.zeros(1, width), torch.stack([ones, -ones], 1), torch.ones(1, 2), basis, torch.zeros(1, rank)
    )
    vector = PathologyVector({"site": site}, torch.ones(1))
    prepared = PreparedPlan(SteeringPlan((Steering(vector, operator, SigmaWindow(), ("site",)),)))
    prepared.prepare(1.0, activation.dtype, device)
    call, work = prepared.for_call({}), activation.clone()
    with torch.inference_mode():
        # Written just before, as the projection does whose output this is; not timed.
        return microseconds(
            lambda: call.apply("site", work, in_place=True), device, repeats, lambda: work.copy_(activation)
        )


def microseconds(
    act: Callable[[], Any], device: torch.device, repeats: int, before: Callable[[], Any] = lambda: None
) -> float:
    """The median time of `act`, each after `before`, which is not timed."""
    times = []
    for _ in range(repeats + 3):
        before()
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            act()
            last.record()
            last.synchronize()
            times.append(1e3 * first.elapsed_time(last))
        else:
            begun = time.perf_counter()
            act()
            times.append(1e6 * (time.perf_counter() - begun))
    return float(np.median(times[3:]))
