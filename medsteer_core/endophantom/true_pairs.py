"""Pairs whose truth is known: one scene drawn as two classes, as 8-bit images, and where the two differ."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .phantom import Anatomy, render

CHANGED = 2 / 255  # of a channel: what differs by more has changed


@dataclass(frozen=True)
class TruePairs:
    """image, truth: (n, 3, H, W) in steps of 1/255, with the same sensor noise; mask (n, H, W): 1 where they differ."""

    image: Tensor
    truth: Tensor
    mask: Tensor


def true_pairs(shows: str, truth_shows: str, n: int, seed: int, size: int | tuple[int, int] = 128) -> TruePairs:
    """``n`` scenes of ``seed`` as the class ``shows`` and as ``truth_shows``; scene i is the same whatever n is.

    ``size``: the side, or (height, width), in pixels. ValueError for classes and sizes that `render` refuses.
    """
    scenes = Anatomy.sample(n, seed)
    image, truth = (render(scenes, name, size).image for name in (shows, truth_shows))
    bare = [render(scenes, name, size, noise_seed=None).image for name in (shows, truth_shows)]
    mask = ((bare[0] - bare[1]).abs().amax(1) > CHANGED).float()
    return TruePairs(_in_levels(image), _in_levels(truth), mask)


def _in_levels(images: Tensor) -> Tensor:
    return (images * 255).round() / 255
