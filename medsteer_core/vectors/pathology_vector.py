"""The pathology vector: for each cross-attention site and noise level, the direction that tells present from absent."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import MedSteerError
from ..files.same_bytes import canonical_json
from .schedule import interpolate_index

UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class SiteDirections:
    """What one site learnt: S steps, R directions a step, C channels; all float32 on the CPU.

    directions: (S, R, C) unit rows, orthonormal within a step, pointing from absent to present
    gaps: (S, R) how far apart the class means are along each direction, >= 0
    centres: (S, C) the midpoint of the two class means
    projections: (S, 2, R) mean projection of [present, absent] on each direction
    spreads: (S, 2) root of the total within-class variance of the samples' token means, [present, absent]
    readers, offsets: (S, R, C) and (S, R), or both None: `readers_i.a + offsets_i` is how far along direction i the
        present prompt has moved the activation `a` from where the absent one would have it (see affine.py)
    """

    directions: Tensor
    gaps: Tensor
    centres: Tensor
    projections: Tensor
    spreads: Tensor
    readers: Tensor | None = None
    offsets: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The fields that it has, by name; readers and offsets come last."""
        named = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @cached_property
    def recorded(self) -> tuple["StepDirection", ...]:
        """Its steps, as views: they are looked up in every model call, and slicing tensors takes longer than that."""
        columns = [self.directions, self.gaps, self.projections]
        if self.readers is not None:
            columns += [self.readers, self.offsets]
        return tuple(StepDirection(*step) for step in zip(*(column.unbind() for column in columns), strict=True))


READER_FIELDS = ("readers", "offsets")
SITE_FIELDS = tuple(entry.name for entry in fields(SiteDirections) if entry.name not in READER_FIELDS)


@dataclass(frozen=True, eq=False)
class StepDirection:
    """One site at one sigma: directions (R, C), gaps (R,), projections (2, R) of [present, absent].

    readers (R, C) and offsets (R,) where the vector has them; target (R, C): a second vector's directions, for the
    operators that go from one finding to another. No vector holds it: whoever pairs two vectors sets it.
    """

    directions: Tensor
    gaps: Tensor
    projections: Tensor
    readers: Tensor | None = None
    offsets: Tensor | None = None
    target: Tensor | None = None

    def cast(self, device: torch.device, dtype: torch.dtype) -> "StepDirection":
        """The same on another device and dtype. (Not `to`: ComfyUI calls that on whatever has it.)"""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        moved = {name: v if v is None else v.to(device=device, dtype=dtype) for name, v in values.items()}
        return StepDirection(**moved)


@dataclass(frozen=True, eq=False)
class PathologyVector:
    """The directions of all sites, and how they came about. A value: change nothing inside.

    sites: name -> SiteDirections in execution order; widths may differ between sites, steps and rank don't
    sigmas: (S,) float32, strictly descending, > 0: the noise levels recorded
    provenance: JSON-able facts: prompts, seeds, sampler, steps, cfg, noise mode, model fingerprint, versions ...
    flow: whether the model is a flow model (sigma is then interpolated linearly, otherwise in its logarithm)

    Raises MedSteerError that names the site, the shape that came and the shape that was wanted.
    """

    sites: Mapping[str, SiteDirections]
    sigmas: Tensor
    provenance: Mapping[str, Any] = field(default_factory=dict)
    flow: bool = False

    def __post_init__(self) -> None:
        # Own copies: the caller's dicts may change later, and JSON would turn tuples into lists only after a reload.
        object.__setattr__(self, "sites", dict(self.sites))
        object.__setattr__(self, "provenance", json.loads(canonical_json(dict(self.provenance))))
        object.__setattr__(self, "flow", bool(self.flow))
        _check_sigmas(self.sigmas)
        if not self.sites:
            raise MedSteerError("A pathology vector needs at least one cross-attention site, and this one has none.")
        for name, site in self.sites.items():
            _check_site(name, site, self.steps, self.rank, self.has_readers)

    @cached_property
    def _levels(self) -> tuple[float, ...]:
        """The sigmas as numbers, for looking one up at every site of every step."""
        return tuple(self.sigmas.tolist())

    @property
    def steps(self) -> int:
        """Number of recorded noise levels, S."""
        return self.sigmas.shape[0]

    @property
    def rank(self) -> int:
        """Number of directions at each site and step, R."""
        return next(iter(self.sites.values())).gaps.shape[-1]

    @property
    def unknown(self) -> frozenset[str]:
        """The fields of its sites that hold nothing known, only zeros: an imported or combined vector lacks some."""
        return frozenset(self.provenance.get("unknown", ()))

    @property
    def has_readers(self) -> bool:
        """Whether the operator affine can use it: all sites have readers and offsets, or none has."""
        return next(iter(self.sites.values())).readers is not None

    @property
    def site_names(self) -> tuple[str, ...]:
        """The sites' names in execution order."""
        return tuple(self.sites)

    def channels(self, site: str) -> int:
        """Width of a site's activations, C."""
        return self._site(site).directions.shape[-1]

    def at(self, site: str, sigma: float) -> StepDirection:
        """The directions at any sigma: interpolated between the recorded steps and renormalised.

        A recorded sigma gives the recorded values bit by bit; beyond the ends the end stands. A vector with readers
        gives the nearest recorded step (on the same scale): a blend of two bases is no basis, and what a reader reads
        belongs to its own directions.
        """
        return self._at(self._site(site), *self._place(sigma))

    def at_sites(self, sites: Iterable[str], sigma: float) -> dict[str, StepDirection]:
        """`at` for several sites, by name."""
        place = self._place(sigma)
        return {site: self._at(self._site(site), *place) for site in sites}

    def _place(self, sigma: float) -> tuple[int, int, float]:
        return interpolate_index(self._levels, sigma, self.flow)

    def _at(self, values: SiteDirections, lo: int, hi: int, weight: float) -> StepDirection:
        if weight == 0 or values.readers is not None:
            return values.recorded[lo if weight <= 0.5 else hi]
        return StepDirection(
            _mix_directions(values.directions[lo], values.directions[hi], weight),
            torch.lerp(values.gaps[lo], values.gaps[hi], weight),
            torch.lerp(values.projections[lo], values.projections[hi], weight),
        )

    def content_hash(self) -> str:
        """64 hex digits of SHA-256 over every value and the provenance; the same however the vector is stored."""
        digest = hashlib.sha256()
        header = {"sites": list(self.sites), "flow": self.flow, "provenance": self.provenance}
        _update(digest, canonical_json(header).encode())
        for tensor in (self.sigmas, *(tensor for site in self.sites.values() for tensor in site.tensors().values())):
            _update(digest, repr(tuple(tensor.shape)).encode())
            _update(digest, tensor.detach().numpy().astype("<f4").tobytes())
        return digest.hexdigest()

    def short_hash(self) -> str:
        """The first ten digits of the content hash, for file names and summaries."""
        return self.content_hash()[:10]

    def _site(self, name: str) -> SiteDirections:
        if name not in self.sites:
            raise MedSteerError(
                f"The pathology vector has no site '{name}'; it has {len(self.sites)}, from '{self.site_names[0]}' to "
                f"'{self.site_names[-1]}'. Use a vector that was extracted from this model."
            )
        return self.sites[name]


def _update(digest: Any, data: bytes) -> None:
    """Hash `data` behind its length, so that no two sequences of parts run together to the same bytes."""
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)


def _mix_directions(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """The orthonormal rows nearest to the weighted mean of two sets of orthonormal rows (R, C).

    For one row that is the mean, renormalised; for more, the mean's polar factor, which favours no row. Rows that
    cancel (opposite directions, half way) have no such mean: the nearer step's are taken.
    """
    mixed = torch.lerp(a, b, weight)
    if mixed.shape[0] == 1:
        length = torch.linalg.vector_norm(mixed)
        return mixed / length if length > UNIT_TOLERANCE else (a if weight < 0.5 else b)
    u, lengths, v = torch.linalg.svd(mixed, full_matrices=False)
    return u @ v if lengths[-1] > UNIT_TOLERANCE else (a if weight < 0.5 else b)


def _check_sigmas(sigmas: Tensor) -> None:
    if sigmas.ndim != 1 or sigmas.shape[0] == 0:
        raise MedSteerError(f"sigmas has shape {tuple(sigmas.shape)}; (steps,) with at least one step was expected.")
    _check_tensor("sigmas", sigmas, None)
    if not bool((sigmas > 0).all()) or not bool((sigmas[1:] < sigmas[:-1]).all()):
        raise MedSteerError(f"sigmas must be positive and strictly descending; got {sigmas.tolist()}.")


def _check_site(name: str, site: SiteDirections, steps: int, rank: int, readers: bool) -> None:
    channels = site.directions.shape[-1] if site.directions.ndim else 0
    shapes = {
        "directions": (steps, rank, channels),
        "gaps": (steps, rank),
        "centres": (steps, channels),
        "projections": (steps, 2, rank),
        "spreads": (steps, 2),
    }
    if [site.readers is not None, site.offsets is not None] != [readers, readers]:
        raise MedSteerError(
            f"Site '{name}': readers and offsets go together, at every site or at none; here readers are "
            f"{'missing' if site.readers is None else 'given'} and offsets "
            f"{'missing' if site.offsets is None else 'given'}."
        )
    if rank > channels:  # before the products below, whose size is the rank's square
        raise MedSteerError(
            f"Site '{name}': {rank} directions of {channels} channels can't be orthogonal; at most {channels} were "
            "expected."
        )
    if readers:
        shapes |= {"readers": (steps, rank, channels), "offsets": (steps, rank)}
    for entry, wanted in shapes.items():
        _check_tensor(f"Site '{name}': {entry}", getattr(site, entry), wanted)
    products = site.directions @ site.directions.transpose(-1, -2)
    worst = (products - torch.eye(rank)).abs().amax().item()
    if worst > UNIT_TOLERANCE:
        raise MedSteerError(
            f"Site '{name}': directions must have unit length and be orthogonal within a step; they are off by "
            f"{worst:.3g}, and {UNIT_TOLERANCE} is allowed. Normalise them."
        )
    for entry in ("gaps", "spreads"):
        if bool((getattr(site, entry) < 0).any()):
            raise MedSteerError(f"Site '{name}': {entry} has negative values; {entry} are lengths, 0 or more.")


def _check_tensor(label: str, tensor: Tensor, wanted: tuple[int, ...] | None) -> None:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise MedSteerError(f"{label} is {tensor.dtype} on {tensor.device}; torch.float32 on cpu was expected.")
    if wanted is not None and (tuple(tensor.shape) != wanted or 0 in wanted):
        raise MedSteerError(f"{label} has shape {tuple(tensor.shape)}; {wanted}, and nothing empty, was expected.")
    if not bool(torch.isfinite(tensor).all()):
        raise MedSteerError(f"{label} has values that are not finite (NaN or infinity). Extract the vector again.")
