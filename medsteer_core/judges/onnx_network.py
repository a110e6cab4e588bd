"""A judge's network as an ONNX file, run by ONNX Runtime: a graph of standard operators, which holds no code.

The graph is read from the bytes that were hashed. Weights in a second file would not be: they are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from ..errors import MedSteerError
from .card import Card

_TYPES = {"tensor(float)": numpy.float32, "tensor(float16)": numpy.float16, "tensor(double)": numpy.float64}
# The key "location" of TensorProto.external_data: protobuf takes its length in longer forms too, and in any order.
_ELSEWHERE = re.compile(rb"\n(?:\x08|\x88\x80*\x00)location")


@dataclass(frozen=True)
class OnnxNetwork:
    """``network(images (n, 3, H, W)) -> output (n, ...)`` in float32; ``batch`` is the graph's batch size, if fixed."""

    file: str
    session: Any
    input: str
    output: str
    kind: type
    batch: int | None

    def __call__(self, images: Tensor) -> Tensor:
        step = self.batch or len(images)
        return torch.cat([self._run(part) for part in images.split(step)])

    def _run(self, images: Tensor) -> Tensor:
        n, pixels = len(images), images
        if self.batch and n < self.batch:  # the last part, filled up
            pixels = torch.cat([images, images[:1].expand(self.batch - n, -1, -1, -1)])
        try:
            (values,) = self.session.run([self.output], {self.input: pixels.numpy().astype(self.kind)})
        except Exception as error:  # ONNX Runtime's own errors have no common base
            words = " ".join(str(error).split())
            raise MedSteerError(
                f"'{self.file}' cannot be run on images of shape {tuple(pixels.shape)} ({words:.160}). Check "
                "input_size, or export it again."
            ) from error
        return torch.from_numpy(numpy.asarray(values, dtype=numpy.float32))[:n]


def network_from(data: bytes, file: str, card: Card, device: str = "cpu") -> OnnxNetwork:
    """The network in ``data``, the bytes of ``file``. MedSteerError where it does not fit its card."""
    session = _session(data, file, device)
    given = _chosen(session.get_inputs(), card.input, "input", file, card)
    output = _chosen(session.get_outputs(), card.output, "output", file, card)
    wanted = (3, *card.preprocessing.input_size)
    shape = list(given.shape or ())
    fits = len(shape) == 4 and all(not isinstance(a, int) or a == b for a, b in zip(shape[1:], wanted, strict=True))
    if not fits:
        raise MedSteerError(
            f"'{file}' wants an input '{given.name}' of shape {shape}; (batch, {', '.join(map(str, wanted))}) was "
            f"expected: channels first, then the input_size of '{card.path}'."
        )
    if given.type not in _TYPES:
        raise MedSteerError(f"'{file}' wants an input of {given.type}; one of {', '.join(_TYPES)} was expected.")
    batch = shape[0] if isinstance(shape[0], int) else None
    return OnnxNetwork(file, session, given.name, output.name, _TYPES[given.type], batch)


def _session(data: bytes, file: str, device: str) -> Any:
    runtime = _runtime()
    if _ELSEWHERE.search(data):
        raise MedSteerError(
            f"'{file}' keeps weights in another file; one file was expected. Export it with external_data=False."
        )
    providers = ["CPUExecutionProvider"]
    if device != "cpu":
        if "CUDAExecutionProvider" not in runtime.get_available_providers():
            raise MedSteerError(
                f"'{file}' should run on {device}, but this ONNX Runtime has no CUDA. Use device 'cpu'."
            )
        providers.insert(0, "CUDAExecutionProvider")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
    try:
        return runtime.InferenceSession(data, options, providers=providers)
    except Exception as error:  # ONNX Runtime's own errors have no common base
        words = " ".join(str(error).split())
        raise MedSteerError(f"'{file}' is not a readable ONNX file ({words:.160}). Export it again.") from error


def _chosen(of: Any, name: str | None, role: str, file: str, card: Card) -> Any:
    """The input or output that the card names; the only one when it names none."""
    names = [one.name for one in of]
    if name is None and len(names) != 1:
        raise MedSteerError(f"'{file}' has the {role}s {', '.join(names)}. Say in '{card.path}' which: \"{role}\": ...")
    if name is not None and name not in names:
        raise MedSteerError(f"'{card.path}' says {role}: \"{name}\"; '{file}' has {', '.join(names)}.")
    return of[names.index(name) if name else 0]


def _runtime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MedSteerError(
            "onnxruntime is not installed; judges whose weights are .onnx need it. Install it for the Python that runs "
            "ComfyUI: pip install onnxruntime"
        ) from error
    return onnxruntime
