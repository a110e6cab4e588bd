"""The two published formats of pathology vectors: both are read, running nothing in them, and PolypSteer's is written.

METHOD: MedSteer's `.pickle` is a dict from step to `{"blocks": [float array (C,), one per block]}`. PolypSteer's `.npz`
holds `format`, `values` float32 (steps, layers, C), `layer_ids`, `positive_prompts`, `negative_prompts` and `seeds`.
Neither holds sigmas, class statistics or what model it was made with.
"""

import hashlib
import io
import math
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import MedSteerError
from ..files.inside import shown
from ..files.restricted_pickle import PickledArray, loads
from . import file as vector_file

PICKLE_FORMAT, NPZ_FORMAT = "medsteer-pickle", "polypsteer-pathology-field-v3"
PICKLE_SUFFIXES, NPZ_SUFFIX = (".pickle", ".pkl"), ".npz"
LARGEST = 256 * 2**20  # bytes, packed or unpacked; 1000 steps of PixArt-alpha in float64 are a little less
_LARGEST_LIST = 2**20  # bytes of prompts, seeds or layer numbers
# Numbers hardly pack: a directions' archive shrinks by a tenth. What shrinks by far more is there to fill the memory.
_MOST_PACKED, _SMALL = 16, 2**20
_MOST_MEMBERS = 64
_LONGEST_HEADER = 10_000
_HEADER = re.compile(
    r"\{'descr': '([<>|=]?[fiuSU]\d{1,9})', 'fortran_order': (False|True), 'shape': \(([\d, ]{0,150})\),? ?\}\s*"
)
_MEMBERS = ("format", "values", "layer_ids", "positive_prompts", "negative_prompts", "seeds")


@dataclass(frozen=True, eq=False)
class ReferenceField:
    """What a published file says. `values` (steps, layers, C) float32 as they stand there; `layers` numbers the blocks.

    `all_layers`: whether the format holds every block of its model. `name` and `sha256` are the file's.
    """

    values: Tensor
    layers: tuple[int, ...]
    format: str
    all_layers: bool
    name: str
    sha256: str
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()


def read(path: str | os.PathLike[str]) -> ReferenceField:
    """Read a `.pickle`, `.pkl` or `.npz` file. Raises MedSteerError that names the file and what was expected."""
    path = Path(path)
    if path.suffix not in (*PICKLE_SUFFIXES, NPZ_SUFFIX):
        raise MedSteerError(f"'{path.name}' ends in '{path.suffix}'; .pickle, .pkl or .npz was expected.")
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= LARGEST else b""
    except OSError as error:
        raise MedSteerError(f"'{path.name}' can't be read: {error}. Check the file.") from error
    if size > LARGEST:
        raise MedSteerError(
            f"'{path.name}' has {size / 2**20:.0f} MiB; a vector's file has at most {LARGEST // 2**20}. Choose a file "
            "that holds a pathology vector."
        )
    return (read_npz if path.suffix == NPZ_SUFFIX else read_pickle)(data, path.name)


def read_pickle(data: bytes, name: str) -> ReferenceField:
    """MedSteer's pickle: no code in it runs, and it can hold no more numbers than it has bytes for."""
    steps = loads(data, name)
    if not isinstance(steps, dict) or not steps or set(steps) != set(range(len(steps))):
        found = f"a dict with the keys {_some(steps)}" if isinstance(steps, dict) else f"a {type(steps).__name__}"
        raise _unlike(name, found, 'a dict from the steps 0, 1, 2 ... to {"blocks": [one array a block]}')
    blocks = [_blocks(steps.get(step), step, name) for step in range(len(steps))]
    first = blocks[0][0]
    width = first.values.shape[0] if _is_row(first) else 0
    declared = len(blocks) * len(blocks[0]) * width * 2  # bytes, in the smallest number type
    if declared > len(data):  # one array may be named many times
        raise _unlike(name, f"{len(blocks)} steps of {len(blocks[0])} blocks, more than its bytes can hold", "one each")
    values = np.empty((len(blocks), len(blocks[0]), width), np.float32)
    for step, arrays in enumerate(blocks):
        if len(arrays) != len(blocks[0]):
            raise _unlike(
                name, f"{len(arrays)} blocks at step {step} and {len(blocks[0])} at step 0", "the same number"
            )
        for block, array in enumerate(arrays):
            if not _is_row(array) or array.values.shape != (width,):
                raise _unlike(name, f"{_what(array)} at step {step}, block {block}", f"a float array ({width or 'C'},)")
            with np.errstate(over="ignore"):  # what float32 can't hold becomes infinite, and is refused as such
                values[step, block] = array.values
    layers = tuple(range(values.shape[1]))
    return ReferenceField(torch.from_numpy(values), layers, PICKLE_FORMAT, True, name, _sha256(data))


def read_npz(data: bytes, name: str) -> ReferenceField:
    """PolypSteer's archive: no pickled objects, and every size is checked before anything is unpacked."""
    try:
        if data.count(b"PK\x01\x02") > _MOST_MEMBERS:  # an entry of the list of contents; counted before it is read
            raise ValueError(f"more than {_MOST_MEMBERS} members")
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            missing = [key for key in _MEMBERS if f"{key}.npy" not in archive.namelist()]
            if missing:
                raise ValueError(f"without {', '.join(missing)}")
            arrays = {key: _member(archive, key, LARGEST if key == "values" else _LARGEST_LIST) for key in _MEMBERS}
        texts = {key: _texts(key, arrays[key]) for key in ("format", "positive_prompts", "negative_prompts")}
        numbers = {key: _whole_numbers(key, arrays[key]) for key in ("layer_ids", "seeds")}
        if texts["format"] != (NPZ_FORMAT,):
            raise ValueError(f"of the format {', '.join(texts['format'])!r:.80}")
        values, layers = arrays["values"], numbers["layer_ids"]
        if values.dtype.newbyteorder("=") != np.float32 or values.ndim != 3 or 0 in values.shape:
            raise ValueError(f"whose values are {values.dtype} {values.shape}")
        if len(layers) != values.shape[1] or len(set(layers)) != len(layers) or min(layers) < 0:
            raise ValueError(f"with {len(layers)} layer_ids ({_some(layers)}) for {values.shape[1]} layers")
    # The archive's and the arrays' ways to be damaged, encrypted or packed unusually.
    except (ValueError, TypeError, OverflowError, OSError, EOFError, RuntimeError, SystemError, zipfile.BadZipFile,
            zlib.error) as error:  # fmt: skip
        expected = f"'{NPZ_FORMAT}' with values float32 (steps, layers, C), {', '.join(_MEMBERS[2:])}"
        raise _unlike(name, f"a NumPy archive {shown(str(error), 300)}", expected) from error
    return ReferenceField(
        torch.from_numpy(values.astype(np.float32)), layers, NPZ_FORMAT, False, name, _sha256(data),
        texts["positive_prompts"], texts["negative_prompts"], numbers["seeds"],
    )  # fmt: skip


def write_npz(field: ReferenceField, path: str | os.PathLike[str]) -> Path:
    """Write PolypSteer's archive to `path` (its folder is made) and return the path; readers never see half of it."""
    path = Path(path)
    stream = io.BytesIO()
    np.savez(
        stream,
        format=np.array(NPZ_FORMAT),
        values=field.values.numpy(),
        layer_ids=np.array(field.layers, np.int64),
        positive_prompts=np.array(field.positive_prompts, np.str_),
        negative_prompts=np.array(field.negative_prompts, np.str_),
        seeds=np.array(field.seeds, np.uint64 if any(seed > 2**63 - 1 for seed in field.seeds) else np.int64),
    )
    vector_file.write(path, stream.getvalue())
    return path


def _blocks(entry: Any, step: int, name: str) -> Sequence[Any]:
    blocks = entry.get("blocks") if isinstance(entry, dict) else None
    if isinstance(blocks, list | tuple) and blocks:
        return blocks  # no copy: one list may be named at every step
    if isinstance(entry, dict):
        found = f"{_what(blocks)} as blocks" if "blocks" in entry else f"the keys {_some(entry)}"
    else:
        found = _what(entry)
    raise _unlike(name, f"{found} at step {step}", '{"blocks": [one float array (C,) a block]}')


def _is_row(array: Any) -> bool:
    values = array.values if isinstance(array, PickledArray) else None  # None: the file gave it no numbers
    return values is not None and values.ndim == 1 and values.size > 0 and values.dtype.kind == "f"


def _what(array: Any) -> str:
    if isinstance(array, PickledArray) and array.values is not None:
        return f"a {array.values.dtype} array {array.values.shape}"
    empty = "an empty" if isinstance(array, list | tuple | dict) and not array else "a"
    return f"{empty} {type(array).__name__}"


def _member(archive: zipfile.ZipFile, key: str, largest: int) -> np.ndarray:
    """One array of the archive, unpacked once its declared sizes are known to agree and to be small enough."""
    info = archive.getinfo(f"{key}.npy")
    if info.file_size > largest:
        raise ValueError(f"whose {key} unpack to {info.file_size} bytes; {largest} at most are read")
    if info.file_size > max(_SMALL, _MOST_PACKED * info.compress_size):
        raise ValueError(
            f"whose {key} unpack from {info.compress_size} bytes to {info.file_size}; {_MOST_PACKED} times as many at "
            "most are read"
        )
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"whose {key} are packed in another way than NumPy packs")
    with archive.open(info) as file:
        data = file.read(info.file_size)  # given a number, it unpacks no more than that
    start, dtype, fortran, shape = _array_header(data, key)
    size = math.prod(shape) * dtype.itemsize
    if size != len(data) - start or (size == 0 and 0 not in shape):
        raise ValueError(f"whose {key} declare the shape {shape} of {dtype} and hold {len(data) - start} bytes")
    if size == 0:
        return np.zeros(shape, dtype)
    return np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if fortran else "C")


def _array_header(data: bytes, key: str) -> tuple[int, np.dtype, bool, tuple[int, ...]]:
    """Where an .npy file's numbers begin, their dtype, whether they are in Fortran order, and their shape."""
    lengths = {b"\x01": 2, b"\x02": 4}  # bytes that say how long the header is, by the format's version
    if data[:6] != b"\x93NUMPY" or data[6:7] not in lengths:
        raise ValueError(f"whose {key} are no array")
    begin = 8 + lengths[data[6:7]]
    start = begin + int.from_bytes(data[8:begin], "little")
    header = data[begin : min(start, begin + _LONGEST_HEADER)].decode("latin-1")
    found = _HEADER.fullmatch(header)
    if found is None:
        objects = re.search(r"'descr': '.?O", header)
        raise ValueError(f"whose {key} are {'Python objects' if objects else 'no plain array'}, which are never read")
    shape = tuple(int(side) for side in found[3].split(",") if side.strip())
    return start, np.dtype(found[1]), found[2] == "True", shape


def _texts(key: str, array: np.ndarray) -> tuple[str, ...]:
    if array.dtype.kind not in "SU" or array.ndim > 1:
        raise ValueError(f"whose {key} are {array.dtype} {array.shape} and not text")
    found = array.reshape(-1).tolist()
    return tuple(text.decode() if isinstance(text, bytes) else text for text in found)


def _whole_numbers(key: str, array: np.ndarray) -> tuple[int, ...]:
    if array.dtype.kind not in "iu" or array.ndim > 1:
        raise ValueError(f"whose {key} are {array.dtype} {array.shape} and not whole numbers")
    return tuple(array.reshape(-1).tolist())


def _unlike(name: str, found: str, expected: str) -> MedSteerError:
    return MedSteerError(
        f"'{name}' is no pathology vector of the reference code: it has {found}; {expected} was expected. Choose a "
        "file that MedSteer's or PolypSteer's published code wrote."
    )


def _some(values: Iterable[Any]) -> str:
    shown = [f"{value!s:.20}" for _, value in zip(range(4), values, strict=False)]
    return (", ".join(shown[:3]) or "none") + (" ..." if len(shown) > 3 else "")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
