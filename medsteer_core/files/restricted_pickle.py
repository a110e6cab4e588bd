"""Pickles of containers, numbers, text and numpy arrays, read without running anything that they ask for.

Python's own unpickler imports and calls whatever a file names. This one is a small interpreter of the opcodes that such
values need: a global is looked up in a table of this file's own readers, never imported, and numpy arrays are made here
from checked bytes. So what a file can do is to hold values. Bytes that it has made of a text (protocol 2's way) count
together: it can't make more of them than it is long.
"""

import io
import math
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import MedSteerError
from .inside import shown

OPCODES = 2_000_000  # a file of 1000 steps and 28 blocks has half a million
_PROTOCOLS = range(2, 6)
_MOST_DIMENSIONS, _LONGEST_SIDE = 8, 1 << 40
_ALLOWED = frozenset(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE "
    "BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 "
    "TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD BINPUT LONG_BINPUT MEMOIZE BINGET "
    "LONG_BINGET".split()
)
_DTYPES = frozenset("b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8".split())


def loads(data: bytes, name: str) -> Any:
    """The value in a pickle of protocol 2 to 5: dict, list, tuple, text, bytes, numbers, None and `PickledArray`.

    `name` is the file's, for errors. Raises MedSteerError for anything else, naming the global or the opcode that was
    asked for, and for a damaged file.
    """
    machine = _Machine(name, len(data))
    stream = io.BytesIO(data)
    try:
        for _ in range(OPCODES):
            opcode = _next_opcode(stream, name)
            argument = opcode.arg.reader(stream) if opcode.arg else None
            if opcode.name == "STOP":
                break
            machine.run(opcode.name, argument)
        else:
            raise MedSteerError(
                f"'{name}' is a pickle of more than {OPCODES} parts; a vector has far fewer. Choose a file that the "
                "reference code wrote."
            )
        return machine.result(rest=len(data) - stream.tell())
    except MedSteerError:
        raise
    except (ValueError, TypeError, LookupError, OverflowError, struct.error) as error:
        raise _damaged(name, str(error) or type(error).__name__) from error


@dataclass(eq=False)
class _Dtype:
    """The dtype that a pickle describes: one of `_DTYPES`, of either byte order."""

    code: str
    order: str = "="

    def set_state(self, state: Any) -> None:
        _version, order, *others = state
        if order not in ("<", ">", "=", "|") or any(other is not None for other in others[:3]):
            raise ValueError("a dtype that is not a plain number's")
        self.order = order

    @property
    def numpy(self) -> np.dtype:
        return np.dtype(self.code).newbyteorder(self.order)


@dataclass(eq=False)
class PickledArray:
    """A numpy array in a pickle. `values` is None until the file has given them."""

    values: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        _version, shape, dtype, fortran, data = state
        self.values = _numbers(data, dtype, shape, "F" if fortran else "C")


@dataclass(frozen=True, eq=False)
class _Function:
    """One of the functions below, as a pickle names it. The pickle can call it and do nothing else with it."""

    call: Callable[..., Any]


_NDARRAY = object()  # numpy.ndarray where a pickle hands it to _reconstruct


def _numbers(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    """An array over `data`, once its size is known to be what dtype and shape say."""
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
        raise ValueError("an array that is not one of plain numbers")
    sides = isinstance(shape, tuple) and len(shape) <= _MOST_DIMENSIONS
    if not sides or any(type(side) is not int or not 0 <= side <= _LONGEST_SIDE for side in shape):
        raise ValueError("an array without a proper shape")
    if order not in ("C", "F"):
        raise ValueError("an array in an unknown memory order")
    size = math.prod(shape) * dtype.numpy.itemsize
    if size != len(data):
        raise ValueError(f"an array that declares {size} bytes and holds {len(data)}")
    return np.frombuffer(data, dtype.numpy).reshape(shape, order=order)


def _make_dtype(code: Any, *_align_and_copy: Any) -> _Dtype:
    if not isinstance(code, str) or code not in _DTYPES:
        objects = isinstance(code, str) and code.startswith("O")
        raise ValueError(f"a numpy array of {'Python objects' if objects else 'something else than numbers'}")
    return _Dtype(code)


def _reconstruct(kind: Any, _shape: Any, _code: Any) -> PickledArray:
    if kind is not _NDARRAY:
        raise ValueError("an array of another class than numpy.ndarray")
    return PickledArray()  # its shape and values come with its state


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any, _axes: Any = None) -> PickledArray:
    return PickledArray(_numbers(data, dtype, shape, order))


def _scalar(dtype: Any, data: Any) -> Any:
    return _numbers(data, dtype, (1,), "C")[0].item()


def _encode(text: Any, encoding: Any) -> bytes:
    """How protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("text in another encoding than latin1")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


_GLOBALS: dict[tuple[str, str], object] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Function(_make_dtype),
    ("_codecs", "encode"): _Function(_encode),
    ("__builtin__", "bytes"): _Function(_no_bytes),
    ("builtins", "bytes"): _Function(_no_bytes),
}
for _core in ("numpy.core", "numpy._core"):  # numpy before and since version 2
    _GLOBALS[f"{_core}.multiarray", "_reconstruct"] = _Function(_reconstruct)
    _GLOBALS[f"{_core}.multiarray", "scalar"] = _Function(_scalar)
    _GLOBALS[f"{_core}.numeric", "_frombuffer"] = _Function(_frombuffer)


class _Machine:
    """A pickle's stack, marks and memo. The stack of marks holds the lists below each mark."""

    def __init__(self, name: str, budget: int) -> None:
        self._name = name
        self._budget = budget  # bytes that may still be made
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def result(self, rest: int) -> Any:
        if rest or self._below or len(self._stack) != 1:
            raise ValueError(f"{rest} bytes after its end" if rest else "more than one value")
        return self._stack[0]

    def run(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        match opcode:
            case "PROTO":
                if argument not in _PROTOCOLS:
                    raise ValueError(f"protocol {argument}")
            case "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_TUPLE":
                stack.append({"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}[opcode]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(opcode[-1]))))
            case "MARK":
                self._below.append(stack)
                self._stack = []
            case "TUPLE":
                items = tuple(self._since_mark())
                self._stack.append(items)
            case "APPEND":
                self._append(self._pop(1))
            case "APPENDS":
                self._append(self._since_mark())
            case "SETITEM":
                self._set_items(self._pop(2))
            case "SETITEMS":
                self._set_items(self._since_mark())
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "GLOBAL":
                stack.append(self._global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(self._global(*self._pop(2)))
            case "REDUCE":
                function, arguments = self._pop(2)
                if not isinstance(function, _Function) or not isinstance(arguments, tuple):
                    raise ValueError("a call of something that is no function")
                stack.append(self._paid(function.call(*arguments)))
            case "BUILD":
                (state,) = self._pop(1)
                if not isinstance(stack[-1], _Dtype | PickledArray):
                    raise ValueError("a state for something that has none")
                stack[-1].set_state(state)
            case _:  # the others carry their value with them
                stack.append(argument)

    def _paid(self, made: Any) -> Any:
        if isinstance(made, bytes):
            self._budget -= len(made)
            if self._budget < 0:
                raise ValueError("one text made into bytes again and again")
        return made

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise ValueError("a value is missing")
        taken = self._stack[-count:]
        del self._stack[-count:]
        return taken

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _append(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueError("something appended to what is no list")
        self._stack[-1].extend(items)

    def _set_items(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not dict:
            raise ValueError("an entry for what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a deeply nested tuple could overflow the stack; huge numbers can be chosen to share one hash.
            if not isinstance(key, str) and not (isinstance(key, int) and 0 <= key < OPCODES):
                raise ValueError("a dict with keys other than text and whole numbers of a step's size")
            self._stack[-1][key] = value

    def _global(self, module: Any, name: Any) -> object:
        if isinstance(module, str) and isinstance(name, str) and (module, name) in _GLOBALS:
            return _GLOBALS[module, name]
        # Only text is shown: the words for nested tuples can be longer than memory.
        module, name = (part if isinstance(part, str) else f"a {type(part).__name__}" for part in (module, name))
        torch = module.split(".")[0] == "torch"
        hint = "Save its tensors as numpy arrays (tensor.numpy())." if torch else "Don't trust this file."
        raise MedSteerError(
            f"'{self._name}' is a pickle that asks for the global '{shown(module)}.{shown(name)}'; only numpy arrays, "
            f"dicts, lists, tuples, text and numbers are read. Nothing was run. {hint}"
        )


def _next_opcode(stream: io.BytesIO, name: str) -> pickletools.OpcodeInfo:
    code = stream.read(1)
    opcode = pickletools.code2op.get(code.decode("latin-1"))
    if opcode is None:
        raise ValueError("an unknown opcode" if code else "its end is missing")
    if stream.tell() == 1 and opcode.name != "PROTO":
        raise ValueError("it does not begin as pickles of protocol 2 to 5 do")
    if opcode.name not in _ALLOWED:
        raise MedSteerError(
            f"'{name}' is a pickle with the opcode {opcode.name}; values of numpy arrays, dicts, lists, tuples, text "
            "and numbers don't need it. Nothing was run. Save the file again with Python 3's pickle, protocol 2 to 5."
        )
    return opcode


def _damaged(name: str, why: str) -> MedSteerError:
    return MedSteerError(
        f"'{name}' is no readable pickle of numpy arrays ({shown(why, 200)}); a dict of steps that Python 3's pickle "
        "wrote was expected. Copy the file again, or choose another."
    )
