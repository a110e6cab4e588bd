"""What a judge is: something that looks at images, and the terms it speaks in.

EndoPhantom's own judges answer everything. A judge for real images (`judge_files`) may have no segmenter, and knows no
distance and no anatomy; what it cannot say is None, and a score names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..errors import MedSteerError


@dataclass(frozen=True)
class Terms:
    """The words of a judge, and the limits that its answers are read with.

    ``labels``: the columns of the probabilities; ``classes``: those that can be a pair's source or target, all but
    "none of these". ``findings``: the columns of the masks, none without a segmenter. ``findings_of``: which findings
    a class shows; None for a class that shows something the segmenter does not mark. ``diffuse``: findings that change
    the picture outside their masks too. ``left_limit``: a finding is gone below this share of the picture;
    ``found_limit``: it is there from this share on. ``mask_margin``: how uncertain the masks' edges are, as a share of
    the picture's shorter side.
    """

    labels: tuple[str, ...]
    classes: tuple[str, ...]
    findings: tuple[str, ...] = ()
    findings_of: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    diffuse: tuple[str, ...] = ()
    left_limit: float = 0.003
    found_limit: float = 0.01
    mask_margin: float = 0.0

    def class_named(self, name: str, role: str) -> str:
        """The class of this name; spaces, hyphens, underscores and case do not count. MedSteerError for another."""
        if name in self.classes:
            return name
        alike = [own for own in self.classes if plain(own) == plain(name)]
        if len(alike) != 1:
            raise MedSteerError(f"the {role} class is '{name}'; one of these was expected: {', '.join(self.classes)}.")
        return alike[0]

    def named_in(self, prompt: str) -> str:
        """The class that a prompt names: the longest name in it. MedSteerError when it names none."""
        named = [name for name in self.classes if plain(name) in plain(prompt)]
        if not named:
            expected = ", ".join(self.classes)
            raise MedSteerError(f"The prompt '{prompt}' names no class; one of these was expected: {expected}.")
        return max(named, key=len)

    def unknown_findings(self, classes: Sequence[str]) -> list[str]:
        """Those of ``classes`` whose findings are not known."""
        return [name for name in classes if self.findings_of.get(name) is None]

    def only_in(self, first: str, second: str) -> list[str]:
        """The findings that class ``first`` has and ``second`` lacks; those of both must be known."""
        return [name for name in self.findings_of[first] if name not in self.findings_of[second]]

    def structure_measure(self, source: str, target: str) -> str:
        """The number that says how well structure was kept: ``anatomy_drift`` where a diffuse finding comes or goes,
        ``ssim_outside`` elsewhere."""
        changing = set(self.findings_of[source]) ^ set(self.findings_of[target])
        return "anatomy_drift" if changing & set(self.diffuse) else "ssim_outside"


class Opinion(Protocol):
    """What a judge says of ``n`` images; a part that it cannot judge is None.

    ``probabilities (n, labels)``; ``masks (n, findings, H, W)``, each pixel 0 or 1; ``distances (n,)`` from what it was
    trained on, 1 at the limit; ``anatomy (n, factors)`` in units of the factors' errors.
    """

    @property
    def probabilities(self) -> Tensor: ...
    @property
    def masks(self) -> Tensor | None: ...
    @property
    def distances(self) -> Tensor | None: ...
    @property
    def anatomy(self) -> Tensor | None: ...


class Judge(Protocol):
    """Looks at images ``(n, 3, H, W)`` in 0..1. ``identity`` tells it from any other, by a hash of its files.

    It may have a ``doubt``: what whoever reads its word has to know (see `doubt_about`).
    """

    @property
    def terms(self) -> Terms: ...
    @property
    def identity(self) -> str: ...
    def __call__(self, images: Tensor) -> Opinion: ...


def doubt_about(judge: Judge | None) -> str:
    """A warning about a judge's worth; "" where there is none."""
    return getattr(judge, "doubt", "")


@dataclass(frozen=True)
class Answers:
    """An `Opinion` as a value."""

    probabilities: Tensor
    masks: Tensor | None = None
    distances: Tensor | None = None
    anatomy: Tensor | None = None


def plain(name: str) -> str:
    """A name in lower case with single spaces for spaces, hyphens and underscores."""
    return re.sub(r"[\s_-]+", " ", name).strip().lower()
