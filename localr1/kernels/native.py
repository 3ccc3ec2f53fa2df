"""The native CPU kernels: `Kernels` on top of the C++ module, one pool of threads for each object.

Everything under the arithmetic contract (docs/arithmetic.md) returns the bits of `reference.py`, on
every instruction set and with any number of threads; attention agrees within a tolerance and is the
same for any number of threads and any split of a prompt into chunks.
"""

import os
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence

import psutil
import torch
from torch import Tensor

from localr1.cgroup import cpu_quota
from localr1.errors import KernelError
from localr1.kernels import native_experts, native_latent
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
from localr1.kernels.cache_rows import DTYPES as CACHE_DTYPES
from localr1.kernels.checks import (
    check_attention,
    check_block,
    check_cache,
    check_ids,
    check_packed,
    check_rope,
    check_rope_table,
    check_same_inputs,
    check_vector,
)
from localr1.kernels.host_mixtures import HostMixtures
from localr1.kernels.native_experts import ExpertForm, NativeExperts
from localr1.kernels.native_latent import Latent
from localr1.kernels.native_weight import (
    SCALE_TYPES,
    NativeWeight,
    Pinned,
    _native,
    address,
    matrix,
)
from localr1.qtypes import ACTIVATION_GROUP, SUPPORTED_BITS

MAX_HEAD_DIM = 256
HEAD_DIM_STEP = 8


def available_isas() -> list[str]:
    """Instruction sets this processor can run, best first: of avx512vnni, avx2, generic."""
    return list(_native.available_isas())


def default_threads() -> int:
    """Physical cores, but no more than the processors this process may run on, nor than a container
    gives it the time of."""
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    try:
        allowed = len(psutil.Process().cpu_affinity() or [])
    except AttributeError:  # macOS has no affinity
        allowed = physical
    quota = cpu_quota()
    in_time = physical if quota is None else int(quota)
    return max(1, min(physical, allowed or physical, in_time))


class _Attention:
    """A bound attention block. Remembers the rope table and cache it saw last, whose checks cost
    more than the call itself; weakly, so that a cache can be freed."""

    def __init__(self, bound: _native.BoundAttention, weights: AttentionWeights) -> None:
        self.bound = bound
        self.weights = weights  # keeps the vectors alive
        self.hidden = weights.norm.shape[0]
        self._rope: weakref.ref[RopeTable] | None = None
        self._cache: weakref.ref[LayerCache] | None = None
        self._rope_view: tuple[int, int, int, int] = (0, 0, 0, 0)
        self._cache_view: tuple[int, int, int, int] = (0, 0, 0, 0)

    def rope_view(self, rope: RopeTable, end: int) -> tuple[int, int, int, int]:
        if self._rope is None or self._rope() is not rope or self._rope_view[2] < end:
            check_rope_table(rope, self.weights.head_dim, end)
            self._rope_view = _rope_view(rope)
            self._rope = weakref.ref(rope)
        return self._rope_view

    def cache_view(self, cache: LayerCache, end: int) -> tuple[int, int, int, int]:
        if self._cache is None or self._cache() is not cache or self._cache_view[2] < end:
            check_cache(cache, self.weights.head_dim, end, "attention_block")
            if cache.k.shape[0] != self.weights.num_kv_heads:
                raise KernelError(
                    "attention_block: cache heads",
                    expected=self.weights.num_kv_heads,
                    found=cache.k.shape[0],
                )
            self._cache_view = _cache_view(cache)
            self._cache = weakref.ref(cache)
        return self._cache_view


class _Mlp:
    def __init__(self, bound: _native.BoundMlp, weights: MlpWeights) -> None:
        self.bound = bound
        self.weights = weights  # keeps the vectors alive
        self.hidden = weights.norm.shape[0]


def _rope_view(rope: RopeTable) -> tuple[int, int, int, int]:
    return rope.cos.data_ptr(), rope.sin.data_ptr(), rope.cos.shape[0], rope.cos.shape[1]


def _cache_view(cache: LayerCache) -> tuple[int, int, int, int]:
    kind = CACHE_DTYPES.index(cache.k.dtype)
    return cache.k.data_ptr(), cache.v.data_ptr(), cache.k.shape[1], kind


def _check_head_dim(head_dim: int) -> None:
    if head_dim % HEAD_DIM_STEP or not HEAD_DIM_STEP <= head_dim <= MAX_HEAD_DIM:
        raise KernelError(
            "head dim",
            expected=f"a multiple of {HEAD_DIM_STEP} up to {MAX_HEAD_DIM}",
            found=head_dim,
        )


class NativeKernels:
    """Implements `localr1.kernels.api.Kernels`; its docstrings give shapes and units.

    threads: 1..1024, None for the physical cores. isa: one of available_isas(), None for the best.
    numbers_of_bits: fewer than these kernels can, where what they prepare goes to a card. Weights
    must be prepared by an object of the same instruction set. Calls may come from several Python
    threads; they run one after the other.
    """

    name = "native"
    splits_freely = True

    def __init__(
        self,
        threads: int | None = None,
        isa: str | None = None,
        numbers_of_bits: Collection[int] = SUPPORTED_BITS,
    ) -> None:
        self.numbers_of_bits: Collection[int] = numbers_of_bits
        try:
            self._native = _native.Kernels(isa or "", threads or default_threads())
        except _native.RefusedError as error:
            raise KernelError(str(error)) from None
        self.threads = int(self._native.threads)
        self.isa = str(self._native.isa)
        self.rows_per_block = int(self._native.rows_per_block)

    def prepare(self, weight: PackedWeight) -> NativeWeight:
        check_packed(weight)
        pinned = Pinned(weight)
        prepared = self._native.prepare(
            *pinned.addresses,
            weight.out_features,
            weight.in_features,
            weight.scheme.code_type,
            weight.scheme.group_size,
            SCALE_TYPES[weight.scale.dtype],
        )
        return NativeWeight(prepared, weight.out_features, weight.in_features, weight.scheme)

    def prepare_experts(self, experts: Iterable[PackedExpert], count: int) -> NativeExperts:
        return native_experts.prepare_experts(self._native, experts, count)

    def bind_attention(self, weights: AttentionWeights) -> _Attention:
        check_block(weights)
        _check_head_dim(weights.head_dim)
        w = weights
        bound = self._native.bind_attention(
            w.norm.data_ptr(),
            [matrix(m) for m in (w.q, w.k, w.v, w.o)],
            [address(b) for b in (w.q_bias, w.k_bias, w.v_bias, w.o_bias)],
            address(w.q_norm),
            address(w.k_norm),
            (w.num_heads, w.num_kv_heads, w.head_dim),
            w.eps,
            w.scale,
        )
        return _Attention(bound, weights)

    def bind_mlp(self, weights: MlpWeights) -> _Mlp:
        check_block(weights)
        w = weights
        bound = self._native.bind_mlp(
            w.norm.data_ptr(),
            [matrix(m) for m in (w.gate, w.up, w.down)],
            [address(b) for b in (w.gate_bias, w.up_bias, w.down_bias)],
            w.eps,
        )
        return _Mlp(bound, weights)

    def bind_latent(self, weights: LatentWeights) -> Latent:
        return native_latent.bind_latent(self._native, weights)

    def quantize_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        columns = -(-x.shape[-1] // ACTIVATION_GROUP) * ACTIVATION_GROUP
        check_activations(x, columns, "quantize_activations")
        q = torch.empty(x.shape, dtype=torch.int8)
        scale = torch.empty(x.shape[0], columns // ACTIVATION_GROUP)
        if x.shape[0]:
            self._native.quantize(x.data_ptr(), x.shape[0], columns, q.data_ptr(), scale.data_ptr())
        return q, scale

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        check_activations(x, weight.shape[0], "rms_norm")
        check_vector(weight, x.shape[1], "rms_norm: weight")
        y = torch.empty_like(x)
        if x.shape[0]:
            self._native.rms_norm(
                x.data_ptr(), weight.data_ptr(), eps, x.shape[0], x.shape[1], y.data_ptr()
            )
        return y

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        return self._linear(x, None, 0.0, (weight,), (bias,), "linear")

    def norm_linear(
        self,
        x: Tensor,
        norm: Tensor,
        eps: float,
        weights: tuple[Weight, ...],
        biases: tuple[Tensor | None, ...],
    ) -> Tensor:
        check_vector(norm, x.shape[-1], "norm_linear: norm")
        return self._linear(x, norm, eps, weights, biases, "norm_linear")

    def _linear(
        self,
        x: Tensor,
        norm: Tensor | None,
        eps: float,
        weights: Sequence[Weight],
        biases: Sequence[Tensor | None],
        operation: str,
    ) -> Tensor:
        check_same_inputs(weights, biases, operation)
        columns = weights[0].in_features
        check_activations(x, columns, operation)
        out = torch.empty(x.shape[0], sum(weight.out_features for weight in weights))
        if x.shape[0]:
            self._native.linear(
                x.data_ptr(),
                x.shape[0],
                columns,
                address(norm),
                eps,
                [matrix(weight) for weight in weights],
                [address(bias) for bias in biases],
                out.data_ptr(),
            )
        return out

    def linear_add(self, x: Tensor, weight: Weight, bias: Tensor | None, residual: Tensor) -> None:
        check_activations(x, weight.in_features, "linear_add")
        check_activations(residual, weight.out_features, "linear_add: residual")
        check_vector(bias, weight.out_features, "linear_add: bias")
        if residual.shape[0] != x.shape[0]:
            raise KernelError(
                "linear_add: residual", expected=f"{x.shape[0]} tokens", found=residual.shape[0]
            )
        if x.shape[0]:
            self._native.linear_add(
                x.data_ptr(),
                x.shape[0],
                weight.in_features,
                matrix(weight),
                address(bias),
                residual.data_ptr(),
            )

    def gate_up_silu(self, x: Tensor, gate: Weight, up: Weight) -> Tensor:
        check_activations(x, gate.in_features, "gate_up_silu")
        if (gate.out_features, gate.in_features) != (up.out_features, up.in_features):
            raise KernelError(
                "gate_up_silu",
                expected=f"up [{gate.out_features}, {gate.in_features}]",
                found=f"[{up.out_features}, {up.in_features}]",
            )
        out = torch.empty(x.shape[0], gate.out_features)
        if x.shape[0]:
            self._native.gate_up(
                x.data_ptr(),
                x.shape[0],
                gate.in_features,
                matrix(gate),
                matrix(up),
                out.data_ptr(),
            )
        return out

    def embedding(self, ids: Tensor, weight: Weight) -> Tensor:
        check_ids(ids, weight.out_features)
        out = torch.empty(ids.shape[0], weight.in_features)
        if ids.shape[0]:
            self._native.embedding(ids.data_ptr(), ids.shape[0], matrix(weight), out.data_ptr())
        return out

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
        num_kv_heads = cache.k.shape[0]
        head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
        _check_head_dim(head_dim)
        q = torch.empty(qkv.shape[0], num_heads, head_dim)
        if qkv.shape[0]:
            self._native.rope_append(
                qkv.data_ptr(),
                qkv.shape[0],
                (num_heads, num_kv_heads, head_dim),
                address(q_norm),
                address(k_norm),
                eps,
                _rope_view(rope),
                _cache_view(cache),
                start,
                q.data_ptr(),
            )
        return q

    def attention(self, q: Tensor, cache: LayerCache, start: int, scale: float) -> Tensor:
        check_attention(q, cache, start)
        num_tokens, num_heads, head_dim = q.shape
        _check_head_dim(head_dim)
        out = torch.empty(num_tokens, num_heads * head_dim)
        if num_tokens:
            self._native.attention(
                q.data_ptr(),
                num_tokens,
                (num_heads, cache.k.shape[0], head_dim),
                _cache_view(cache),
                start,
                scale,
                out.data_ptr(),
            )
        return out

    def attention_block(
        self, x: Tensor, block: object, rope: RopeTable, cache: LayerCache, start: int
    ) -> None:
        assert isinstance(block, _Attention)
        check_activations(x, block.hidden, "attention_block")
        num_tokens = x.shape[0]
        end = start + num_tokens
        rope_view, cache_view = block.rope_view(rope, end), block.cache_view(cache, end)
        if start < 0:
            raise KernelError("attention_block: start", expected=">= 0", found=start)
        if num_tokens:
            self._native.attention_block(
                x.data_ptr(), num_tokens, block.bound, rope_view, cache_view, start
            )

    def mlp_block(self, x: Tensor, block: object) -> None:
        assert isinstance(block, _Mlp)
        check_activations(x, block.hidden, "mlp_block")
        if x.shape[0]:
            self._native.mlp_block(x.data_ptr(), x.shape[0], block.bound)

    def latent_block(
        self, x: Tensor, block: object, rope: RopeTable, cache: Tensor, start: int
    ) -> None:
        assert isinstance(block, Latent)
        native_latent.latent_block(self._native, x, block, rope, cache, start)

    def route(self, x: Tensor, weight: Tensor, bias: Tensor | None, rule: RouterRule) -> Routing:
        return native_experts.route(self._native, x, weight, bias, rule)

    def mix_experts(
        self, x: Tensor, routing: Routing, experts: ExpertBank, residual: Tensor
    ) -> None:
        assert isinstance(experts, NativeExperts)
        native_experts.mix_experts(self._native, x, routing, experts, residual)

    def expert_outputs(
        self, x: Tensor, chosen: Tensor, experts: ExpertBank, outputs: Tensor
    ) -> None:
        assert isinstance(experts, NativeExperts)
        native_experts.expert_outputs(self._native, x, chosen, experts, outputs)

    def combine_experts(self, outputs: Tensor, weights: Tensor, residual: Tensor) -> None:
        native_experts.combine_experts(self._native, outputs, weights, residual)

    def host_mixtures(self, python: Callable[[int], None]) -> HostMixtures:
        """By these kernels, which other calls may use at the same time: one waits for the other."""
        return HostMixtures(self._native, python)

    def expert_layout(self, form: ExpertForm) -> _native.ExpertLayout:
        """Where the matrices of an expert of this form lie in a slot, and how many bytes it takes.
        Raises KernelError for sizes that these kernels cannot hold."""
        return native_experts.expert_layout(self._native, form)

    def place_expert(
        self,
        layout: _native.ExpertLayout,
        arena: _native.SlotArena,
        slot: int,
        expert: PackedExpert,
    ) -> None:
        """Reorder an expert into a slot. Many threads may do so at once, beside any other call."""
        native_experts.place_expert(self._native, layout, arena, slot, expert)

    def place_expert_at(
        self,
        layout: _native.ExpertLayout,
        arena: _native.SlotArena,
        slot: int,
        matrices: list[tuple[int, int, int]],
    ) -> None:
        """`place_expert` from addresses, of codes, scales and zero points (0 for none) of gate, up
        and down, which the caller knows to hold what the layout says."""
        self._native.place_expert(layout, arena, slot, matrices)
