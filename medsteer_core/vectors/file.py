"""Pathology vectors as safetensors files: nothing in them can run, and every byte that matters is checked.

Layout. Tensors: `sigmas`, and `<site>/<field>` for each site and each field of SiteDirections, all float32.
Metadata: `format`, `version`, `sites` (JSON list in execution order), `flow` (JSON), `provenance` (JSON object) and
`content_hash` (PathologyVector.content_hash).

Version 2 has readers and offsets too, version 1 has none. A vector without readers is still written as version 1, which
every MedSteer reads; a MedSteer that knows only version 1 refuses version 2 and says that it wants an update.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import MedSteerError
from ..files.inside import shown
from ..files.same_bytes import canonical_json, to_bytes
from ..files.whole_file import write_whole
from .pathology_vector import READER_FIELDS, SITE_FIELDS, PathologyVector, SiteDirections
from .provenance import check_provenance

LONGEST_NAME = 200  # characters of a site
FORMAT = "medsteer.pathology_vector"
FIELDS = {"1": SITE_FIELDS, "2": (*SITE_FIELDS, *READER_FIELDS)}  # by the file's version
SUFFIX = ".safetensors"
_ADVICE = "Choose a file that the node 'Save Pathology Vector' wrote, or extract the vector again."
_SIGNATURES = (
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint or a NumPy .npz, perhaps)"),
    (b"\x80", "a Python pickle, perhaps"),
    (b"GGUF", "a GGUF model"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8", "a JPEG picture"),
)


def save(vector: PathologyVector, path: str | os.PathLike[str]) -> Path:
    """Write `vector` to `path` (ending in .safetensors; folders are made) and return the path.

    Atomic: readers see the old file or the whole new one. Raises MedSteerError when the file can't be written.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise MedSteerError(f"A pathology vector's file name ends in {SUFFIX}; got '{path.name}'.")
    write(path, to_bytes(_tensors(vector), _metadata(vector)))
    return path


def write(path: Path, data: bytes) -> None:
    """Write the bytes of a vector's file, whole or not at all; its folder is made. Raises MedSteerError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    except OSError as error:
        raise MedSteerError(f"The pathology vector can't be written to '{path}': {error}. Check the folder.") from error


def load(path: str | os.PathLike[str]) -> PathologyVector:
    """Read a pathology vector that `save` wrote.

    Raises MedSteerError for a file that is missing, foreign, damaged or from a newer version.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            metadata = _check_header(path, file.metadata() or {}, names)
            # Cloned, since the tensors otherwise lie in the file, which another program may cut short.
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except FileNotFoundError as error:
        raise MedSteerError(f"There is no file '{path}'. Check the name of the vector.") from error
    except (SafetensorError, OSError) as error:
        raise MedSteerError(
            f"'{path}' is {_describe(path)}, not a readable safetensors file ({shown(str(error), 200)}). {_ADVICE}"
        ) from error
    try:
        vector = _assemble(metadata, tensors)
    except MedSteerError as error:
        raise MedSteerError(f"'{path}' is a damaged pathology vector. {error} {_ADVICE}") from error
    if vector.content_hash() != metadata["content_hash"]:
        raise MedSteerError(
            f"'{path}' is a pathology vector whose content was changed or damaged: its hash is "
            f"{vector.content_hash()}, and the file says {shown(metadata['content_hash'])}. {_ADVICE}"
        )
    return vector


def _tensors(vector: PathologyVector) -> dict[str, Tensor]:
    named = {
        f"{site}/{name}": tensor for site, values in vector.sites.items() for name, tensor in values.tensors().items()
    }
    # Cloned: safetensors refuses tensors that share memory, such as two views of one.
    return {name: tensor.detach().clone().contiguous() for name, tensor in {"sigmas": vector.sigmas, **named}.items()}


def _metadata(vector: PathologyVector) -> dict[str, str]:
    return {
        "format": FORMAT,
        "version": "2" if vector.has_readers else "1",
        "sites": json.dumps(vector.site_names),
        "flow": json.dumps(vector.flow),
        "provenance": canonical_json(vector.provenance),
        "content_hash": vector.content_hash(),
    }


def _check_header(path: Path, metadata: dict[str, str], names: list[str]) -> dict[str, Any]:
    """The metadata with its JSON parsed, once format, version and the tensors' names are those expected."""
    if metadata.get("format") != FORMAT:
        some = ", ".join(f"'{shown(name)}'" for name in names[:3])
        raise MedSteerError(
            f"'{path}' is a safetensors file with {len(names)} tensors ({some} ...), but not a pathology vector: its "
            f"format is '{shown(metadata.get('format'))}'; {FORMAT!r} was expected. {_ADVICE}"
        )
    version = metadata.get("version", "")
    if version not in FIELDS:
        newer = version.isdecimal() and int(version[:9]) > len(FIELDS)
        advice = "Update MedSteer to read it." if newer else _ADVICE
        raise MedSteerError(
            f"'{path}' is a pathology vector of format version '{shown(version)}'; this MedSteer reads versions "
            f"{' and '.join(FIELDS)}. {advice}"
        )
    try:
        parsed = {key: json.loads(metadata[key]) for key in ("sites", "flow", "provenance")}
        parsed["content_hash"] = metadata["content_hash"]
        parsed["fields"] = FIELDS[version]
    except (KeyError, ValueError, RecursionError) as error:
        raise MedSteerError(
            f"'{path}' is a pathology vector with a damaged header ({shown(repr(error))}). {_ADVICE}"
        ) from error
    if not _types_fit(parsed):
        raise MedSteerError(f"'{path}' is a pathology vector with a damaged header (wrong types). {_ADVICE}")
    wanted = {"sigmas", *(f"{site}/{name}" for site in parsed["sites"] for name in parsed["fields"])}
    if wanted != set(names):
        missing, extra = sorted(wanted - set(names))[:3], sorted(set(names) - wanted)[:3]
        raise MedSteerError(
            f"'{path}' is a damaged pathology vector: tensors missing {shown(missing, 400)}, extra "
            f"{shown(extra, 400)}. {_ADVICE}"
        )
    return parsed


def _types_fit(parsed: dict[str, Any]) -> bool:
    sites = parsed["sites"]
    return (
        isinstance(sites, list)
        and all(isinstance(site, str) and site.isprintable() and len(site) <= LONGEST_NAME for site in sites)
        and len(set(sites)) == len(sites)
        and isinstance(parsed["flow"], bool)
        and isinstance(parsed["provenance"], dict)
    )


def _assemble(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> PathologyVector:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise MedSteerError(f"Tensor '{name}' is {tensor.dtype}; torch.float32 was expected.")
    sites = {
        site: SiteDirections(**{name: tensors[f"{site}/{name}"] for name in metadata["fields"]})
        for site in metadata["sites"]
    }
    check_provenance(metadata["provenance"])
    return PathologyVector(sites, tensors["sigmas"], metadata["provenance"], metadata["flow"])


def _describe(path: Path) -> str:
    """What a file that is no readable safetensors seems to be, in a few words."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError:
        return "not a file that can be opened"
    if not start:
        return "an empty file"
    for signature, what in _SIGNATURES:
        if start.startswith(signature):
            return what
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start):
        return "a text file"
    return "a cut-off or damaged file" if start[8:9] == b"{" else "a file of an unknown kind"
