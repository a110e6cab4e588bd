"""Hooks on sites that live for one model call and are removed whatever happens (an interrupt is a BaseException)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from torch import Tensor, nn

from .sites import owns_its_output

Visit = Callable[[str, Tensor, bool], Tensor]  # (site, its output, whether nobody else holds that) -> new output


@contextmanager
def hooks(sites: dict[str, tuple[nn.Module, tuple[nn.Module, ...]]], visit: Visit) -> Iterator[None]:
    """Hooks on sites, each given with its `fresh_layers`."""
    handles = []

    def hook(name: str, owned: bool) -> Callable:
        return lambda _module, _args, output: visit(name, output, owned)

    try:
        for name, (module, fresh) in sites.items():
            handles.append(module.register_forward_hook(hook(name, owns_its_output(fresh))))
        yield
    finally:
        for handle in handles:
            handle.remove()


def rows_first(visit: Visit) -> Visit:
    """`visit` for sites that give (tokens, rows, channels): it sees them as (rows, tokens, channels)."""

    return lambda name, output, owned: visit(name, output.transpose(0, 1), owned).transpose(0, 1)


def is_free(output: Tensor) -> bool:
    """Whether an output that nobody else holds can be written into: no gradient wants what it was."""
    return type(output) is Tensor and not output.requires_grad and output.is_contiguous()


def is_compiled(model: ModelPatcher) -> bool:
    """Whether a node has this model compiled."""
    return _has_compiled(model.model_options.get("transformer_options", {}))


def uncompiled(options: dict[str, Any]) -> AbstractContextManager:
    """Run a torch.compile'd model eagerly for this call: compiled code does not see hooks that come and go."""
    return torch.compiler.set_stance("force_eager") if _has_compiled(options) else nullcontext()


def _has_compiled(options: dict[str, Any]) -> bool:
    return COMPILE_KEY in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
