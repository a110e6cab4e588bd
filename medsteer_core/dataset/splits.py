"""Which split a pair belongs to: by the noise that it grew from, so that no split knows another's images.

Pairs of one group share their noise (or the image that they started from), whatever their prompts and strengths are.
Noise that a vector was made from may only be trained on: a score on it would flatter the vector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import MedSteerError
from .records import SPLITS

AUTO = "auto"
CHOICES = (AUTO, *SPLITS)


def split_of(group_id: str, split: str, validation: float, test: float) -> str:
    """The split of a group: the one named, or for `AUTO` the one that a hash of the group falls into.

    ``validation`` and ``test`` are shares of the groups, at least 0 and together at most 1. Raises MedSteerError.
    """
    if unfit := split_problem(split, validation, test):
        raise MedSteerError(unfit)
    if split in SPLITS:
        return split
    place = int.from_bytes(hashlib.sha256(f"split of {group_id}".encode()).digest()[:8], "big") / 2**64
    return "test" if place < test else "validation" if place < test + validation else "train"


def split_problem(split: str, validation: float, test: float) -> str:
    """Why there is no such split, or none with these shares of the groups; "" when there is."""
    if split not in CHOICES:
        return f"split is '{split}'; one of {', '.join(CHOICES)} was expected."
    if split in SPLITS or (validation >= 0 and test >= 0 and validation + test <= 1):
        return ""
    return (
        f"validation_fraction is {validation:g} and test_fraction {test:g}; shares of at least 0 and at most 1 "
        "together were expected."
    )


def check_unseen(made: Mapping[str, Any], split: str) -> None:
    """Raise MedSteerError when a pair is to be evaluated on noise that one of its vectors was made from."""
    if split == "train":
        return
    seed, index, shape = made.get("seed"), made.get("batch_index"), list(made.get("latent_shape") or [])
    for used_seed, indices, used_shape in _noises(made.get("steering", [])):
        if seed == used_seed and index in indices and used_shape in ([], shape):
            raise MedSteerError(
                f"The noise of seed {seed}, image {index} made the vector of this pair, so the pair can't stand in the "
                f"split '{split}'. Sample the pair from another seed (or extract the vector with one), or set split to "
                "train."
            )


def _noises(value: Any) -> Iterator[tuple[int, Any, list[int]]]:
    """Seed, images and latent shape ([]: unknown) of every extraction that a value tells of, parts of vectors too."""
    if isinstance(value, Mapping):
        indices = value.get("noise_indices")
        if isinstance(indices, Mapping) and "seed" in value:
            for numbers in indices.values():
                yield value["seed"], _images(numbers), _shape(value.get("latent_shape"))
        for seed in value.get("seeds") or () if isinstance(value.get("seeds"), list) else ():
            yield seed, range(1), []  # an imported vector's: one image for each seed
        for part in value.values():
            yield from _noises(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _noises(part)


def _images(numbers: Any) -> range:
    """A range from its start, stop and step. Raises MedSteerError: what can't be read can't be kept out."""
    whole = isinstance(numbers, list | tuple) and all(type(number) is int for number in numbers)
    if not whole or len(numbers) not in (2, 3) or numbers[2:] and not numbers[2]:
        raise MedSteerError(
            f"The vector's record says of its noise_indices {str(numbers)[:80]}; the first image's number, the one "
            "past the last and the step were expected. Extract the vector anew, or set split to train."
        )
    return range(*numbers)


def _shape(shape: Any) -> list[int]:
    """A latent shape that a vector's record tells, [] for none: then the noise may be of any shape."""
    return list(shape) if isinstance(shape, list | tuple) else []


def group_file(key: str) -> str:
    """The file in the dataset's folder that says in which split a group stands."""
    return f"groups/{key[:2]}/{key}.txt"
