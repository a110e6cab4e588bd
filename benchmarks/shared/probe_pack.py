"""A second custom node pack that looks into the server from within; benchmarks and tests copy it there as they need it.

Routes: GET /medsteer_probe/counts (what lives after a garbage collection), POST /medsteer_probe/trim (unused memory
back to the system), GET and POST /medsteer_probe/calls (the model calls since the last POST, which sets what the next
ones do). Node: Probe Model, whose MODEL counts its calls, can raise in one, and can hold one until it is cancelled.
"""

import ctypes
import gc
import time
from collections import Counter
from dataclasses import dataclass

import comfy.model_management
import torch
from aiohttp import web
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import ComfyExtension, io
from server import PromptServer

KEY = "medsteer_probe"
HOLD_SECONDS = 20.0


@dataclass
class Calls:
    """Model calls of probed models. ``raise_at`` and ``hold_at`` are numbers of calls, from 1; 0 is never."""

    count: int = 0
    raise_at: int = 0
    hold_at: int = 0
    cancelled: bool = False  # whether the cancel came while the call was held


calls = Calls()


def counts() -> dict[str, int]:
    """How many of each kind live that were not there at the start, after a garbage collection.

    Cycles are no leak: ComfyUI collects them too.
    """
    gc.collect()
    found: Counter = Counter(tensors=0, tensor_bytes=0, hooks=0, patchers=0, medsteer=0, modules=0)
    for thing in gc.get_objects():
        kind = type(thing)  # isinstance would ask lazy proxies, which load things
        if issubclass(kind, torch.Tensor):
            found["tensors"] += 1
            found["tensor_bytes"] += thing.numel() * thing.element_size()
        elif issubclass(kind, torch.nn.Module):
            found["modules"] += 1
            hooks = [thing.__dict__.get(name) for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
            found["hooks"] += sum(map(len, filter(None, hooks)))
        elif issubclass(kind, ModelPatcher):
            found["patchers"] += 1
        elif ".medsteer_core." in str(getattr(kind, "__module__", "")):
            found["medsteer"] += 1
    return {**found, "objects": len(gc.get_objects())}


def trim() -> None:
    """Give memory that is free inside the process back to the system, where the C library can."""
    gc.collect()
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)


def _apply_model(executor, *args, **kwargs):
    """One model call, inside every wrapper that the model had before: MedSteer's hooks are in place."""
    calls.count += 1
    if calls.count == calls.raise_at:
        raise RuntimeError(f"the probe fails in model call {calls.count}")
    if calls.count == calls.hold_at:
        until = time.monotonic() + HOLD_SECONDS
        while not calls.cancelled and time.monotonic() < until:
            calls.cancelled = comfy.model_management.processing_interrupted()
            time.sleep(0.002)
    return executor(*args, **kwargs)


class ProbeModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteerProbe_Model",
            display_name="Probe Model",
            category="MedSteer probe",
            inputs=[io.Model.Input("model")],
            outputs=[io.Model.Output("model")],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _apply_model)
        return io.NodeOutput(clone)


async def get_counts(_request) -> web.Response:
    return web.json_response(counts())


async def post_trim(_request) -> web.Response:
    trim()
    return web.json_response({})


async def get_calls(_request) -> web.Response:
    return web.json_response({"count": calls.count, "cancelled": calls.cancelled})


async def post_calls(request) -> web.Response:
    global calls
    calls = Calls(**await request.json())
    return web.json_response({})


class Probe(ComfyExtension):
    async def on_load(self) -> None:
        gc.collect()
        gc.freeze()  # what is there at the start is no growth, and looking at it would take most of the time
        routes = PromptServer.instance.routes
        routes.get("/medsteer_probe/counts")(get_counts)
        routes.post("/medsteer_probe/trim")(post_trim)
        routes.get("/medsteer_probe/calls")(get_calls)
        routes.post("/medsteer_probe/calls")(post_calls)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [ProbeModel]


async def comfy_entrypoint() -> Probe:
    return Probe()
