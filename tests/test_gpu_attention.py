"""Attention on the GPU: rope and cache are the reference's bits, softmax and sums close to it."""

import pytest
import torch
from gpu_cases import Gpu, Gpus, f32, i32, i64, models
from gpu_model import Changes, ModelError
from kernel_cases import (
    REFERENCE,
    assert_same_bits,
    random_cache,
    random_rope,
)
from test_kernels_tolerance import ATTENTION_TOLERANCE, close
from torch import Tensor

from localr1.errors import KernelError
from localr1.kernels import gpu_launch
from localr1.kernels.api import LayerCache, RopeTable
from localr1.kernels.rowwise import rms_norm

# Sums of at most 512 products in another order than torch's, the whole of order 1: 2^-24 each, so
# 1e-5 leaves a margin of ten. A row left out changes an output by about 4e-2.
HEAD_PRODUCT_TOLERANCE = 1e-5


def attention(
    gpu: Gpu,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    scale: float,
    *,
    value_dim: int,
    rows: int | None = None,
    first: int = 0,
    at_once: int | None = None,
    changes: Changes = (),
) -> Tensor:
    """q [T, H, key dim]; keys [G, C, key dim], values the same or a view that lies in it. Returns
    [T, H, value dim], from spans merged by a second kernel. rows: of a tile. first: tokens of the
    step before these, as start is the step's. at_once: tokens of a block."""
    tokens, heads, key_dim = q.shape
    kv_heads, capacity, _ = keys.shape
    group = heads // kv_heads
    spans, half = gpu_launch.num_spans(capacity), keys.dtype == torch.float16
    k = gpu.upload("keys", keys)
    v = k if values is keys else gpu.upload("values", values)
    position = gpu.upload("start", torch.tensor([start], dtype=torch.int32))
    count = tokens * heads * spans
    partial = gpu.upload("partial", torch.full((count, value_dim), torch.nan))
    maximum, total = (gpu.upload("state", torch.full((count,), torch.nan)) for _ in range(2))
    gpu.launch(
        gpu_launch.attend(
            group, kv_heads, tokens, capacity, (key_dim, value_dim), half, rows, at_once
        ),
        gpu.upload("q", q), i32(heads), i32(group), f32(scale), k, v, i64(capacity * key_dim),
        i64(key_dim), i32(key_dim), i32(value_dim), position, i32(first), i32(tokens), partial,
        maximum, total, changes=changes,
    )  # fmt: skip
    out = torch.full((tokens, heads, value_dim), torch.nan)
    target = gpu.upload("out", out)
    gpu.launch(
        gpu_launch.merge_spans(heads, tokens),
        partial, maximum, total, position, i32(first), i32(spans), i32(value_dim), target,
        changes=changes,
    )  # fmt: skip
    return gpu.download(target, out)


# (query heads, key/value heads, head dim, tokens, past): tiles of 1, 4 and 8 heads, filled and not;
# one position, the ends of a span, some spans; dims that are no multiple of 32.
CASES = (
    (1, 1, 8, 1, 0),
    (3, 1, 64, 1, 127),
    (9, 3, 64, 1, 128),
    (8, 1, 128, 2, 254),
    (4, 4, 72, 3, 31),
    (14, 2, 64, 1, 300),
    (20, 2, 24, 1, 130),
    (2, 2, 256, 1, 200),
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_attention(case: tuple[int, int, int, int, int], dtype: torch.dtype, gpus: Gpus) -> None:
    heads, kv_heads, dim, tokens, past = case
    generator = torch.Generator().manual_seed(past)
    cache = random_cache(kv_heads, past + tokens + 150, dim, dtype, generator)
    cache.k[:, past + tokens :] = torch.nan  # what lies behind the last token is never read
    cache.v[:, past + tokens :] = torch.nan
    q = torch.randn(tokens, heads, dim, generator=generator) * 2.0
    expected = REFERENCE.attention(q, cache, past, dim**-0.5)
    first: Tensor | None = None
    for gpu in gpus():
        found = attention(gpu, q, cache.k, cache.v, past, dim**-0.5, value_dim=dim).flatten(1)
        close(found, expected, ATTENTION_TOLERANCE, case)
        first = found if first is None else first
        assert_same_bits(found, first, "whatever the order of warps")


def test_a_tokens_attention_depends_on_nothing_but_itself(gpus: Gpus) -> None:
    """Alone or among others, in a small cache or a large one: the same bits."""
    generator = torch.Generator().manual_seed(7)
    cache = random_cache(2, 160, 64, torch.float16, generator)
    q = torch.randn(4, 6, 64, generator=generator)
    large = [torch.cat((t, torch.randn(2, 500, 64).half()), dim=1) for t in (cache.k, cache.v)]
    for gpu in gpus():
        whole = attention(gpu, q, cache.k, cache.v, 150, 0.125, value_dim=64)
        for i in range(4):
            one = q[i : i + 1]
            alone = attention(gpu, one, cache.k, cache.v, 150 + i, 0.125, value_dim=64)
            assert_same_bits(alone[0], whole[i], i)
            part = attention(gpu, one, cache.k, cache.v, 150, 0.125, value_dim=64, first=i)
            assert_same_bits(part[0], whole[i], i)
        again = attention(gpu, q, large[0], large[1], 150, 0.125, value_dim=64)
        assert_same_bits(again, whole, "large")


# (query heads, key/value heads, tokens, past): of blocks of 1, 4 and 8 heads with several tokens,
# the last ones not full; tokens that see one span, and others of their block that see the next.
SEVERAL = ((2, 2, 11, 121), (6, 2, 5, 125), (9, 1, 5, 252))


def several(case: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, LayerCache]:
    heads, kv_heads, tokens, past = case
    generator = torch.Generator().manual_seed(past)
    cache = random_cache(kv_heads, past + tokens, 40, dtype, generator)
    return torch.randn(tokens, heads, 40, generator=generator) * 2.0, cache


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("case", SEVERAL)
def test_tokens_that_share_a_block(
    case: tuple[int, int, int, int], dtype: torch.dtype, gpus: Gpus
) -> None:
    """Each has the bits that it has by itself, and does not see the values of later ones."""
    q, cache = several(case, dtype)
    past = case[-1]
    poisoned = cache.v.clone()
    poisoned[:, past + 1] = torch.nan
    expected = REFERENCE.attention(q, cache, past, 0.15)
    for gpu in gpus():
        alone, together = (
            attention(gpu, q, cache.k, cache.v, past, 0.15, value_dim=40, at_once=each)
            for each in (1, None)
        )
        close(together.flatten(1), expected, ATTENTION_TOLERANCE, case)
        assert_same_bits(together, alone, case)
        found = attention(gpu, q, cache.k, poisoned, past, 0.15, value_dim=40)
        assert_same_bits(found[0], alone[0], case)
        assert found[1:].isnan().all()


PLANTED_IN_BLOCKS = {
    "values that are not seen": ("if (kTokens > 1 && key >= seen.of(row / kHeads))", "if (false)"),
    "keys that are not seen": ("key < seen.of(row / kHeads);", "key < count;"),
    "the first token's keys": ("first + token < kSpan ? first + token", "first < kSpan ? first"),
    "a token past the end": ("&& row / kHeads < here;", ";"),
    "tokens for heads": ("row / kHeads * heads +", "row / kHeads * kHeads +"),
    "a span that nobody sees": ("if (keys + here <= 1) return;", "if (keys <= 0) return;"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED_IN_BLOCKS)
def test_an_error_planted_in_blocks_of_tokens_is_caught(name: str) -> None:
    q, cache = several(SEVERAL[1], torch.float16)
    cache.k[:, 126] *= 5.0  # What the first token does not see stands out.
    poisoned = cache.v.clone()
    poisoned[:, 126] = torch.nan

    def is_same(gpu: Gpu, values: Tensor) -> bool:
        try:
            alone, found = (
                attention(
                    gpu, q, cache.k, values, 125, 0.15, value_dim=40, at_once=each, changes=some
                )
                for each, some in ((1, ()), (None, (PLANTED_IN_BLOCKS[name],)))
            )
        except ModelError:
            return False
        return torch.equal(found.nan_to_num(), alone.nan_to_num())

    assert not all(is_same(gpu, v) for gpu in models() for v in (cache.v, poisoned)), name


def test_nan_and_large_scores(gpus: Gpus) -> None:
    generator = torch.Generator().manual_seed(1)
    cache = random_cache(1, 300, 32, torch.float32, generator)
    q = torch.randn(1, 2, 32, generator=generator)
    cache.k[0, 70] = 3e3  # scores near +-1e5: only one key counts
    expected = REFERENCE.attention(q, cache, 290, 1.0)
    for gpu in gpus():
        found = attention(gpu, q, cache.k, cache.v, 290, 1.0, value_dim=32)
        close(found.flatten(1), expected, ATTENTION_TOLERANCE, "large")
        one = q.clone()
        one[0, 1, 3] = torch.nan
        found = attention(gpu, one, cache.k, cache.v, 290, 1.0, value_dim=32)
        assert found[0, 0].isfinite().all()
        assert found[0, 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("sizes", [(16, 64, 16, 2), (12, 512, 64, 1), (5, 96, 8, 3)])
def test_latent_attention(sizes: tuple[int, int, int, int], dtype: torch.dtype, gpus: Gpus) -> None:
    """All heads share one row that is key and, in its first part, value."""
    heads, latent, rope, tokens = sizes
    generator = torch.Generator().manual_seed(latent)
    cache = torch.randn(1, 200, latent + rope, generator=generator).to(dtype)
    q = torch.randn(tokens, heads, latent + rope, generator=generator)
    scale, start = (latent + rope) ** -0.5, 190
    rows = cache[0].float()
    scores = torch.einsum("thd,pd->thp", q * scale, rows)
    hidden = torch.arange(200)[None] > torch.arange(start, start + tokens)[:, None]
    weights = torch.softmax(scores.masked_fill(hidden[:, None], -torch.inf), dim=-1)
    expected = weights @ rows[:, :latent]
    for gpu in gpus():
        found = attention(gpu, q, cache, cache, start, scale, value_dim=latent)
        close(found, expected, ATTENTION_TOLERANCE, sizes)


def rope_append(
    gpu: Gpu,
    qkv: Tensor,
    heads: int,
    norms: tuple[Tensor | None, Tensor | None],
    rope: RopeTable,
    cache: LayerCache,
    start: int,
    changes: Changes = (),
) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads, capacity, dim = cache.k.shape
    tokens = qkv.shape[0]
    q = torch.full((tokens, heads, dim), torch.nan)
    keys, values, target = gpu.upload("k", cache.k), gpu.upload("v", cache.v), gpu.upload("q", q)
    gpu.launch(
        gpu_launch.rope_append(heads, kv_heads, dim, tokens),
        gpu.upload("qkv", qkv), i32(heads), i32(kv_heads), i32(dim),
        *(None if norm is None else gpu.upload("norm", norm) for norm in norms), f32(1e-6),
        gpu.upload("cos", rope.cos), gpu.upload("sin", rope.sin), i32(rope.cos.shape[1]),
        gpu.upload("start", torch.tensor([start], dtype=torch.int32)), keys, values,
        i64(capacity), i32(cache.k.dtype == torch.float16), target,
        changes=changes,
    )  # fmt: skip
    return gpu.download(target, q), gpu.download(keys, cache.k), gpu.download(values, cache.v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_append(dtype: torch.dtype, normed: bool, gpus: Gpus) -> None:
    cases = ((8, 4, 1, 1), (64, 32, 3, 2), (64, 16, 1, 3), (72, 27, 2, 2), (256, 128, 2, 1))
    for i, (dim, pairs, groups, tokens) in enumerate(cases):
        generator = torch.Generator().manual_seed(i)
        heads, start = 2 * groups, 3 * i
        qkv = torch.randn(tokens, (heads + 2 * groups) * dim, generator=generator)
        qkv[-1, -4:] = torch.tensor([1e-7, -3e-8, 70000.0, 65519.0])  # subnormal and infinite
        q_norm = torch.randn(dim, generator=generator) if normed else None
        k_norm = torch.randn(dim, generator=generator) if normed else None
        rope = random_rope(20, pairs, generator)
        before = random_cache(groups, 20, dim, dtype, generator)
        cache = LayerCache(before.k.clone(), before.v.clone())
        q = REFERENCE.rope_append(qkv, heads, q_norm, k_norm, 1e-6, rope, cache, start)
        for gpu in gpus():
            found = rope_append(gpu, qkv, heads, (q_norm, k_norm), rope, before, start)
            for part, expected in zip(found, (q, cache.k, cache.v), strict=True):
                assert_same_bits(part, expected, (dim, pairs, groups))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("latent", [32, 512, 72])
def test_latent_append(latent: int, dtype: torch.dtype, gpus: Gpus) -> None:
    generator = torch.Generator().manual_seed(latent)
    pairs, tokens, start, stride = 8, 3, 4, latent + 16 + 24
    down = torch.randn(tokens, stride, generator=generator)
    norm, rope = torch.randn(latent, generator=generator), random_rope(10, pairs, generator)
    cache = torch.randn(10, latent + 16, generator=generator).to(dtype)
    key = rotated(down[:, latent : latent + 16], rope, start)
    row = torch.cat((rms_norm(down[:, :latent], norm, 1e-6), key), dim=1)
    expected = cache.clone()
    expected[start : start + tokens] = row.to(dtype)
    for gpu in gpus():
        rows = gpu.upload("cache", cache)
        gpu.launch(
            gpu_launch.latent_append(tokens),
            gpu.upload("down", down), i64(stride), gpu.upload("norm", norm), f32(1e-6),
            i32(latent), gpu.upload("cos", rope.cos), gpu.upload("sin", rope.sin), i32(pairs),
            gpu.upload("start", torch.tensor([start], dtype=torch.int32)), rows,
            i32(dtype == torch.float16),
        )  # fmt: skip
        assert_same_bits(gpu.download(rows, cache), expected, latent)


def rotated(x: Tensor, rope: RopeTable, start: int) -> Tensor:
    """x [T, ..., 2R] by positions start..start+T-1."""
    pairs = rope.cos.shape[1]
    shape = (x.shape[0], *(1 for _ in x.shape[1:-1]), pairs)
    cos, sin = (t[start : start + x.shape[0]].view(shape) for t in (rope.cos, rope.sin))
    first, second = x[..., :pairs], x[..., pairs:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


TYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sizes", [(3, 128, 512, 1), (2, 20, 72, 2), (1, 8, 33, 1)])
def test_queries_go_into_the_latents_space(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, gpus: Gpus
) -> None:
    heads, key, latent, tokens = sizes
    generator = torch.Generator().manual_seed(key)
    pairs, start = 8, 2
    queries = torch.randn(tokens, heads * (key + 16) + 5, generator=generator)
    up = (torch.randn(heads, key, latent, generator=generator) * key**-0.5).to(dtype)
    rope = random_rope(6, pairs, generator)
    parts = queries[:, : heads * (key + 16)].reshape(tokens, heads, -1)
    expected = torch.einsum("thn,hnl->thl", parts[..., :key], up.float())
    turned = rotated(parts[..., key:], rope, start)
    out = torch.full((tokens, heads, latent + 16), torch.nan)
    for gpu in gpus():
        target = gpu.upload("in latent", out)
        gpu.launch(
            gpu_launch.absorb_queries(latent, heads, tokens),
            gpu.upload("queries", queries), i64(queries.shape[1]), gpu.upload("up", up),
            i32(TYPES.index(dtype)), i32(key), i32(latent), gpu.upload("cos", rope.cos),
            gpu.upload("sin", rope.sin), i32(pairs),
            gpu.upload("start", torch.tensor([start], dtype=torch.int32)), target,
        )  # fmt: skip
        found = gpu.download(target, out)
        close(found[..., :latent], expected, HEAD_PRODUCT_TOLERANCE, sizes)
        assert_same_bits(found[..., latent:], turned, sizes)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sizes", [(3, 512, 128, 1), (2, 72, 20, 2)])
def test_sums_come_out_of_the_latents_space(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, gpus: Gpus
) -> None:
    heads, latent, value, tokens = sizes
    generator = torch.Generator().manual_seed(value)
    sums = torch.randn(tokens, heads, latent, generator=generator)
    up = (torch.randn(heads, latent, value, generator=generator) * latent**-0.5).to(dtype)
    expected = torch.einsum("thl,hlv->thv", sums, up.float())
    for gpu in gpus():
        target = gpu.upload("out", torch.full_like(expected, torch.nan))
        gpu.launch(
            gpu_launch.expand_values(value, heads, tokens),
            gpu.upload("sums", sums), gpu.upload("up", up), i32(TYPES.index(dtype)), i32(latent),
            i32(value), target,
        )  # fmt: skip
        close(gpu.download(target, expected), expected, HEAD_PRODUCT_TOLERANCE, sizes)


BARRIER = "\n  __syncthreads();"
# Each of the barriers is needed, and is removed alone.
PLANTED = {
    "a key past the end": ("if (key < count) {\n      const", "{\n      const"),
    "a span left out": ("blockIdx.y + kSpan) / kSpan)", "blockIdx.y) / kSpan)"),
    "no maximum": ("scalar_exp(maximum[row * spans + first + thread] - largest)", "1.0f"),
    "mask at the diagonal": ("first_token + 1 - position", "first_token - position"),
    "queries unwaited": ("* scale;\n  }" + BARRIER, "* scale;\n  }"),
    "scores unwaited": ("seen, scores);" + BARRIER, "seen, scores);"),
    "exponentials unwaited": ("sum + state);\n  }" + BARRIER, "sum + state);\n  }"),
    "slices unwaited": ("acc[row][1];\n    }\n  }" + BARRIER, "acc[row][1];\n    }\n  }"),
    "factors unwaited": ("- largest);\n  " + BARRIER[1:], "- largest);"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_caught(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    cache = random_cache(1, 200, 64, torch.float16, generator)
    # The newest key stands out, so that its loss shows.
    cache.k[0, 180] *= 3.0
    q = torch.randn(1, 4, 64, generator=generator) * 2.0
    expected = REFERENCE.attention(q, LayerCache(cache.k, cache.v), 180, 0.125)
    cache.k[:, 181:], cache.v[:, 181:] = torch.nan, torch.nan
    caught = 0
    for gpu in models():
        try:
            found = attention(
                gpu, q, cache.k, cache.v, 180, 0.125, value_dim=64, changes=(PLANTED[name],)
            )
        except ModelError:
            caught += 1
        else:
            difference = (found.flatten(1) - expected).abs().max()
            caught += not bool(difference <= ATTENTION_TOLERANCE)
    assert caught, name


def test_an_unwaited_rotation_is_caught() -> None:
    change = ("__syncwarp();  // a pair's", "// a pair's")
    generator = torch.Generator().manual_seed(6)
    qkv = torch.randn(1, 3 * 72, generator=generator)
    rope, cache = random_rope(4, 27, generator), random_cache(1, 4, 72, torch.float32, generator)
    after = LayerCache(cache.k.clone(), cache.v.clone())
    expected = REFERENCE.rope_append(qkv, 1, None, None, 1e-6, rope, after, 0)
    found = [
        rope_append(gpu, qkv, 1, (None, None), rope, cache, 0, (change,))[0] for gpu in models()
    ]
    assert not all(torch.equal(each, expected) for each in found)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(KernelError, match=r"a multiple of 8 up to 576.*found 60 and 60"):
        gpu_launch.attend(1, 1, 1, 10, (60, 60), half=True)
    for dims in ((584, 512), (576, 514), (64, 63)):
        with pytest.raises(KernelError, match=f"found {dims[0]} and {dims[1]}"):
            gpu_launch.attend(1, 1, 1, 10, dims, half=True)
    with pytest.raises(KernelError, match="up to 256, found 264"):
        gpu_launch.rope_append(1, 1, 264, 1)
