"""Hostile changes to files that keep their format, so that they get past a reader's first check.

Every function takes the bytes of a file and a random source and gives other bytes; what is no file of the format is
given back changed in a few bytes.
"""

from __future__ import annotations

import io
import json
import pickletools
import random
import re
import struct
import warnings
import zipfile
from typing import Any

LIMIT = 2**20  # bytes of a file
_TEXTS = ("", "a", "a" * 5000, "\0", "\n\r\x1b[31m", "\u202eexe.gpj", "e\u0301", "\ud800", "..", "../../x",
          "C:\\x", "CON", "<img src=x onerror=alert(1)>", "$\\frac{", "%s%n", "(.*a)*b", "polyps", "combined",
          "imported")  # fmt: skip
_NUMBERS = (0, -1, 1, 2, 3.5, 2**31, 2**63, 2**64, 10**400, -(10**400), 1e308, -1e308, 5e-324, float("nan"),
            float("inf"), float("-inf"), True, False, None)  # fmt: skip
_SHAPES = (0, 1, 2, 3, 7, 8, 64, 1000, 2**20, 2**31, 2**40, 2**63)
_DTYPES = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I64", "U8", "BOOL", "C64", "X")
_GLOBALS = ("os system", "builtins eval", "builtins exec", "posix system", "subprocess Popen", "numpy ndarray",
            "numpy dtype", "numpy.core.multiarray _reconstruct", "numpy._core.multiarray scalar", "_codecs encode",
            "numpy._core.numeric _frombuffer", "torch._utils _rebuild_tensor_v2", "builtins bytes")  # fmt: skip


def any_bytes(data: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, removed, doubled or inserted."""
    changed = bytearray(data[:LIMIT])
    for _ in range(chance.randint(1, 4)):
        at = chance.randint(0, len(changed))
        kind = chance.randrange(5)
        if kind == 0:
            changed[at : at + chance.randint(1, 8)] = chance.randbytes(chance.randint(0, 8))
        elif kind == 1:
            del changed[at : at + chance.randint(1, 64)]
        elif kind == 2:
            changed[at:at] = changed[at : at + chance.randint(1, 64)]
        elif kind == 3 and changed:
            changed[min(at, len(changed) - 1)] ^= 1 << chance.randrange(8)
        else:
            changed[at:at] = chance.choice((b"\xff" * 8, b"\0" * 8, b"\x7f\xff\xff\xff", chance.randbytes(4)))
    return bytes(changed[:LIMIT])


# JSON


def json_file(data: bytes, chance: random.Random) -> bytes:
    """One value, name or nesting of a JSON text changed; sometimes the text itself."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return any_bytes(data, chance)
    if chance.random() < 0.01:
        return json_bomb(chance)
    for _ in range(chance.randint(1, 3)):
        value = changed_json(value, chance)
    text = _dumped(value)
    if chance.random() < 0.1:  # a name twice
        text = re.sub(rb'("[^"]+":)', lambda match: match[1] + b"0," + match[1], text, count=1)
    return text[:LIMIT]


def changed_json(value: Any, chance: random.Random, depth: int = 0) -> Any:
    """A JSON value with one part of it changed."""
    if isinstance(value, dict) and value and chance.random() < 0.85 and depth < 50:
        key = chance.choice(list(value))
        made = dict(value)
        kind = chance.random()
        if kind < 0.1:
            del made[key]
        elif kind < 0.2:
            made[chance.choice([*_TEXTS, *value])] = made.pop(key)
        elif kind < 0.3:
            made[chance.choice(_TEXTS)] = _any_value(chance)
        else:
            made[key] = changed_json(made[key], chance, depth + 1)
        return made
    if isinstance(value, list) and value and chance.random() < 0.85 and depth < 50:
        made, at = list(value), chance.randrange(len(value))
        kind = chance.random()
        if kind < 0.15:
            del made[at]
        elif kind < 0.3:
            made[at:at] = [made[at]] * chance.choice((1, 2, 100))
        else:
            made[at] = changed_json(made[at], chance, depth + 1)
        return made
    return _any_value(chance)


def _any_value(chance: random.Random) -> Any:
    kind = chance.random()
    if kind < 0.4:
        return chance.choice(_NUMBERS)
    if kind < 0.75:
        return chance.choice(_TEXTS)
    if kind < 0.85:
        value: Any = chance.choice(_NUMBERS)
        for _ in range(chance.choice((1, 3, 120))):
            value = chance.choice(([value], {"a": value}, {"combined": {"parts": [{"provenance": value}]}}))
        return value
    return [chance.choice(_NUMBERS) for _ in range(chance.choice((0, 1, 2, 3, 2000)))]


def _dumped(value: Any) -> bytes:
    try:
        return json.dumps(value).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return b"[" * 2000


def json_bomb(chance: random.Random) -> bytes:
    """Short texts that are long to read: depth, many names, long numbers."""
    many = chance.choice((10, 3000, 30000))
    return chance.choice(
        (
            lambda: b"[" * many,
            lambda: b'{"a":' * many + b"1" + b"}" * many,
            lambda: b"{" + b",".join(b'"%d":0' % n for n in range(many)) + b"}",
            lambda: b"{" + b",".join([b'"a":0'] * many) + b"}",
            lambda: b'{"r":' + b"9" * many + b"}",
            lambda: b'{"labels":[' + b",".join(b'"%d"' % n for n in range(many)) + b"]}",
        )
    )()[:LIMIT]


# safetensors: the length of the header in 8 bytes, the header as JSON, the numbers


def safetensors_file(data: bytes, chance: random.Random) -> bytes:
    """The header's names, shapes, dtypes, places and metadata, or the numbers, changed."""
    try:
        length = int.from_bytes(data[:8], "little")
        header, numbers = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
        names = [name for name in header if name != "__metadata__"]
    except (ValueError, RecursionError, TypeError):
        return any_bytes(data, chance)
    if not isinstance(header, dict):
        return any_bytes(data, chance)
    for _ in range(chance.randint(1, 3)):
        kind = chance.random()
        entry = header.get(chance.choice(names)) if names else None
        if kind < 0.35 and isinstance(header.get("__metadata__"), dict):
            header["__metadata__"] = _metadata(header["__metadata__"], chance)
        elif kind < 0.5 and isinstance(entry, dict) and isinstance(entry.get("shape"), list):
            _reshape(entry, chance)
        elif kind < 0.6 and isinstance(entry, dict):
            entry["dtype"] = chance.choice(_DTYPES)
        elif kind < 0.7 and isinstance(entry, dict):
            entry["data_offsets"] = [chance.choice((0, 4, len(numbers), 2**40)), chance.choice((0, 8, len(numbers)))]
        elif kind < 0.85 and len(numbers) >= 4:
            at = 4 * chance.randrange(len(numbers) // 4)
            special = chance.choice((float("nan"), float("inf"), -1.0, 0.0, 3e38, 1e-40))
            numbers[at : at + 4] = struct.pack("<f", special)
        else:
            header = changed_json(header, chance)
            if not isinstance(header, dict):
                break
            names = [name for name in header if name != "__metadata__"]
    text = _dumped(header)
    said = len(text) if chance.random() < 0.95 else chance.choice((0, 1, 2**31, 2**63, len(text) + 1))
    return (said.to_bytes(8, "little") + text + bytes(numbers))[:LIMIT]


def _reshape(entry: dict[str, Any], chance: random.Random) -> None:
    shape = list(entry["shape"])
    if shape and chance.random() < 0.5:  # as many numbers in another shape: it passes safetensors' own check
        order = chance.sample(range(len(shape)), len(shape))
        entry["shape"] = [shape[place] for place in order]
    else:
        shape[chance.randrange(len(shape)) : 1] = [chance.choice(_SHAPES)] if shape else []
        entry["shape"] = shape


def _metadata(metadata: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """Texts of the metadata, and the JSON that stands in some of them."""
    made = dict(metadata)
    if not made:
        return {"format": chance.choice(_TEXTS)}
    key = chance.choice(list(made))
    try:
        made[key] = json.dumps(changed_json(json.loads(made[key]), chance))
    except (ValueError, TypeError, RecursionError):
        made[key] = chance.choice(_TEXTS)
    return made


# npz: a zip of .npy files


def npz_file(data: bytes, chance: random.Random) -> bytes:
    """Members added, removed, repeated, packed tightly, with other headers, or filled with zeros without end."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()[:70]
            if sum(info.file_size for info in infos) > 4 * LIMIT:
                return any_bytes(data, chance)
            members = [(info.filename, archive.read(info)) for info in infos]
    except Exception:  # whatever a damaged archive raises
        return any_bytes(data, chance)
    for _ in range(chance.randint(1, 2)):
        kind, at = chance.random(), chance.randrange(len(members)) if members else 0
        if not members or kind < 0.1:
            members.append((chance.choice(("values.npy", "format.npy", "../x.npy", "x" * 300)), b"\x93NUMPY"))
        elif kind < 0.2:
            members.append(members[at])
        elif kind < 0.3:
            del members[at]
        elif kind < 0.7:
            members[at] = (members[at][0], _npy(members[at][1], chance))
        elif kind < 0.75:
            zeros = chance.choice((2**16, 2**20, 3 * 2**20))
            header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118)
            shape = f"{{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, {zeros // 4}), }}"
            members[at] = (members[at][0], header + shape.ljust(117).encode() + b"\n" + bytes(zeros))
        else:
            members[at] = (members[at][0], any_bytes(members[at][1], chance))
    packed = _zipped(members, chance)
    return any_bytes(packed, chance) if chance.random() < 0.3 else packed[:LIMIT]


def _npy(data: bytes, chance: random.Random) -> bytes:
    """The header of an .npy file changed: shape, dtype, order."""
    start = 10 + int.from_bytes(data[8:10], "little")
    header, rest = data[10:start].decode("latin-1"), data[start:]
    shape = ", ".join(str(chance.choice(_SHAPES)) for _ in range(chance.randint(0, 4)))
    descr = chance.choice(("<f4", ">f4", "|O", "<U9", "|S1", "<U999999999", "<i8", "<M8", "|V4", "f4,i8", "<f3"))
    change = chance.randrange(3)
    if change == 0:
        header = re.sub(r"'shape': \([^)]*\)", f"'shape': ({shape})", header)
    elif change == 1:
        header = re.sub(r"'descr': '[^']*'", f"'descr': '{descr}'", header)
    else:
        header = header.replace("False", chance.choice(("True", "None", "__import__('os')")))
    return data[:8] + struct.pack("<H", min(len(header), 65535)) + header.encode("latin-1", "replace")[:65535] + rest


def _zipped(members: list[tuple[str, bytes]], chance: random.Random) -> bytes:
    stream = io.BytesIO()
    with (
        warnings.catch_warnings(),
        zipfile.ZipFile(stream, "w", chance.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive,
    ):
        warnings.simplefilter("ignore")  # a member twice is meant
        for name, content in members:
            entry = zipfile.ZipInfo(name)
            entry.compress_type = archive.compression
            archive.writestr(entry, content)
    return stream.getvalue()


# pickles


def pickle_file(data: bytes, chance: random.Random) -> bytes:
    """Opcodes removed, doubled, swapped, inserted and repeated, and other globals named."""
    try:
        found = list(pickletools.genops(data[:LIMIT]))
        places = [place for _, _, place in found] + [len(data)]
    except Exception:  # whatever pickletools raises
        return any_bytes(data, chance)
    codes = [data[first:last] for first, last in zip(places, places[1:], strict=False)]
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(codes))
        kind = chance.randrange(7)
        if kind == 0 and len(codes) > 2:
            del codes[at]
        elif kind == 1:
            codes.insert(at, codes[chance.randrange(len(codes))])
        elif kind == 2:
            other = chance.randrange(len(codes))
            codes[at], codes[other] = codes[other], codes[at]
        elif kind == 3:
            codes.insert(at, chance.choice(_OPCODES))
        elif kind == 4:
            codes.insert(at, b"c" + chance.choice(_GLOBALS).replace(" ", "\n").encode() + b"\n")
        elif kind == 5:
            codes[at] = codes[at] * (chance.choice((100, 2000)) if chance.random() < 0.05 else 2)
        else:
            codes[at] = any_bytes(codes[at], chance)
    return b"".join(codes)[:LIMIT]


_OPCODES = (
    *(bytes([code]) for code in b"(]})aeusRbNtio021PQ\x81\x85\x86\x92\x93\x94\x97\x98."),
    *(b"h\x00", b"h\x05", b"K\x01", b"\x80\x04", b"\x82\x01", b"\x95" + b"\xff" * 8, b"\x8e" + b"\xff" * 8),
    *(b"B\xff\xff\xff\x7f", b"X\xff\xff\xff\xff", b"\x8a\xff" + b"\xff" * 255),
)
