"""Argument checks shared by the kernel backends: shapes, dtypes and limits, quoted in the error."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from localr1.errors import KernelError
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
    check_activations,
)
from localr1.kernels.api import Weight as KernelWeight
from localr1.kernels.cache_rows import DTYPES as CACHE_DTYPES
from localr1.kernels.cache_rows import row_width
from localr1.qtypes import ACTIVATION_GROUP

SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def describe(tensor: Tensor) -> str:
    strided = "" if tensor.is_contiguous() else "strided "
    return f"{strided}{tensor.dtype} {list(tensor.shape)}"


def check_packed(weight: PackedWeight) -> None:
    """Raise KernelError unless the tensors are what PackedWeight's docstring says."""
    scheme, rows, columns = weight.scheme, weight.out_features, weight.in_features
    if rows < 1 or columns < 1 or columns % scheme.group_size or columns % ACTIVATION_GROUP:
        raise KernelError(
            "packed weight",
            expected=f"rows >= 1 and in features divisible by the group of {scheme.group_size}",
            found=f"[{rows}, {columns}]",
        )
    groups = [rows, columns // scheme.group_size]
    words = [rows, scheme.packed_words(columns)]
    if weight.packed.dtype != torch.int32 or list(weight.packed.shape) != words:
        raise KernelError(
            "packed weight codes", expected=f"torch.int32 {words}", found=describe(weight.packed)
        )
    if weight.scale.dtype not in SCALE_DTYPES or list(weight.scale.shape) != groups:
        raise KernelError(
            "packed weight scale", expected=f"a float tensor {groups}", found=describe(weight.scale)
        )
    zero = weight.zero_point
    if (zero is None) != scheme.symmetric:
        raise KernelError(
            "packed weight zero point",
            expected="none" if scheme.symmetric else f"torch.int8 {groups}",
            found="none" if zero is None else describe(zero),
        )
    if zero is not None:
        if zero.dtype != torch.int8 or list(zero.shape) != groups:
            raise KernelError(
                "packed weight zero point", expected=f"torch.int8 {groups}", found=describe(zero)
            )
        low, high = int(zero.min()), int(zero.max())
        if low < scheme.code_min or high > scheme.code_max:
            raise KernelError(
                "packed weight zero point",
                expected=f"values in {scheme.code_min}..{scheme.code_max}",
                found=f"{low}..{high}",
            )


def check_vector(value: Tensor | None, size: int, what: str) -> None:
    """Raise KernelError unless value is None or contiguous float32 [size] on the CPU."""
    if value is None:
        return
    if (
        value.dtype != torch.float32
        or list(value.shape) != [size]
        or not value.is_contiguous()
        or value.device.type != "cpu"
    ):
        raise KernelError(what, expected=f"contiguous float32 [{size}]", found=describe(value))


def check_same_inputs(
    weights: Sequence[KernelWeight], biases: Sequence[Tensor | None], what: str
) -> None:
    features = [weight.in_features for weight in weights]
    if not weights or len(biases) != len(weights) or len(set(features)) != 1:
        raise KernelError(
            what,
            expected="matrices with the same in features, and one bias or None for each",
            found=f"in features {features}, {len(biases)} biases",
        )
    for weight, bias in zip(weights, biases, strict=True):
        check_vector(bias, weight.out_features, f"{what}: bias")


def check_ids(ids: Tensor, num_rows: int) -> None:
    """Raise KernelError unless ids is contiguous int64 [T] with values in 0..num_rows-1."""
    if ids.dtype != torch.int64 or ids.dim() != 1 or not ids.is_contiguous():
        raise KernelError("embedding: ids", expected="contiguous int64 [T]", found=describe(ids))
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= num_rows):
        raise KernelError(
            "embedding: ids",
            expected=f"ids in 0..{num_rows - 1}",
            found=f"{int(ids.min())}..{int(ids.max())}",
        )


def check_cache(cache: LayerCache, head_dim: int, end: int, what: str) -> None:
    """Raise KernelError unless k and v are alike and hold positions up to end (exclusive)."""
    k, v = cache.k, cache.v
    if (
        k.dim() != 3
        or k.shape != v.shape
        or k.dtype != v.dtype
        or k.dtype not in CACHE_DTYPES
        or k.shape[2] != row_width(head_dim, k.dtype)
        or k.shape[1] < end
        or not (k.is_contiguous() and v.is_contiguous())
    ):
        raise KernelError(
            f"{what}: cache",
            expected=f"contiguous float32, float16 or int8 [heads, >= {end}, "
            f"{row_width(head_dim, k.dtype)}], k like v",
            found=f"k {describe(k)}, v {describe(v)}",
        )


def check_rope(
    qkv: Tensor,
    num_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    rope: RopeTable,
    cache: LayerCache,
    start: int,
) -> None:
    """The checks of `Kernels.rope_append`."""
    if qkv.dim() != 2 or cache.k.dim() != 3 or start < 0:
        raise KernelError(
            "rope_append",
            expected="qkv [T, features], cache [heads, capacity, head dim], start >= 0",
            found=f"{describe(qkv)}, {describe(cache.k)}, start {start}",
        )
    num_kv_heads = cache.k.shape[0]
    head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    features = (num_heads + 2 * num_kv_heads) * head_dim
    end = start + qkv.shape[0]
    if qkv.shape[1] != features or qkv.dtype != torch.float32 or not qkv.is_contiguous():
        raise KernelError(
            "rope_append: qkv", expected=f"contiguous float32 [T, {features}]", found=describe(qkv)
        )
    check_cache(cache, head_dim, end, "rope_append")
    check_vector(q_norm, head_dim, "rope_append: q_norm")
    check_vector(k_norm, head_dim, "rope_append: k_norm")
    check_rope_table(rope, head_dim, end)


def check_rope_table(rope: RopeTable, head_dim: int, end: int) -> None:
    """Raise KernelError unless cos and sin cover positions up to end and at most half a head."""
    cos, sin = rope.cos, rope.sin
    if (
        cos.dim() != 2
        or cos.shape != sin.shape
        or cos.dtype != torch.float32
        or sin.dtype != torch.float32
        or not (cos.is_contiguous() and sin.is_contiguous())
        or cos.shape[0] < end
        or 2 * cos.shape[1] > head_dim
    ):
        raise KernelError(
            "rope table",
            expected=f"contiguous float32 [>= {end}, <= {head_dim // 2}], sin like cos",
            found=f"cos {describe(cos)}, sin {describe(sin)}",
        )


def check_attention(q: Tensor, cache: LayerCache, start: int) -> None:
    """The checks of `Kernels.attention`."""
    if q.dim() != 3 or q.dtype != torch.float32 or not q.is_contiguous() or start < 0:
        raise KernelError(
            "attention",
            expected="contiguous float32 q [T, heads, head dim], start >= 0",
            found=f"{describe(q)}, start {start}",
        )
    check_cache(cache, q.shape[2], start + q.shape[0], "attention")
    if q.shape[1] % cache.k.shape[0]:
        raise KernelError(
            "attention",
            expected=f"query heads divisible by the {cache.k.shape[0]} key/value heads",
            found=str(q.shape[1]),
        )


def check_block(weights: AttentionWeights | MlpWeights) -> None:
    """The checks of `Kernels.bind_attention` and `Kernels.bind_mlp`: shapes that fit together."""
    if isinstance(weights, AttentionWeights):
        w = weights
        hidden, heads, kv = w.norm.shape[0], w.num_heads * w.head_dim, w.num_kv_heads * w.head_dim
        if w.num_heads < 1 or w.num_kv_heads < 1 or w.num_heads % w.num_kv_heads:
            raise KernelError(
                "attention block",
                expected="query heads divisible by key/value heads",
                found=f"{w.num_heads} and {w.num_kv_heads}",
            )
        shapes = [
            ("q", w.q, w.q_bias, heads, hidden),
            ("k", w.k, w.k_bias, kv, hidden),
            ("v", w.v, w.v_bias, kv, hidden),
            ("o", w.o, w.o_bias, hidden, heads),
        ]
        check_vector(w.q_norm, w.head_dim, "attention block: q_norm")
        check_vector(w.k_norm, w.head_dim, "attention block: k_norm")
    else:
        m = weights
        hidden, inner = m.norm.shape[0], m.gate.out_features
        shapes = [
            ("gate", m.gate, m.gate_bias, inner, hidden),
            ("up", m.up, m.up_bias, inner, hidden),
            ("down", m.down, m.down_bias, hidden, inner),
        ]
    check_vector(weights.norm, hidden, "block: norm")
    _check_matrices(shapes)


def _check_matrices(
    shapes: list[tuple[str, KernelWeight, Tensor | None, int, int]],
) -> None:
    """Each (name, matrix, bias, rows, columns) is as large as it must be."""
    for name, weight, bias, rows, columns in shapes:
        if (weight.out_features, weight.in_features) != (rows, columns):
            raise KernelError(
                f"block: {name}",
                expected=f"[{rows}, {columns}]",
                found=f"[{weight.out_features}, {weight.in_features}]",
            )
        check_vector(bias, rows, f"block: {name} bias")


def check_latent(weights: LatentWeights) -> None:
    """The checks of `Kernels.bind_latent`: shapes that fit together."""
    w = weights
    hidden, queries = w.norm.shape[0], w.num_heads * (w.key_size + w.rope_size)
    reads = hidden if w.q_down is None else w.q_down.out_features
    values = w.num_heads * w.value_size
    ups = (w.key_up, w.value_up)
    if (
        [w.value_up.shape[0], w.value_up.shape[1]] != [w.num_heads, w.latent_size]
        or w.value_up.dtype != w.key_up.dtype
        or w.key_up.dtype not in SCALE_DTYPES
        or not all(up.is_contiguous() for up in ups)
        or (w.q_down is None) != (w.q_norm is None)
        or w.rope_size < 2
    ):
        raise KernelError(
            "latent block",
            expected="contiguous key_up [H, N, L] and value_up [H, L, V] of one float type, "
            "q_norm beside q_down",
            found=f"{describe(w.key_up)}, {describe(w.value_up)}",
        )
    shapes = [
        ("q", w.q, w.q_bias, queries, reads),
        ("kv_down", w.kv_down, w.kv_down_bias, w.latent_size + w.rope_size, hidden),
        ("o", w.o, w.o_bias, hidden, values),
    ]
    if w.q_down is not None:
        shapes.append(("q_down", w.q_down, w.q_down_bias, reads, hidden))
    check_vector(w.norm, hidden, "latent block: norm")
    check_vector(w.q_norm, reads, "latent block: q_norm")
    check_vector(w.kv_norm, w.latent_size, "latent block: kv_norm")
    _check_matrices(shapes)


def check_latent_cache(cache: Tensor, width: int, start: int, tokens: int) -> None:
    """Raise KernelError unless the cache is [>= start + tokens, width] and start is >= 0."""
    if (
        cache.dtype not in CACHE_DTYPES
        or cache.dim() != 2
        or cache.shape[1] != row_width(width, cache.dtype)
        or cache.shape[0] < start + tokens
        or not cache.is_contiguous()
        or start < 0
    ):
        raise KernelError(
            "latent_block: cache",
            expected=f"contiguous float32, float16 or int8 [>= {start + tokens}, "
            f"{row_width(width, cache.dtype)}], start >= 0",
            found=f"{describe(cache)}, start {start}",
        )


def check_experts(experts: Iterable[PackedExpert], count: int) -> Iterator[PackedExpert]:
    """Pass the experts on. Raises KernelError for one unlike the first, and where there are not
    `count` of them."""
    first: list[Any] = []
    for index, expert in enumerate(experts):
        matrices = (expert.gate, expert.up, expert.down)
        for weight in matrices:
            check_packed(weight)
        form = [(m.out_features, m.in_features, m.scheme, m.scale.dtype) for m in matrices]
        if not first:
            first = form
            rows, columns = form[0][:2]
            if form[1][:2] != (rows, columns) or form[2][:2] != (columns, rows):
                raise KernelError(
                    "expert",
                    expected=f"gate and up [{rows}, {columns}], down [{columns}, {rows}]",
                    found=f"up {list(form[1][:2])}, down {list(form[2][:2])}",
                )
        for name, found, expected in zip(("gate", "up", "down"), form, first, strict=True):
            if found != expected:
                raise KernelError(
                    f"expert {index}: {name}",
                    expected=f"as in expert 0: {_described(expected)}",
                    found=_described(found),
                )
        if index < count:
            yield expert
    found_count = index + 1 if first else 0
    if found_count != count:
        raise KernelError("experts", expected=count, found=found_count)


def _described(form: tuple[int, int, Any, torch.dtype]) -> str:
    rows, columns, scheme, dtype = form
    return f"[{rows}, {columns}] {scheme.name} with scales in {dtype}"


def check_routing(x: Tensor, weight: Tensor, bias: Tensor | None, rule: RouterRule) -> None:
    """The checks of `Kernels.route`."""
    hidden = x.shape[-1]
    check_activations(x, hidden, "route")
    shape = [rule.num_experts, hidden]
    if (
        weight.dtype != torch.float32
        or list(weight.shape) != shape
        or hidden < 1
        or not weight.is_contiguous()
    ):
        raise KernelError(
            "route: weight", expected=f"contiguous float32 {shape}", found=describe(weight)
        )
    check_vector(bias, rule.num_experts, "route: bias")
    size, rest = divmod(rule.num_experts, rule.num_groups)
    judging = rule.group_score.value if rule.groups_per_token < rule.num_groups else 1
    if (
        rest
        or size < judging
        or not 1 <= rule.groups_per_token <= rule.num_groups
        or not 1 <= rule.experts_per_token <= rule.groups_per_token * size
    ):
        raise KernelError(
            "route: rule",
            expected="equal groups that hold the experts of a token",
            found=str(rule),
        )


def check_mixing(x: Tensor, routing: Routing, experts: ExpertBank, residual: Tensor) -> None:
    """The checks of `Kernels.mix_experts`, but for the experts' numbers."""
    check_activations(x, experts.hidden_size, "mix_experts")
    check_activations(residual, experts.hidden_size, "mix_experts: residual")
    chosen, weights = routing.experts, routing.weights
    if (
        chosen.dtype != torch.int64
        or weights.dtype != torch.float32
        or chosen.dim() != 2
        or chosen.shape != weights.shape
        or chosen.shape[1] < 1
        or not (chosen.is_contiguous() and weights.is_contiguous())
        or not chosen.shape[0] == x.shape[0] == residual.shape[0]
    ):
        raise KernelError(
            "mix_experts: routing",
            expected=f"contiguous int64 and float32 [{x.shape[0]}, k], residual alike",
            found=f"{describe(chosen)}, {describe(weights)}, residual {describe(residual)}",
        )


def check_outputs(x: Tensor, chosen: Tensor, experts: ExpertBank, outputs: Tensor) -> None:
    """The checks of `Kernels.expert_outputs`, but for the experts' numbers."""
    check_activations(x, experts.hidden_size, "expert_outputs")
    tokens = x.shape[0]
    if (
        chosen.dtype != torch.int64
        or chosen.dim() != 2
        or chosen.shape[0] != tokens
        or chosen.shape[1] < 1
        or not chosen.is_contiguous()
    ):
        raise KernelError(
            "expert_outputs: chosen",
            expected=f"contiguous int64 [{tokens}, k]",
            found=describe(chosen),
        )
    _check_each(outputs, [*chosen.shape, experts.hidden_size], "expert_outputs: outputs")


def check_combining(outputs: Tensor, weights: Tensor, residual: Tensor) -> None:
    """The checks of `Kernels.combine_experts`."""
    if outputs.dim() != 3:
        raise KernelError(
            "combine_experts: outputs", expected="float32 [T, k, hidden]", found=describe(outputs)
        )
    tokens, per_token, hidden = outputs.shape
    _check_each(outputs, [tokens, per_token, hidden], "combine_experts: outputs")
    _check_each(weights, [tokens, per_token], "combine_experts: weights")
    _check_each(residual, [tokens, hidden], "combine_experts: residual")


def _check_each(value: Tensor, shape: list[int], what: str) -> None:
    if value.dtype != torch.float32 or list(value.shape) != shape or not value.is_contiguous():
        raise KernelError(what, expected=f"contiguous float32 {shape}", found=describe(value))
