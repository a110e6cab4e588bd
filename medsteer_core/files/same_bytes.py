"""Files and texts that are the same, byte for byte, whenever their content is.

The safetensors library writes the metadata's entries in an order that is random in every process, so the same vector
would be another file each time.
"""

import json
from collections.abc import Mapping
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ..errors import MedSteerError

_ALIGNMENT = 8  # bytes; the format's tensors begin at a multiple of it


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of contiguous ``tensors`` whose metadata stands in the order of its names."""
    data = save(dict(tensors), metadata=dict(metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text + data[end:]


def canonical_json(value: Any) -> str:
    """`value` as JSON that is the same for equal values. Raises MedSteerError for what JSON can't hold."""
    try:
        # Read back once: only then are keys such as 1 and "1" sorted as the strings they become.
        plain = json.loads(json.dumps(value, allow_nan=False))
        return json.dumps(plain, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise MedSteerError(
            f"A vector's provenance must be JSON (text, finite numbers, true/false, null, lists, dicts): {error}"
        ) from error
