"""Model calls that compute some of an image's tokens: the others stand for themselves by what an earlier call kept.

An earlier call on a similar image keeps every block's self-attention keys and values, and what the last block gave. A
later call gathers the chosen tokens before the first block, lets them attend to themselves and to the kept keys and
values of all others, and puts them back among the kept ones after the last block. So the modules in between see fewer
tokens, and what comes after sees a whole image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Moment = tuple[float, int]  # a noise level, and how many predictions at that level came before
Chunks = Sequence[str]  # the conditioning of each equal part of a call's rows


@dataclass(frozen=True, eq=False)
class TokenModel:
    """Where a model's image tokens can be left out.

    blocks: in order, each called with the tokens ``(rows, tokens, C)`` first; attentions: the self-attention of each
    projections: of each, the layer that gives ``(rows, tokens, C')`` with keys and values in it; keys_values: these of
    its output; attend: ``(attention, tokens (rows, some, C), kept keys and values, index (rows, some))`` -> output
    patch: the side of a token in latent pixels
    """

    blocks: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    projections: tuple[nn.Module, ...]
    keys_values: Callable[[Tensor], Tensor]
    attend: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
    patch: int


@dataclass(eq=False)
class KeptCall:
    """What one model call left: of each block keys and values ``(rows, tokens, ...)``, and the last block's output."""

    chunks: tuple[str, ...]
    keys_values: list[Tensor] = field(default_factory=list)
    output: Tensor | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        tensors = [*self.keys_values, *([] if self.output is None else [self.output])]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def move(self, device: torch.device) -> None:
        """Hold everything on ``device``."""
        self.keys_values = [tensor.to(device) for tensor in self.keys_values]
        self.output = None if self.output is None else self.output.to(device)


class KeptTokens:
    """What the calls of one run left, by moment, within a limit of bytes; nothing at all where it would not suffice.

    ``calls``: how many are expected; ``spare``: another device and its limit, for what does not fit where it is.
    ``left_out`` says why nothing is kept, "" where something is.
    """

    def __init__(self, limit: float, calls: int, spare: tuple[torch.device, float] | None = None):
        self.limit, self.calls, self.left_out = limit, calls, ""
        self.size = 0
        self._spare, self._device = spare, None
        self._moments: dict[Moment, list[KeptCall]] = {}

    def __contains__(self, moment: Moment) -> bool:
        return moment in self._moments

    def add(self, moment: Moment, call: KeptCall) -> None:
        """Keep a call; all move to the spare device, or are let go of, where the limit would not hold them."""
        self.size += call.size
        self._moments.setdefault(moment, []).append(call)
        needed = max(self.size, call.size * self.calls)
        if needed > self.limit and self._spare is not None:
            (self._device, self.limit), self._spare = self._spare, None
            for kept in (kept for calls in self._moments.values() for kept in calls):
                kept.move(self._device)
        elif self._device is not None:
            call.move(self._device)
        if needed > self.limit:
            self.left_out = f"keeping them takes {needed / 1e9:.2f} GB, and {self.limit / 1e9:.2f} are allowed"
            self.clear()

    def clear(self) -> None:
        """Let go of everything."""
        self._moments, self.size = {}, 0

    def call_of(self, moment: Moment, chunks: Chunks) -> KeptCall | None:
        """The only call of a moment, if it had just these parts."""
        calls = self._moments.get(moment, ())
        return calls[0] if len(calls) == 1 and calls[0].chunks == tuple(chunks) else None

    def chunk(self, moment: Moment, name: str, number: int, block: int | None) -> Tensor | None:
        """The rows of the ``number``-th part ``name`` of a moment: a block's keys and values, or the output (None)."""
        for call in self._moments.get(moment, ()):
            length = len(call.output) // len(call.chunks)
            for place, own in enumerate(call.chunks):
                if own == name:
                    if number == 0:
                        kept = call.output if block is None else call.keys_values[block]
                        return kept[place * length : (place + 1) * length]
                    number -= 1
        return None


@dataclass(frozen=True, eq=False)
class Keeping:
    """A prediction whose calls are kept."""

    kept: KeptTokens
    moment: Moment


@dataclass(frozen=True, eq=False)
class Sparse:
    """A prediction that computes the tokens ``index (images, some)`` of ``tokens`` alone; all where none were kept.

    ``seen``: how many parts of each conditioning its calls had so far.
    """

    kept: KeptTokens
    moment: Moment
    index: Tensor
    tokens: int
    seen: dict[str, int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Of the tokens, those that are computed."""
        return self.index.shape[1] / self.tokens


@contextmanager
def keeping(model: TokenModel, chunks: Chunks, request: Keeping) -> Iterator[None]:
    """Keep one model call."""
    call = KeptCall(tuple(chunks))

    def keep(_module, _args, output: Tensor) -> None:
        call.keys_values.append(model.keys_values(output).detach().clone())

    def keep_output(_module, _args, output: Tensor) -> None:
        call.output = output.detach().clone()

    with ExitStack() as stack:
        for projection in model.projections:
            stack.callback(projection.register_forward_hook(keep).remove)
        stack.callback(model.blocks[-1].register_forward_hook(keep_output).remove)
        yield
    if call.output is not None and len(call.keys_values) == len(model.blocks):  # a cache may have skipped the call
        request.kept.add(request.moment, call)


def kept_rows(model: TokenModel, chunks: Chunks, request: Sparse) -> list[Tensor] | None:
    """Of each block the kept keys and values of a call's rows, and last the output; None where one was not kept."""
    numbers: list[tuple[str, int]] = []
    for name in chunks:
        number = request.seen.get(name, 0)
        request.seen[name] = number + 1
        numbers.append((name, number))
    whole = request.kept.call_of(request.moment, chunks)
    if whole is not None:  # the same parts in the same order, as mostly: nothing to put together
        return [*whole.keys_values, whole.output]
    rows = []
    for block in (*range(len(model.blocks)), None):
        parts = [request.kept.chunk(request.moment, name, number, block) for name, number in numbers]
        if any(part is None for part in parts):
            return None
        rows.append(parts[0] if len(parts) == 1 else torch.cat(parts))
    return rows


@contextmanager
def sparse(model: TokenModel, kept: list[Tensor], index: Tensor) -> Iterator[None]:
    """Compute the tokens ``index (rows, some)`` alone in one model call, among ``kept`` as `kept_rows` gives them."""
    *keys_values, output = kept

    def gather(_module, args, kwargs):
        tokens = args[0]
        return (tokens.gather(1, wide(index, tokens)), *args[1:]), kwargs

    def scatter(_module, _args, tokens: Tensor) -> Tensor:
        return output.scatter(1, wide(index, tokens), tokens.to(output.dtype))

    with ExitStack() as stack:
        stack.callback(model.blocks[0].register_forward_pre_hook(gather, with_kwargs=True).remove)
        stack.callback(model.blocks[-1].register_forward_hook(scatter).remove)
        for attention, own in zip(model.attentions, keys_values, strict=True):
            attention.forward = _attending(model, attention, own, index)
            stack.callback(attention.__dict__.pop, "forward", None)
        yield


def _attending(model: TokenModel, attention: nn.Module, kept: Tensor, index: Tensor) -> Callable:
    return lambda tokens, *_args, **_kwargs: model.attend(attention, tokens, kept, index)


def wide(index: Tensor, like: Tensor) -> Tensor:
    """An index of tokens ``(rows, some)`` for every channel of ``like (rows, tokens, C)``."""
    return index[..., None].expand(-1, -1, like.shape[-1])


def token_index(allowed: Tensor, patch: int, halo: int) -> tuple[Tensor, int]:
    """The tokens in which a mask ``allowed (images, H, W)`` bool has any pixel, with ``halo`` tokens around them.

    Returns an index ``(images, some)``, ascending, and the number of all tokens. Every image has as many as the one
    that needs the most: those beyond its own are some of the others.
    """
    pool = torch.nn.functional.max_pool2d
    chosen = pool(allowed[:, None].float(), patch, ceil_mode=True)
    chosen = pool(chosen, 2 * halo + 1, stride=1, padding=halo).flatten(1) > 0
    most = max(1, int(chosen.sum(dim=1).max()))
    order = torch.argsort(chosen.to(torch.int8), dim=1, descending=True, stable=True)
    return order[:, :most].sort(dim=1).values, chosen.shape[1]
