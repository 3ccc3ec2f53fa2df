"""What a kernel backend offers to the layers: one protocol, two implementations.

`reference.py` is plain torch and defines the arithmetic; `native.py` drives the C++ module and must
return the same bits wherever the arithmetic contract (docs/arithmetic.md) speaks. Layers hold a
backend object; nothing here is global.

Shapes: T tokens, K in features, N out features, H query heads, G key/value heads, D head dim,
R rotary pairs (R <= D/2), C cache capacity, E experts of which a token goes to k. Activations are
contiguous float32.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from localr1.qtypes import QuantScheme


@dataclass(frozen=True)
class PackedWeight:
    """One quantized matrix, row-major as on disk (compressed-tensors, pack-quantized).

    packed: int32 [N, ceil(K*bits/32)], little end first, code = signed value + 2**(bits-1), or the
        index in NF4_STEPS of that value.
    scale: bfloat16, float16 or float32 [N, K/group], any sign.
    zero_point: int8 [N, K/group], signed, in the codes' signed range, or None when symmetric:
        weight = (signed value - zero_point) * scale.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: QuantScheme
    out_features: int
    in_features: int


class Weight(Protocol):
    """A matrix as a backend keeps it (reordered or not)."""

    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def scheme(self) -> QuantScheme: ...
    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class AttentionWeights:
    """Everything one self-attention block (dense K/V) needs, pre-norm to output projection.

    norm: [hidden] RMS weight. q: [H*D, hidden]; k, v: [G*D, hidden]; o: [hidden, H*D].
    *_bias: [N] float32 or None. q_norm, k_norm: [D] per-head RMS weights (Qwen3) or None.
    scale: multiplies q.k before the softmax.
    """

    norm: Tensor
    q: Weight
    k: Weight
    v: Weight
    o: Weight
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    o_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    scale: float


@dataclass(frozen=True)
class MlpWeights:
    """A gated MLP with its pre-norm: down(silu(gate(n)) * up(n)), n = rms_norm(x).

    norm: [hidden]; gate, up: [intermediate, hidden]; down: [hidden, intermediate]; biases or None.
    """

    norm: Tensor
    gate: Weight
    up: Weight
    down: Weight
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class LatentWeights:
    """Everything one block of latent attention needs (layers/mla.py), pre-norm to output
    projection. H heads, L latent, N key values without and R with a position, V values of a head.

    norm: [hidden]. q: [H*(N+R), hidden], or q_down [Q, hidden], q_norm [Q] and q [H*(N+R), Q].
    kv_down: [L+R, hidden]; kv_norm: [L]. key_up: [H, N, L]; value_up: [H, L, V], both contiguous
    and of one dtype, bfloat16, float16 or float32, widened exactly. o: [hidden, H*V]. *_bias: [N]
    float32 or None. Rotated rows lie in the "half" layout. latent_eps: of q_norm and kv_norm.
    scale: multiplies q.k before the softmax.
    """

    norm: Tensor
    q_down: Weight | None
    q_norm: Tensor | None
    q: Weight
    kv_down: Weight
    kv_norm: Tensor
    key_up: Tensor
    value_up: Tensor
    o: Weight
    q_down_bias: Tensor | None
    q_bias: Tensor | None
    kv_down_bias: Tensor | None
    o_bias: Tensor | None
    rope_size: int
    eps: float
    latent_eps: float
    scale: float

    @property
    def num_heads(self) -> int:
        return self.key_up.shape[0]

    @property
    def key_size(self) -> int:
        return self.key_up.shape[1]

    @property
    def latent_size(self) -> int:
        return self.key_up.shape[2]

    @property
    def value_size(self) -> int:
        return self.value_up.shape[2]


@dataclass(frozen=True)
class RopeTable:
    """cos, sin: float32 [positions, R], already multiplied by the variant's attention factor.

    Pairs are (i, i + R) of the first 2R values of a head ("half" layout, as Llama in transformers).
    """

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values: [G, C, row of D values] each (cache_rows.py), written to."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class PackedExpert:
    """One expert of a mixture as on disk. gate, up: [inner, hidden]; down: [hidden, inner]."""

    gate: PackedWeight
    up: PackedWeight
    down: PackedWeight


class ExpertBank(Protocol):
    """The experts of one layer as a backend keeps them."""

    @property
    def num_experts(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


class Scoring(Enum):
    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


class GroupScore(Enum):
    """How a group is judged: by its best expert, or by the sum of its best two."""

    BEST = 1
    BEST_TWO = 2


@dataclass(frozen=True)
class RouterRule:
    """num_experts experts in num_groups equal groups; experts_per_token chosen from the best
    groups_per_token groups. normalized: the weights are divided by their sum plus epsilon. scale:
    multiplies the weights at the end."""

    num_experts: int
    experts_per_token: int
    scoring: Scoring
    normalized: bool
    num_groups: int = 1
    groups_per_token: int = 1
    group_score: GroupScore = GroupScore.BEST
    epsilon: float = 0.0
    scale: float = 1.0

    @property
    def numbers(self) -> tuple[int, int, int, int, int, bool, bool, float, float]:
        """In the order of `RouterRule` in cuda/, on the CPU as on the GPU."""
        return (
            self.num_experts,
            self.experts_per_token,
            self.num_groups,
            self.groups_per_token,
            self.group_score.value,
            self.scoring is Scoring.SOFTMAX,
            self.normalized,
            self.epsilon,
            self.scale,
        )


@dataclass(frozen=True)
class Routing:
    """experts: int64 [T, k], the one chosen first in column 0; weights: float32 [T, k]. Outputs are
    summed in this order, wherever they were computed."""

    experts: Tensor
    weights: Tensor


class Kernels(Protocol):
    """The operations. Every tensor argument is CPU and contiguous; results are new unless said."""

    name: str
    splits_freely: bool
    """Whether attention gives a token the same bits however its prompt was cut into calls."""
    numbers_of_bits: Collection[int]
    """Of the schemes that matrices are to be prepared in, 8 among them."""

    def prepare(self, weight: PackedWeight) -> Weight:
        """Put a matrix in this backend's layout. Raises KernelError on shapes it cannot hold."""
        ...

    def prepare_experts(self, experts: Iterable[PackedExpert], count: int) -> ExpertBank:
        """Put `count` experts in this backend's layout, each before the next is asked for, so that
        no two copies of a layer are held. They must be alike in sizes, schemes and scale dtypes.
        Raises KernelError where they are not and MemoryLimitError where they do not fit."""
        ...

    def bind_attention(self, weights: AttentionWeights) -> object:
        """Resolve a block's weights once; the result is passed to `attention_block`."""
        ...

    def bind_mlp(self, weights: MlpWeights) -> object: ...

    def bind_latent(self, weights: LatentWeights) -> object:
        """Resolve a block's weights once; the result is passed to `latent_block`."""
        ...

    def quantize_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, K] float32 -> (q int8 [T, K], scale float32 [T, K/32]); K divides by 32."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, hidden], weight [hidden] -> [T, hidden]."""
        ...

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [T, K] -> [T, N]: quantize activations, then the contract's sum; bias added last."""
        ...

    def linear_add(self, x: Tensor, weight: Weight, bias: Tensor | None, residual: Tensor) -> None:
        """residual [T, N] += linear(x), in place."""
        ...

    def norm_linear(
        self,
        x: Tensor,
        norm: Tensor,
        eps: float,
        weights: tuple[Weight, ...],
        biases: tuple[Tensor | None, ...],
    ) -> Tensor:
        """RMS norm and activation quantization once, then several matrices: [T, sum of N]."""
        ...

    def gate_up_silu(self, x: Tensor, gate: Weight, up: Weight) -> Tensor:
        """silu(gate(x)) * up(x): x [T, K] -> [T, N], with the contract's polynomial exp."""
        ...

    def embedding(self, ids: Tensor, weight: Weight) -> Tensor:
        """ids int64 [T] -> rows dequantized to float32 [T, K], exact: (code - zero) * scale."""
        ...

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
        """Split qkv [T, (H+2G)*D], norm q and k per head where asked, rotate by positions
        start..start+T-1, append k and v to the cache at those positions; returns q [T, H, D]."""
        ...

    def attention(self, q: Tensor, cache: LayerCache, start: int, scale: float) -> Tensor:
        """Causal: q [T, H, D], token t sees positions 0..start+t of the cache -> [T, H*D]."""
        ...

    def attention_block(
        self, x: Tensor, block: object, rope: RopeTable, cache: LayerCache, start: int
    ) -> None:
        """x [T, hidden] += o(attention(rope(qkv(norm(x))))), in place, in one call."""
        ...

    def mlp_block(self, x: Tensor, block: object) -> None:
        """x [T, hidden] += mlp(norm(x)), in place, in one call."""
        ...

    def latent_block(
        self, x: Tensor, block: object, rope: RopeTable, cache: Tensor, start: int
    ) -> None:
        """x [T, hidden] += o(attention in absorbed form), in place, in one call. The cache
        [C, row of L+R values] gains positions start..start+T-1. Takes about 2 * T*H*(L+R)
        values of temporary memory."""
        ...

    def route(self, x: Tensor, weight: Tensor, bias: Tensor | None, rule: RouterRule) -> Routing:
        """x [T, K], normed; weight float32 [E, K], bias [E] or None, which moves the choice but not
        the weights. Equal scores: the lower expert comes first; NaN comes before all."""
        ...

    def mix_experts(
        self, x: Tensor, routing: Routing, experts: ExpertBank, residual: Tensor
    ) -> None:
        """residual [T, K] += w_0 * y_0 + w_1 * y_1 + ... in place, for the experts of each token in
        the routing's order; y = down(silu(gate(x)) * up(x)), x [T, K]."""
        ...

    def expert_outputs(
        self, x: Tensor, chosen: Tensor, experts: ExpertBank, outputs: Tensor
    ) -> None:
        """outputs [T, k, K] of the experts chosen int64 [T, k], unweighted; a negative choice is
        computed elsewhere, and its outputs stay as they are."""
        ...

    def combine_experts(self, outputs: Tensor, weights: Tensor, residual: Tensor) -> None:
        """residual [T, K] += the sum of outputs [T, k, K] times weights [T, k], from the first on:
        what mix_experts ends with, for outputs that were computed in parts."""
        ...


def check_activations(x: Tensor, features: int, operation: str) -> None:
    """Raise KernelError unless x is contiguous float32 [T, features] on the CPU."""
    from localr1.errors import KernelError

    if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != features or not x.is_contiguous():
        raise KernelError(
            operation,
            expected=f"contiguous float32 [tokens, {features}]",
            found=f"{'' if x.is_contiguous() else 'strided '}{x.dtype} {list(x.shape)}",
        )
