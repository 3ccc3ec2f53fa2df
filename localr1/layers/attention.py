"""The self-attention block over a dense K/V cache: x += o(attention(rope(qkv(rms_norm(x))))).

Shapes: T tokens, H query heads, G key/value heads, D head dim, S = positions seen so far.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from localr1.kernels.api import AttentionWeights, Kernels, LayerCache, RopeTable
from localr1.kernels.cache_rows import load_rows, store_rows
from localr1.layers.linear import Linear, PackedLinear
from localr1.layers.norm import rms_norm
from localr1.layers.rope import apply_rope


class AttentionBlock(Protocol):
    def __call__(self, x: Tensor, rope: RopeTable, cache: LayerCache, start: int) -> None:
        """x float32 [T, hidden] is added to in place; the cache gains positions
        start..start+T-1, for which it must have room."""
        ...


@dataclass(frozen=True)
class AttentionParts:
    """norm: [hidden]; q: [H*D, hidden]; k, v: [G*D, hidden]; o: [hidden, H*D]; q_norm, k_norm: [D]
    per-head RMS weights or None; scale multiplies query-key products."""

    norm: Tensor
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    scale: float


@dataclass(frozen=True)
class ComposedAttention:
    """Any mix of float and packed matrices, one operation after another."""

    parts: AttentionParts

    def __call__(self, x: Tensor, rope: RopeTable, cache: LayerCache, start: int) -> None:
        parts = self.parts
        tokens = x.shape[0]
        normed = rms_norm(x, parts.norm, parts.eps)
        q = parts.q(normed).view(tokens, parts.num_heads, parts.head_dim)
        k = parts.k(normed).view(tokens, parts.num_kv_heads, parts.head_dim)
        v = parts.v(normed).view(tokens, parts.num_kv_heads, parts.head_dim)
        if parts.q_norm is not None:
            q = rms_norm(q, parts.q_norm, parts.eps)
        if parts.k_norm is not None:
            k = rms_norm(k, parts.k_norm, parts.eps)
        end = start + tokens
        store_rows(cache.k[:, start:end], apply_rope(k, rope, start).transpose(0, 1))
        store_rows(cache.v[:, start:end], v.transpose(0, 1))
        keys, values = (load_rows(each[:, :end], parts.head_dim) for each in (cache.k, cache.v))
        heads = attend(apply_rope(q, rope, start), keys, values, start, parts.scale)
        x += parts.o(heads)


def attend(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float) -> Tensor:
    """Causal softmax attention: q [T, H, D]; k, v [G, S, D], S = start + T; token t sees positions
    0..start+t; query head h reads key head h // (H/G). Returns [T, H*D] float32."""
    tokens, num_heads, head_dim = q.shape
    num_kv_heads, positions, _ = k.shape
    group = num_heads // num_kv_heads
    grouped = q.transpose(0, 1).reshape(num_kv_heads, group, tokens, head_dim)
    # Expanded views: keys and values are not copied once a query head.
    shape = (num_kv_heads, group, positions, head_dim)
    keys, values = k.float()[:, None].expand(shape), v.float()[:, None].expand(shape)
    mask = None
    if tokens > 1:
        mask = torch.ones(tokens, positions, dtype=torch.bool).tril(start)
    out = functional.scaled_dot_product_attention(
        grouped, keys, values, attn_mask=mask, scale=scale
    )
    return out.reshape(num_heads, tokens, head_dim).transpose(0, 1).reshape(tokens, -1)


@dataclass(frozen=True)
class FusedAttention:
    """All matrices packed: one kernel call."""

    kernels: Kernels
    block: object

    def __call__(self, x: Tensor, rope: RopeTable, cache: LayerCache, start: int) -> None:
        self.kernels.attention_block(x, self.block, rope, cache, start)


def build_attention(parts: AttentionParts, kernels: Kernels) -> AttentionBlock:
    """The fastest block these matrices allow."""
    q, k, v, o = parts.q, parts.k, parts.v, parts.o
    if not (
        isinstance(q, PackedLinear)
        and isinstance(k, PackedLinear)
        and isinstance(v, PackedLinear)
        and isinstance(o, PackedLinear)
    ):
        return ComposedAttention(parts)
    weights = AttentionWeights(
        norm=parts.norm,
        q=q.weight,
        k=k.weight,
        v=v.weight,
        o=o.weight,
        q_bias=q.bias,
        k_bias=k.bias,
        v_bias=v.bias,
        o_bias=o.bias,
        q_norm=parts.q_norm,
        k_norm=parts.k_norm,
        num_heads=parts.num_heads,
        num_kv_heads=parts.num_kv_heads,
        head_dim=parts.head_dim,
        eps=parts.eps,
        scale=parts.scale,
    )
    return FusedAttention(kernels, kernels.bind_attention(weights))
