"""Multi-head latent attention (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1 and appendix C): keys
and values are linear images of one small latent per position.

Two forms of the same product over the same cache. Expanded: every head's keys and values are
computed from the latents. Absorbed: a query is carried into the latent's space instead
(q . (U c) = (U^T q) . c), and the weighted latents are carried out of it afterwards, so that only
the product itself is computed per position and head. Few tokens are cheaper absorbed, many
expanded; `absorbs` counts.

Shapes: T tokens, S = positions seen so far, H heads, L latent, N key values without and R with a
position, V values of a head.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from localr1.kernels.api import Kernels, LatentWeights, RopeTable
from localr1.kernels.cache_rows import load_rows, store_rows
from localr1.layers.linear import Linear, PackedLinear
from localr1.layers.norm import rms_norm
from localr1.layers.rope import apply_rope

LATENT_NORM_EPS = 1e-6
"""Of the norms on the query's and the keys' latent: DeepSeek's code does not take these two from
config.json, and neither does transformers."""
WORKING_VALUES = 1 << 24
"""Float32 values (64 MiB) that scores, expanded keys and values may take at one time, however long
the context; fewer positions or heads are taken at once to keep to it."""
EXPANDED_POSITIONS = 512
"""Positions whose keys and values are expanded at once: matrix products are efficient from here."""


@dataclass(frozen=True)
class LatentAttentionParts:
    """norm: [hidden]. q: [H*(N+R), hidden], or q_down [Q, hidden], q_norm [Q] and q [H*(N+R), Q].
    kv_down: [L+R, hidden]; kv_norm: [L]. key_up: [H, N, L]; value_up: [H, L, V], float32 or
    narrower, widened where they are used. o: [hidden, H*V]. scale multiplies query-key products.

    The rows of q and kv_down that get a position lie in the "half" layout, whatever the file's.
    """

    norm: Tensor
    q_down: Linear | None
    q_norm: Tensor | None
    q: Linear
    kv_down: Linear
    kv_norm: Tensor
    key_up: Tensor
    value_up: Tensor
    o: Linear
    rope_size: int
    eps: float
    scale: float

    @property
    def num_heads(self) -> int:
        return self.key_up.shape[0]

    @property
    def latent_size(self) -> int:
        return self.key_up.shape[2]


@dataclass(frozen=True)
class LatentAttention:
    """The block x += o(attention(q(n), kv(n))), n = rms_norm(x). fused: kernels and the block bound
    by them, which compute either form in one call; all else is one operation after another.
    """

    parts: LatentAttentionParts
    fused: tuple[Kernels, object] | None = None

    def __call__(self, x: Tensor, rope: RopeTable, cache: Tensor, start: int) -> None:
        """x float32 [T, hidden] is added to in place; the cache [capacity, row of L+R values] gains
        positions start..start+T-1, for which it must have room."""
        parts = self.parts
        if self.fused is not None and _fits_one_call(parts, x.shape[0]):
            kernels, block = self.fused
            return kernels.latent_block(x, block, rope, cache, start)
        end = start + x.shape[0]
        normed = rms_norm(x, parts.norm, parts.eps)
        store_rows(cache[start:end], self._cached(normed, rope, start))
        q, q_rope = self._queries(normed, rope, start)
        x += parts.o(attend(parts, q, q_rope, cache[:end], start))
        return None

    def splits_freely(self, num_tokens: int) -> bool:
        """Whether each of up to so many tokens has the bits it would have alone."""
        if self.fused is None:
            return False
        kernels, _ = self.fused
        return kernels.splits_freely and absorbs(self.parts, num_tokens)

    def _queries(self, normed: Tensor, rope: RopeTable, start: int) -> tuple[Tensor, Tensor]:
        """Queries [T, H, N] and their rotated parts [T, H, R]."""
        parts = self.parts
        if parts.q_down is not None:
            assert parts.q_norm is not None
            normed = rms_norm(parts.q_down(normed), parts.q_norm, LATENT_NORM_EPS)
        q = parts.q(normed).view(len(normed), parts.num_heads, -1)
        key_size = parts.key_up.shape[1]
        return q[..., :key_size], apply_rope(q[..., key_size:], rope, start)

    def _cached(self, normed: Tensor, rope: RopeTable, start: int) -> Tensor:
        """What the cache keeps of these tokens: [T, L+R]."""
        parts = self.parts
        down = parts.kv_down(normed)
        latent, key = down[:, : parts.latent_size], down[:, None, parts.latent_size :]
        rotated = apply_rope(key, rope, start)[:, 0]
        return torch.cat((rms_norm(latent, parts.kv_norm, LATENT_NORM_EPS), rotated), dim=1)


def build_latent_attention(parts: LatentAttentionParts) -> LatentAttention:
    """The fastest block these matrices allow."""
    q_down, q, kv_down, o = parts.q_down, parts.q, parts.kv_down, parts.o
    if not (
        (q_down is None or isinstance(q_down, PackedLinear))
        and isinstance(q, PackedLinear)
        and isinstance(kv_down, PackedLinear)
        and isinstance(o, PackedLinear)
    ):
        return LatentAttention(parts)
    weights = LatentWeights(
        norm=parts.norm,
        q_down=None if q_down is None else q_down.weight,
        q_norm=parts.q_norm,
        q=q.weight,
        kv_down=kv_down.weight,
        kv_norm=parts.kv_norm,
        key_up=parts.key_up,
        value_up=parts.value_up,
        o=o.weight,
        q_down_bias=None if q_down is None else q_down.bias,
        q_bias=q.bias,
        kv_down_bias=kv_down.bias,
        o_bias=o.bias,
        rope_size=parts.rope_size,
        eps=parts.eps,
        latent_eps=LATENT_NORM_EPS,
        scale=parts.scale,
    )
    return LatentAttention(parts, (o.kernels, o.kernels.bind_latent(weights)))


def _fits_one_call(parts: LatentAttentionParts, tokens: int) -> bool:
    """Whether the queries of the absorbed form, which the kernels carry into the latent's space all
    at once, fit the working memory. In expanded form they stay as they are."""
    values = tokens * parts.num_heads * (parts.latent_size + parts.rope_size)
    return not absorbs(parts, tokens) or values <= WORKING_VALUES


def absorbs(parts: LatentAttentionParts, tokens: int) -> bool:
    """Whether the absorbed form takes fewer multiplications, counted per head and position."""
    (_, key_size, latent_size), value_size = parts.key_up.shape, parts.value_up.shape[2]
    absorbed = tokens * (2 * latent_size + parts.rope_size)
    expanded = tokens * (key_size + parts.rope_size + value_size)
    return absorbed <= expanded + latent_size * (key_size + value_size)


def attend(
    parts: LatentAttentionParts, q: Tensor, q_rope: Tensor, rows: Tensor, start: int
) -> Tensor:
    """Causal softmax attention: q [T, H, N]; q_rope [T, H, R]; rows [S, row of L+R values] of the
    cache, S = start + T; token t sees positions 0..start+t. Returns [T, H*V] float32."""
    # Heads first; scaled here, where it is cheapest.
    q, q_rope = q.transpose(0, 1) * parts.scale, q_rope.transpose(0, 1) * parts.scale
    form = absorbed if absorbs(parts, q.shape[1]) else expanded
    return form(parts, q, q_rope, rows, start).transpose(0, 1).flatten(1)


def absorbed(
    parts: LatentAttentionParts, q: Tensor, q_rope: Tensor, rows: Tensor, start: int
) -> Tensor:
    """Attention in the latent's space: q [H, T, N], q_rope [H, T, R] -> [H, T, V]."""
    in_latent = torch.cat((q @ parts.key_up.float(), q_rope), dim=2)
    sums = StreamingSoftmax()
    per_position = q.shape[0] * q.shape[1] + rows.shape[1]
    for begin, end in _blocks(len(rows), max(WORKING_VALUES // per_position, 1)):
        block = load_rows(rows[begin:end], parts.latent_size + parts.rope_size)
        scores = _hide_future(in_latent @ block.T, begin, start)
        sums.add(scores, block[:, : parts.latent_size])
    return sums.result() @ parts.value_up.float()


def expanded(
    parts: LatentAttentionParts, q: Tensor, q_rope: Tensor, rows: Tensor, start: int
) -> Tensor:
    """Attention over every head's own keys and values, some heads and positions at a time:
    q [H, T, N], q_rope [H, T, R] -> [H, T, V]."""
    num_heads, tokens, _ = q.shape
    size = q.shape[2] + q_rope.shape[2] + parts.value_up.shape[2]
    per_head = EXPANDED_POSITIONS * (2 * tokens + size)
    queries = torch.cat((q, q_rope), dim=2)
    outputs = []
    for first, last in _blocks(num_heads, max(WORKING_VALUES // per_head, 1)):
        sums = StreamingSoftmax()
        for begin, end in _blocks(len(rows), EXPANDED_POSITIONS):
            block = load_rows(rows[begin:end], parts.latent_size + parts.rope_size)
            keys, values = expand(parts, block, first, last)
            scores = _hide_future(queries[first:last] @ keys.transpose(1, 2), begin, start)
            sums.add(scores, values)
        outputs.append(sums.result())
    return torch.cat(outputs)


def expand(
    parts: LatentAttentionParts, rows: Tensor, first: int, last: int
) -> tuple[Tensor, Tensor]:
    """Keys [h, P, N+R] and values [h, P, V] of heads first..last-1 at the cached rows [P, L+R]."""
    latent, rotated = rows[:, : parts.latent_size], rows[:, parts.latent_size :]
    keys = latent @ parts.key_up[first:last].float().transpose(1, 2)
    shared = rotated.expand(last - first, -1, -1)
    values = latent @ parts.value_up[first:last].float()
    return torch.cat((keys, shared), dim=2), values


class StreamingSoftmax:
    """softmax(scores) @ values over positions that come in blocks (Milakov and Gimelshein 2018,
    "Online normalizer calculation for softmax"). The first block must hold a position that is seen.
    """

    def __init__(self) -> None:
        self._highest: Tensor | None = None
        self._total = self._sums = torch.empty(0)

    def add(self, scores: Tensor, values: Tensor) -> None:
        """scores [..., T, P], which are overwritten; values [..., P, V]."""
        highest = scores.amax(-1, keepdim=True)
        if self._highest is not None:
            highest = torch.maximum(highest, self._highest)
        weights = scores.sub_(highest).exp_()
        total, sums = weights.sum(-1, keepdim=True), weights @ values
        if self._highest is not None:
            kept = (self._highest - highest).exp_()
            total += self._total * kept
            sums += self._sums * kept
        self._highest, self._total, self._sums = highest, total, sums

    def result(self) -> Tensor:
        """[..., T, V]."""
        return self._sums / self._total


def _blocks(count: int, size: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, count, size):
        yield begin, min(begin + size, count)


def _hide_future(scores: Tensor, begin: int, start: int) -> Tensor:
    """scores [..., T, P] of positions begin..begin+P-1 for tokens at start..start+T-1."""
    tokens, positions = scores.shape[-2:]
    if begin + positions - 1 <= start:
        return scores
    future = torch.ones(tokens, positions, dtype=torch.bool).triu(start - begin + 1)
    return scores.masked_fill_(future, float("-inf"))
