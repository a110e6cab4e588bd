"""PixArt's blocks and self-attention, as `tokens` wants them."""

from __future__ import annotations

from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.pixart.blocks import AttentionKVCompress
from torch import Tensor, nn

from .tokens import TokenModel, wide


def pixart_tokens(network: nn.Module) -> TokenModel | None:
    """The token model of a PixArt; None where keys and values are compressed, or an attention is not PixArt's own."""
    blocks = tuple(network.blocks)
    attentions = tuple(block.attn for block in blocks)
    for attention in attentions:
        if type(attention) is not AttentionKVCompress or attention.sr_ratio > 1 or "forward" in attention.__dict__:
            return None
    projections = tuple(attention.qkv for attention in attentions)
    return TokenModel(blocks, attentions, projections, _keys_values, _attend, network.patch_size)


def _keys_values(projected: Tensor) -> Tensor:
    """Of queries, keys and values side by side the last two: ``(rows, tokens, 2 * C)``."""
    return projected[..., projected.shape[-1] // 3 :]


def _attend(attention: nn.Module, tokens: Tensor, kept: Tensor, index: Tensor) -> Tensor:
    """`AttentionKVCompress.forward` for some tokens, with the kept keys and values of all others."""
    rows, some, width = tokens.shape
    heads = attention.num_heads
    projected = attention.qkv(tokens)
    queries, own = projected[..., :width], projected[..., width:]
    both = kept.scatter(1, wide(index, own), own.to(kept.dtype))
    keys, values = both.split(width, dim=-1)

    def by_head(tensor: Tensor) -> Tensor:
        return tensor.reshape(rows, -1, heads, width // heads).transpose(1, 2)

    normed = attention.q_norm(queries), attention.k_norm(keys), values
    attended = optimized_attention(*map(by_head, normed), heads, mask=None, skip_reshape=True)
    return attention.proj(attended.view(rows, some, width))
