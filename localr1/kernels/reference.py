"""The kernels in plain torch float32: the definition the native and GPU code must equal.

Every rounding is visible here: one torch operation is one IEEE rounding, and reductions whose order
matters are written out (docs/arithmetic.md). Only attention is left to torch's own summation order
and compared with a tolerance. Slow on purpose; use `native.py` to run a model.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from localr1.errors import KernelError
from localr1.kernels import mixture
from localr1.kernels.api import (
    AttentionWeights,
    ExpertBank,
    LatentWeights,
    LayerCache,
    MlpWeights,
    PackedExpert,
    PackedWeight,
    RopeTable,
    RouterRule,
    Routing,
    Weight,
    check_activations,
)
from localr1.kernels.cache_rows import load_rows, store_rows
from localr1.kernels.checks import (
    check_attention,
    check_block,
    check_combining,
    check_experts,
    check_ids,
    check_latent,
    check_latent_cache,
    check_mixing,
    check_outputs,
    check_packed,
    check_rope,
    check_rope_table,
    check_routing,
    check_same_inputs,
    check_vector,
)
from localr1.kernels.codes import unpack_values
from localr1.kernels.rowwise import rms_norm, silu
from localr1.qtypes import ACTIVATION_GROUP, SUPPORTED_BITS, QuantScheme

NUM_PHASES = 8
"""Phase accumulators of one output; group g is added to accumulator g mod 8."""


@dataclass(frozen=True)
class ReferenceWeight:
    """values int8 [N, K], zero int8 [N, K/group] or None, scale float32 [N, K/group]."""

    values: Tensor
    zero: Tensor | None
    scale: Tensor
    scheme: QuantScheme

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    @property
    def in_features(self) -> int:
        return self.values.shape[1]

    @property
    def nbytes(self) -> int:
        zero = 0 if self.zero is None else self.zero.nbytes
        return self.values.nbytes + self.scale.nbytes + zero

    def integers(self, group: slice) -> Tensor:
        """(code - zero) as float32 [groups of 32, 32, N] for a range of activation groups."""
        columns = slice(group.start * ACTIVATION_GROUP, group.stop * ACTIVATION_GROUP)
        values = self.values[:, columns].float().view(self.out_features, -1, ACTIVATION_GROUP)
        if self.zero is not None:
            values = values - self.per_activation_group(self.zero)[:, group, None].float()
        return values.permute(1, 2, 0)

    def per_activation_group(self, value: Tensor) -> Tensor:
        """[N, K/group] -> [N, K/32]: a group of 64 or 128 counts as 2 or 4 groups."""
        return value.repeat_interleave(self.scheme.group_size // ACTIVATION_GROUP, dim=1)


@dataclass(frozen=True)
class ReferenceExperts:
    """gate, up and down of every expert."""

    matrices: tuple[tuple[ReferenceWeight, ReferenceWeight, ReferenceWeight], ...]

    @property
    def num_experts(self) -> int:
        return len(self.matrices)

    @property
    def hidden_size(self) -> int:
        return self.matrices[0][0].in_features

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for expert in self.matrices for matrix in expert)


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = x.view(x.shape[0], -1, ACTIVATION_GROUP)
    absmax = groups.abs().amax(dim=2)
    # torch.div of two tensors: a Python number divided by a tensor is a reciprocal and a product.
    inverse = torch.div(torch.tensor(127.0), absmax)
    # 127/absmax is infinite for zero and for groups below 4e-37, NaN or 0 for groups holding NaN or
    # Inf: those integers are 0, and the scale carries the NaN or Inf on into the product.
    usable = (inverse > 0.0) & (inverse < torch.inf)
    inverse = torch.where(usable, inverse, 0.0)
    q = torch.round(torch.where(usable[..., None], groups, 0.0) * inverse[..., None])
    return q.to(torch.int8).flatten(1), absmax / 127.0


def _product(q: Tensor, scale: Tensor, weight: ReferenceWeight) -> Tensor:
    """The contract's sum. q int8 [T, K], scale [T, K/32] -> float32 [T, N].

    A float32 product of the integers is exact: no partial sum reaches 32 * 255 * 127 < 2^24.
    """
    num_tokens, num_groups = scale.shape
    groups = q.float().view(num_tokens, num_groups, ACTIVATION_GROUP).transpose(0, 1)
    weight_scale = weight.per_activation_group(weight.scale)
    phases = torch.zeros(NUM_PHASES, num_tokens, weight.out_features)
    for first in range(0, num_groups, NUM_PHASES):
        part = slice(first, min(first + NUM_PHASES, num_groups))
        sums = torch.bmm(groups[part], weight.integers(part))
        scales = weight_scale[:, part].T[:, None, :] * scale[:, part].T[:, :, None]
        phases[: part.stop - part.start] += sums * scales
    a = phases
    return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]))


def _with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D]; cos, sin [T, R]: rotate the pairs (i, i + R), leave the rest."""
    pairs = cos.shape[1]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class ReferenceKernels:
    """Implements `localr1.kernels.api.Kernels`."""

    name = "reference"
    splits_freely = False  # torch's attention depends on its sizes.
    numbers_of_bits: Collection[int] = SUPPORTED_BITS

    def prepare(self, weight: PackedWeight) -> ReferenceWeight:
        check_packed(weight)
        scheme = weight.scheme
        values = unpack_values(weight.packed, scheme, weight.in_features)
        return ReferenceWeight(values, weight.zero_point, weight.scale.float(), scheme)

    def prepare_experts(self, experts: Iterable[PackedExpert], count: int) -> ReferenceExperts:
        return ReferenceExperts(
            tuple(
                (self.prepare(expert.gate), self.prepare(expert.up), self.prepare(expert.down))
                for expert in check_experts(experts, count)
            )
        )

    def bind_attention(self, weights: AttentionWeights) -> AttentionWeights:
        check_block(weights)
        return weights

    def bind_mlp(self, weights: MlpWeights) -> MlpWeights:
        check_block(weights)
        return weights

    def bind_latent(self, weights: LatentWeights) -> LatentWeights:
        check_latent(weights)
        return weights

    def quantize_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_activations(x, -(-x.shape[-1] // 32) * 32, "quantize_activations")
        return _quantize(x)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        check_activations(x, weight.shape[0], "rms_norm")
        return rms_norm(x, weight, eps)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        assert isinstance(weight, ReferenceWeight)
        check_activations(x, weight.in_features, "linear")
        check_vector(bias, weight.out_features, "linear: bias")
        return _with_bias(_product(*_quantize(x), weight), bias)

    def linear_add(self, x: Tensor, weight: Weight, bias: Tensor | None, residual: Tensor) -> None:
        check_activations(residual, weight.out_features, "linear_add: residual")
        residual += self.linear(x, weight, bias)

    def norm_linear(
        self,
        x: Tensor,
        norm: Tensor,
        eps: float,
        weights: tuple[Weight, ...],
        biases: tuple[Tensor | None, ...],
    ) -> Tensor:
        check_same_inputs(weights, biases, "norm_linear")
        normed = self.rms_norm(x, norm, eps)
        parts = [self.linear(normed, w, b) for w, b in zip(weights, biases, strict=True)]
        return torch.cat(parts, dim=1)

    def gate_up_silu(self, x: Tensor, gate: Weight, up: Weight) -> Tensor:
        return silu(self.linear(x, gate)) * self.linear(x, up)

    def embedding(self, ids: Tensor, weight: Weight) -> Tensor:
        assert isinstance(weight, ReferenceWeight)
        check_ids(ids, weight.out_features)
        rows = weight.values[ids].float().view(ids.shape[0], -1, weight.scheme.group_size)
        if weight.zero is not None:
            rows = rows - weight.zero[ids].float()[..., None]
        return (rows * weight.scale[ids][..., None]).flatten(1)

    def rope_append(
        self,
        qkv: Tensor,
        num_heads: int,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        rope: RopeTable,
        cache: LayerCache,
        start: int,
    ) -> Tensor:
        check_rope(qkv, num_heads, q_norm, k_norm, rope, cache, start)
        num_tokens, num_kv_heads = qkv.shape[0], cache.k.shape[0]
        head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
        heads = qkv.view(num_tokens, -1, head_dim)
        q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        if q_norm is not None:
            q = rms_norm(q, q_norm, eps)
        if k_norm is not None:
            k = rms_norm(k, k_norm, eps)
        positions = slice(start, start + num_tokens)
        cos, sin = rope.cos[positions], rope.sin[positions]
        store_rows(cache.k[:, positions], _rotate(k, cos, sin).transpose(0, 1))
        store_rows(cache.v[:, positions], v.transpose(0, 1))
        return _rotate(q, cos, sin)

    def attention(self, q: Tensor, cache: LayerCache, start: int, scale: float) -> Tensor:
        check_attention(q, cache, start)
        num_tokens, num_heads, head_dim = q.shape
        end = start + num_tokens
        repeats = num_heads // cache.k.shape[0]
        k = load_rows(cache.k[:, :end], head_dim).repeat_interleave(repeats, dim=0)
        v = load_rows(cache.v[:, :end], head_dim).repeat_interleave(repeats, dim=0)
        scores = (q.transpose(0, 1) @ k.transpose(1, 2)) * scale
        hidden = torch.arange(end)[None, :] > torch.arange(start, end)[:, None]
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
        return (weights @ v).transpose(0, 1).flatten(1)

    def attention_block(
        self, x: Tensor, block: object, rope: RopeTable, cache: LayerCache, start: int
    ) -> None:
        assert isinstance(block, AttentionWeights)
        w = block
        biases = (w.q_bias, w.k_bias, w.v_bias)
        qkv = self.norm_linear(x, w.norm, w.eps, (w.q, w.k, w.v), biases)
        q = self.rope_append(qkv, w.num_heads, w.q_norm, w.k_norm, w.eps, rope, cache, start)
        self.linear_add(self.attention(q, cache, start, w.scale), w.o, w.o_bias, x)

    def mlp_block(self, x: Tensor, block: object) -> None:
        assert isinstance(block, MlpWeights)
        w = block
        normed = self.rms_norm(x, w.norm, w.eps)
        gate, up = self.linear(normed, w.gate, w.gate_bias), self.linear(normed, w.up, w.up_bias)
        self.linear_add(silu(gate) * up, w.down, w.down_bias, x)

    def latent_block(
        self, x: Tensor, block: object, rope: RopeTable, cache: Tensor, start: int
    ) -> None:
        assert isinstance(block, LatentWeights)
        w, num_tokens = block, x.shape[0]
        end = start + num_tokens
        check_activations(x, w.norm.shape[0], "latent_block")
        check_latent_cache(cache, w.latent_size + w.rope_size, start, num_tokens)
        check_rope_table(rope, w.rope_size, end)
        first, bias = (w.q, w.q_bias) if w.q_down is None else (w.q_down, w.q_down_bias)
        both = self.norm_linear(x, w.norm, w.eps, (w.kv_down, first), (w.kv_down_bias, bias))
        down, q = both[:, : w.kv_down.out_features], both[:, w.kv_down.out_features :]
        if w.q_norm is not None:
            q = self.linear(rms_norm(q, w.q_norm, w.latent_eps), w.q, w.q_bias)
        cos, sin = rope.cos[start:end], rope.sin[start:end]
        key = _rotate(down[:, None, w.latent_size :], cos, sin)[:, 0]
        latent = rms_norm(down[:, : w.latent_size], w.kv_norm, w.latent_eps)
        store_rows(cache[start:end], torch.cat((latent, key), dim=1))
        q = q.reshape(num_tokens, w.num_heads, -1)
        rotated = _rotate(q[..., w.key_size :], cos, sin)
        q_latent = torch.einsum("thn,hnl->thl", q[..., : w.key_size], w.key_up.float())
        rows = load_rows(cache[:end], w.latent_size + w.rope_size)
        scores = (torch.cat((q_latent, rotated), dim=2) * w.scale) @ rows.T
        hidden = torch.arange(end)[None, :] > torch.arange(start, end)[:, None]
        weights = torch.softmax(scores.masked_fill(hidden[:, None], -torch.inf), dim=-1)
        latents = weights @ rows[:, : w.latent_size]
        out = torch.einsum("thl,hlv->thv", latents, w.value_up.float())
        self.linear_add(out.flatten(1), w.o, w.o_bias, x)

    def route(self, x: Tensor, weight: Tensor, bias: Tensor | None, rule: RouterRule) -> Routing:
        check_routing(x, weight, bias, rule)
        return mixture.route(x, weight, bias, rule)

    def mix_experts(
        self, x: Tensor, routing: Routing, experts: ExpertBank, residual: Tensor
    ) -> None:
        check_mixing(x, routing, experts, residual)
        wrong = (routing.experts < 0) | (routing.experts >= experts.num_experts)
        if wrong.any():
            raise KernelError(
                "mix_experts: expert: below",
                expected=experts.num_experts,
                found=int(routing.experts[wrong][0]),
            )
        outputs = x.new_empty(*routing.experts.shape, experts.hidden_size)
        self.expert_outputs(x, routing.experts, experts, outputs)
        self.combine_experts(outputs, routing.weights, residual)

    def expert_outputs(
        self, x: Tensor, chosen: Tensor, experts: ExpertBank, outputs: Tensor
    ) -> None:
        assert isinstance(experts, ReferenceExperts)
        check_outputs(x, chosen, experts, outputs)
        flat = outputs.view(-1, experts.hidden_size)
        for expert, pairs in mixture.pairs_by_expert(chosen):
            gate, up, down = experts.matrices[expert]
            tokens = x[pairs // chosen.shape[1]]
            flat[pairs] = self.linear(self.gate_up_silu(tokens, gate, up), down)

    def combine_experts(self, outputs: Tensor, weights: Tensor, residual: Tensor) -> None:
        check_combining(outputs, weights, residual)
        if len(outputs):
            residual += mixture.combine(outputs.flatten(0, 1), weights)
