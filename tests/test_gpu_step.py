"""Kernels behind one another, as a step of decoding launches them: data stays on the GPU."""

import ctypes
from typing import Any

import pytest
import torch
from gpu_cases import Gpu, Gpus, blocked, f32, i32, i64, layout_of
from kernel_cases import REFERENCE, assert_same_bits, random_tokens
from test_kernels_experts import Case
from test_kernels_latent import LATENT_TOLERANCE, Sizes, same_cache
from test_kernels_latent import Block as LatentBlock
from test_kernels_tolerance import BLOCK_TOLERANCE, Block
from torch import Tensor

from localr1.kernels import gpu_launch
from localr1.kernels.api import GroupScore, LayerCache, PackedWeight, RopeTable, RouterRule, Scoring
from localr1.kernels.gpu_layout import ExpertLayout, RouterArguments


class Step:
    """Launches on one GPU. Buffers are what `Gpu.upload` returns."""

    def __init__(self, gpu: Gpu, tokens: int, start: int, rows: int = 16) -> None:
        self.gpu, self.tokens, self.rows = gpu, tokens, rows
        self.start = gpu.upload("start", torch.tensor([start], dtype=torch.int32))

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Any:
        fill = torch.nan if dtype.is_floating_point else 77
        return self.gpu.upload("temporary", torch.full(shape, fill, dtype=dtype))

    def quantized(self, count: int, columns: int) -> tuple[Any, Any, Any]:
        groups = columns // 32
        return (
            self.empty(count, columns, dtype=torch.int8),
            self.empty(count, groups),
            self.empty(count, groups, dtype=torch.int32),
        )

    def behind(self, buffer: Any, floats: int) -> ctypes.c_uint64:
        """A pointer into a buffer."""
        return ctypes.c_uint64(self.gpu.address(buffer) + 4 * floats)

    def norm(
        self, x: Any, stride: int, weight: Tensor, eps: float, y: Any = None
    ) -> tuple[Any, Any, Any]:
        n = weight.shape[0]
        out = self.quantized(self.tokens, n)
        self.gpu.launch(
            gpu_launch.rms_norm(self.tokens),
            x, i64(stride), self.gpu.upload("norm", weight), f32(eps), i32(n), y, *out,
        )  # fmt: skip
        return out

    def quantize(self, x: Any, columns: int) -> tuple[Any, Any, Any]:
        out, count = self.quantized(self.tokens, columns), self.tokens * columns // 32
        self.gpu.launch(gpu_launch.quantize_activations(count), x, i64(count), *out)
        return out

    def product(
        self,
        a: tuple[Any, Any, Any],
        weight: PackedWeight,
        bias: Tensor | None,
        out: Any,
        stride: int,
        *,
        accumulate: bool = False,
    ) -> None:
        self.gpu.launch(
            gpu_launch.matvec(weight.scheme.code_type, weight.out_features, self.tokens),
            layout_of(weight, self.rows), self.gpu.upload("weight", blocked(weight, self.rows)), *a,
            i32(self.tokens), None if bias is None else self.gpu.upload("bias", bias), out,
            i64(stride), i32(accumulate), rows=self.rows,
        )  # fmt: skip

    def attend(
        self,
        q: Any,
        heads: tuple[int, int],
        scale: float,
        caches: tuple[Any, Any],
        capacity: int,
        dims: tuple[int, int],
        half: bool,
    ) -> Any:
        (query, key_value), (key_dim, value_dim) = heads, dims
        group, spans = query // key_value, gpu_launch.num_spans(capacity)
        count = self.tokens * query * spans
        partial, states = self.empty(count, value_dim), [self.empty(count) for _ in range(2)]
        self.gpu.launch(
            gpu_launch.attend(group, key_value, self.tokens, capacity, dims, half),
            q, i32(query), i32(group), f32(scale), *caches, i64(capacity * key_dim), i64(key_dim),
            i32(key_dim), i32(value_dim), self.start, i32(0), i32(self.tokens), partial, *states,
        )  # fmt: skip
        out = self.empty(self.tokens, query * value_dim)
        self.gpu.launch(
            gpu_launch.merge_spans(query, self.tokens),
            partial, *states, self.start, i32(0), i32(spans), i32(value_dim), out,
        )  # fmt: skip
        return out

    def table(self, rope: RopeTable) -> tuple[Any, Any, ctypes.c_int32]:
        cos, sin = self.gpu.upload("cos", rope.cos), self.gpu.upload("sin", rope.sin)
        return cos, sin, i32(rope.cos.shape[1])


@pytest.mark.parametrize("rows", [16, 8])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_mixture_from_its_norm_to_the_residual(tokens: int, rows: int, gpus: Gpus) -> None:
    """The router's choice never leaves the GPU; the sum is the reference's, bit for bit."""
    case = Case(8, 3, 96, 64, tokens, bits=(4, 4, 8))
    rule = RouterRule(8, 3, Scoring.SIGMOID, True, 4, 2, GroupScore.BEST_TWO, 1e-20, 2.5)
    generator = torch.Generator().manual_seed(tokens)
    packed = case.packed(generator)
    x = random_tokens(tokens, 96, generator)
    norm = torch.randn(96, generator=generator)
    weight, bias = (torch.randn(*size, generator=generator) for size in ((8, 96), (8,)))
    expected, normed = x.clone(), REFERENCE.rms_norm(x, norm, 1e-6)
    routing = REFERENCE.route(normed, weight, bias, rule)
    REFERENCE.mix_experts(normed, routing, REFERENCE.prepare_experts(packed, 8), expected)
    for gpu in gpus():
        step = Step(gpu, tokens, 0, rows)
        residual, y = gpu.upload("residual", x), step.empty(tokens, 96)
        inputs = step.norm(residual, 96, norm, 1e-6, y)
        logits, weights = step.empty(tokens, 8), step.empty(tokens, 3)
        chosen = step.empty(tokens, 3, dtype=torch.int32)
        gpu.launch(
            gpu_launch.route_logits(8, tokens),
            y, gpu.upload("router", weight), i32(2), i32(96), i32(8), logits,
        )  # fmt: skip
        gpu.launch(
            gpu_launch.route_choose(tokens),
            logits, gpu.upload("bias", bias), RouterArguments.of(rule), chosen, weights,
        )  # fmt: skip
        parts = [(expert.gate, expert.up, expert.down) for expert in packed]
        slots = [gpu.upload("expert", torch.cat([blocked(w, rows) for w in p])) for p in parts]
        table = gpu.upload("table", torch.tensor([gpu.address(slot) for slot in slots]))
        layout = ExpertLayout(*(layout_of(part, rows) for part in parts[0]))
        gated, outputs = step.quantized(tokens * 3, 64), step.empty(tokens * 3, 96)
        gpu.launch(
            gpu_launch.gate_up(layout, tokens * 3),
            layout, table, chosen, i32(3), *inputs, *gated, rows=rows,
        )  # fmt: skip
        gpu.launch(
            gpu_launch.down(layout, tokens * 3),
            layout, table, chosen, *gated, outputs, rows=rows,
        )  # fmt: skip
        gpu.launch(
            gpu_launch.combine_experts(96, tokens),
            outputs, weights, i32(3), i64(96), residual,
        )  # fmt: skip
        assert_same_bits(gpu.download(residual, x), expected, (tokens, rows))


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("tokens", "start"), [(1, 130), (3, 126)])
def test_a_block_of_attention(tokens: int, start: int, qk_norm: bool, gpus: Gpus) -> None:
    block = Block(qk_norm, bias=True, seed=4)
    hidden, heads, kv_heads, dim = block.hidden, block.heads, block.kv_heads, block.dim
    x = torch.randn(tokens, hidden, generator=block.generator)
    cache, _ = block.fresh_cache()
    expected = x.clone()
    bound = REFERENCE.bind_attention(block.attention_weights(REFERENCE))
    REFERENCE.attention_block(expected, bound, block.rope, cache, start)
    width, all_heads = heads * dim, (heads + 2 * kv_heads) * dim
    norms = [block.q_norm, block.k_norm]
    for gpu in gpus():
        step = Step(gpu, tokens, start)
        residual, qkv = gpu.upload("residual", x), step.empty(tokens, all_heads)
        a = step.norm(residual, hidden, block.norm, 1e-6)
        column = 0
        for name in ("q", "k", "v"):
            weight = block.matrices[name]
            step.product(a, weight, block.bias[name], step.behind(qkv, column), all_heads)
            column += weight.out_features
        fresh: LayerCache = block.fresh_cache()[0]
        k, v = gpu.upload("k", fresh.k), gpu.upload("v", fresh.v)
        q = step.empty(tokens, width)
        capacity = fresh.k.shape[1]
        gpu.launch(
            gpu_launch.rope_append(heads, kv_heads, dim, tokens),
            qkv, i32(heads), i32(kv_heads), i32(dim),
            *(None if n is None else gpu.upload("norm", n) for n in norms), f32(1e-6),
            *step.table(block.rope), step.start, k, v, i64(capacity), i32(1), q,
        )  # fmt: skip
        out = step.attend(q, (heads, kv_heads), dim**-0.5, (k, v), capacity, (dim, dim), half=True)
        o = block.matrices["o"]
        mixed = step.quantize(out, width)
        step.product(mixed, o, block.bias["o"], residual, hidden, accumulate=True)
        assert difference(gpu.download(residual, x), expected) <= BLOCK_TOLERANCE
        assert_same_bits(gpu.download(k, fresh.k), cache.k, "keys")
        assert_same_bits(gpu.download(v, fresh.v), cache.v, "values")


@pytest.mark.parametrize(
    "sizes",
    [Sizes(4, 32, 16, 8, 32), Sizes(12, 64, 24, 16, 16, rank=64, dtype=torch.float16)],
    ids=["4", "12"],
)
@pytest.mark.parametrize(("tokens", "start"), [(1, 127), (2, 300)])
def test_a_block_of_latent_attention(tokens: int, start: int, sizes: Sizes, gpus: Gpus) -> None:
    s = sizes
    block = LatentBlock(s, True, start + tokens + 3, seed=start)
    x = torch.randn(tokens, s.hidden, generator=block.generator)
    expected, cache = block.run(REFERENCE, x, start)
    w = block.weights(REFERENCE)
    before = block.rows.half()
    before[start:] = torch.nan
    cached, queries = s.latent + s.rope, s.heads * (s.key + s.rope)
    first = "q" if s.rank is None else "q_down"
    stride = cached + block.matrices[first].out_features
    up_type = i32([torch.bfloat16, torch.float16].index(s.dtype))
    for gpu in gpus():
        step = Step(gpu, tokens, start)
        residual, down = gpu.upload("residual", x), step.empty(tokens, stride)
        a = step.norm(residual, s.hidden, block.norm, w.eps)
        step.product(a, block.matrices["kv_down"], block.biases["kv_down"], down, stride)
        inside = step.behind(down, cached)
        step.product(a, block.matrices[first], block.biases[first], inside, stride)
        query, query_stride = inside, stride
        if block.q_norm is not None:
            ranked = step.norm(inside, stride, block.q_norm, w.latent_eps)
            query, query_stride = step.empty(tokens, queries), queries
            step.product(ranked, block.matrices["q"], block.biases["q"], query, queries)
        rows = gpu.upload("cache", before)
        gpu.launch(
            gpu_launch.latent_append(tokens),
            down, i64(stride), gpu.upload("norm", block.kv_norm), f32(w.latent_eps), i32(s.latent),
            *step.table(block.rope), step.start, rows, i32(1),
        )  # fmt: skip
        in_latent = step.empty(tokens, s.heads, cached)
        gpu.launch(
            gpu_launch.absorb_queries(s.latent, s.heads, tokens),
            query, i64(query_stride), gpu.upload("key up", block.key_up), up_type, i32(s.key),
            i32(s.latent), *step.table(block.rope), step.start, in_latent,
        )  # fmt: skip
        sums = step.attend(
            in_latent, (s.heads, 1), w.scale, (rows, rows), len(before), (cached, s.latent), True
        )
        values = s.heads * s.value
        out = step.empty(tokens, values)
        gpu.launch(
            gpu_launch.expand_values(s.value, s.heads, tokens),
            sums, gpu.upload("value up", block.value_up), up_type, i32(s.latent), i32(s.value), out,
        )  # fmt: skip
        mixed = step.quantize(out, values)
        o = block.matrices["o"]
        step.product(mixed, o, block.biases["o"], residual, s.hidden, accumulate=True)
        assert difference(gpu.download(residual, x), expected) <= LATENT_TOLERANCE
        same_cache(gpu.download(rows, before), cache, start + tokens, "cache")
