"""One way to make counterfactuals, and what it is given: factual images, vectors, masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from benchmarks.shared.presets import Pair
from medsteer_core.vectors.pathology_vector import PathologyVector


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some factual images: their seeds, noise and latents ``(n, C, H, W)``."""

    seeds: Sequence[int]
    noise: Tensor
    latents: Tensor


@dataclass(frozen=True, eq=False)
class Method:
    """One way to make counterfactuals of a pair. ``run(chunk, value)`` gives latents ``(n, C, H, W)``.

    A method may have several arms, each with other settings, over which it is chosen like over its parameter; ``arm``
    says in words what is this one's own. ``settings`` is everything that decides the result besides the value;
    ``cost(value)`` how many runs of the sampler an image takes; ``vectors`` the extractions needed, as (pair, noise,
    samples). ``run_many(chunk, values)``, where there is one, gives the same for many values, ``(values, n, C, H, W)``,
    and takes less.
    """

    name: str
    parameter: str
    values: tuple[float, ...]
    settings: Mapping[str, Any]
    run: Callable[[Chunk, float], Tensor]
    cost: Callable[[float], float] = lambda value: 1.0
    vectors: tuple[tuple[Pair, str, int], ...] = ()
    arm: str = ""
    run_many: Callable[[Chunk, Sequence[float]], Tensor] | None = None

    def setting(self, value: float) -> str:
        """The arm and the value in words; no two of a method are the same."""
        return f"{value:g}" + (f" {self.arm}" if self.arm else "")


class Vectors(Protocol):
    """Where vectors, and what was made before, come from (`_store.Store`, which keeps them)."""

    def vector(self, pair: Pair, noise: str, samples: int) -> PathologyVector: ...

    def random_vector(self, pair: Pair, noise: str, samples: int, draw: int) -> PathologyVector: ...

    def latents(self, pair: Pair, method: Method, value: float, seeds: Sequence[int]) -> tuple[Tensor, float]: ...
