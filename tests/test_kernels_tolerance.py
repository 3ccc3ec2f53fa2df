"""Attention: close to the reference within a named tolerance, and the same bits for any number of
threads and however a prompt is cut. Blocks: the same bits as their operations one by one.
"""

import pytest
import torch
from kernel_cases import (
    ISAS,
    REFERENCE,
    THREADS,
    Sentinels,
    Shape,
    assert_same_bits,
    native,
    random_cache,
    random_packed,
    random_rope,
)
from torch import Tensor

from localr1.errors import KernelError
from localr1.kernels.api import AttentionWeights, Kernels, LayerCache, MlpWeights, PackedWeight
from localr1.kernels.native import NativeKernels

# Both sides sum at most 300 terms of order 1 in float32 (2^-24 = 6e-8 relative each) and use an exp
# good to 1e-7: 2e-5 leaves a margin of ten. A key left out or counted twice changes an output by
# about 1/300 = 3e-3, a wrong mask at the diagonal by more, a scale off by 1% by about 1e-2.
ATTENTION_TOLERANCE = 2e-5

# (query heads, key/value heads, head dim, tokens, past): chunk ends at 64 and 128, one token, rows
# around the tiles of 96, dims that are not whole vectors, ratios 1, 3, 4 and 7.
ATTENTION_CASES = (
    (1, 1, 8, 1, 0),
    (3, 1, 64, 1, 63),
    (9, 3, 64, 1, 64),
    (9, 3, 64, 1, 200),
    (9, 3, 64, 70, 0),
    (4, 4, 72, 33, 31),
    (8, 2, 128, 5, 127),
    (7, 1, 128, 40, 90),
    (2, 1, 256, 65, 1),
    (4, 1, 24, 130, 0),
    (200, 1, 16, 2, 70),
)


def close(found: Tensor, expected: Tensor, tolerance: float, case: object) -> None:
    difference = float((found - expected).abs().max())
    assert difference <= tolerance, f"{case}: differs by {difference}, allowed {tolerance}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention(case: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    heads, kv_heads, dim, num_tokens, past = case
    generator = torch.Generator().manual_seed(num_tokens)
    cache = random_cache(kv_heads, past + num_tokens + 3, dim, dtype, generator)
    cache.k[:, past + num_tokens :] = torch.nan  # what lies behind the last token is never read
    cache.v[:, past + num_tokens :] = torch.nan
    q = torch.randn(num_tokens, heads, dim, generator=generator) * 2.0
    expected = REFERENCE.attention(q, cache, past, dim**-0.5)
    for isa in ISAS:
        first = native(isa, THREADS[0]).attention(q, cache, past, dim**-0.5)
        close(first, expected, ATTENTION_TOLERANCE, (isa, case))
        for threads in THREADS[1:]:
            found = native(isa, threads).attention(q, cache, past, dim**-0.5)
            assert_same_bits(found, first, (isa, threads, case))


@pytest.mark.parametrize("isa", ISAS)
def test_attention_of_a_token_does_not_depend_on_its_prompt(isa: str) -> None:
    """A prompt at once, in chunks, or token by token: the same bits."""
    kernels, generator = native(isa, 2), torch.Generator().manual_seed(7)
    cache = random_cache(2, 150, 64, torch.float16, generator)
    q = torch.randn(150, 6, 64, generator=generator)
    whole = kernels.attention(q, cache, 0, 0.125)
    for step in (1, 2, 7, 33, 100):
        parts = [
            kernels.attention(q[i : i + step].contiguous(), cache, i, 0.125)
            for i in range(0, 150, step)
        ]
        assert_same_bits(torch.cat(parts), whole, (isa, step))


def test_attention_passes_nan_and_large_scores_on() -> None:
    generator = torch.Generator().manual_seed(1)
    for isa in ISAS:
        cache = random_cache(1, 100, 32, torch.float32, generator)
        q = torch.randn(1, 2, 32, generator=generator)
        cache.k[0, 70] = 3e3  # scores near +-1e5: only one key counts
        found = native(isa, 2).attention(q, cache, 99, 1.0)
        close(found, REFERENCE.attention(q, cache, 99, 1.0), ATTENTION_TOLERANCE, isa)
        q[0, 1, 3] = torch.nan
        found = native(isa, 2).attention(q, cache, 99, 1.0)
        assert found[0, :32].isfinite().all()
        assert found[0, 32:].isnan().all()


class Block:
    """Random weights of one layer, bound to any backend."""

    def __init__(self, qk_norm: bool, bias: bool, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.hidden, self.inner, self.heads, self.kv_heads, self.dim = 96, 160, 6, 2, 32
        wide, narrow = self.heads * self.dim, self.kv_heads * self.dim

        def packed(rows: int, columns: int, bits: int) -> PackedWeight:
            weight = random_packed(Shape(rows, columns, bits, 32), g)
            weight.scale.mul_(0.25)
            return weight

        self.matrices = {
            "q": packed(wide, self.hidden, 8),
            "k": packed(narrow, self.hidden, 8),
            "v": packed(narrow, self.hidden, 4),
            "o": packed(self.hidden, wide, 4),
            "gate": packed(self.inner, self.hidden, 4),
            "up": packed(self.inner, self.hidden, 4),
            "down": packed(self.hidden, self.inner, 4),
        }
        rows = {name: weight.out_features for name, weight in self.matrices.items()}
        self.bias = {n: torch.randn(r, generator=g) if bias else None for n, r in rows.items()}
        self.norm = torch.randn(self.hidden, generator=g)
        self.q_norm = torch.randn(self.dim, generator=g) if qk_norm else None
        self.k_norm = torch.randn(self.dim, generator=g) if qk_norm else None
        self.rope = random_rope(200, self.dim // 2, g)
        self.cache = random_cache(self.kv_heads, 200, self.dim, torch.float16, g)
        self.generator = g

    def attention_weights(self, kernels: Kernels) -> AttentionWeights:
        return AttentionWeights(
            norm=self.norm,
            q=kernels.prepare(self.matrices["q"]),
            k=kernels.prepare(self.matrices["k"]),
            v=kernels.prepare(self.matrices["v"]),
            o=kernels.prepare(self.matrices["o"]),
            q_bias=self.bias["q"],
            k_bias=self.bias["k"],
            v_bias=self.bias["v"],
            o_bias=self.bias["o"],
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.dim,
            eps=1e-6,
            scale=self.dim**-0.5,
        )

    def mlp_weights(self, kernels: Kernels) -> MlpWeights:
        return MlpWeights(
            norm=self.norm,
            gate=kernels.prepare(self.matrices["gate"]),
            up=kernels.prepare(self.matrices["up"]),
            down=kernels.prepare(self.matrices["down"]),
            gate_bias=self.bias["gate"],
            up_bias=self.bias["up"],
            down_bias=self.bias["down"],
            eps=1e-6,
        )

    def fresh_cache(self) -> tuple[LayerCache, Sentinels]:
        sentinels = Sentinels()
        return LayerCache(sentinels.around(self.cache.k), sentinels.around(self.cache.v)), sentinels


def composed_attention(
    k: NativeKernels, block: Block, x: Tensor, cache: LayerCache, start: int
) -> Tensor:
    w, x = block.attention_weights(k), x.clone()
    biases = (w.q_bias, w.k_bias, w.v_bias)
    qkv = k.norm_linear(x, w.norm, w.eps, (w.q, w.k, w.v), biases)
    q = k.rope_append(qkv, w.num_heads, w.q_norm, w.k_norm, w.eps, block.rope, cache, start)
    k.linear_add(k.attention(q, cache, start, w.scale), w.o, w.o_bias, x)
    return x


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_blocks_equal_their_operations(qk_norm: bool, bias: bool) -> None:
    block = Block(qk_norm, bias, seed=3)
    for num_tokens, start in ((1, 0), (1, 130), (17, 60), (70, 0)):
        x = torch.randn(num_tokens, block.hidden, generator=block.generator)
        mlp_expected = x.clone()
        REFERENCE.mlp_block(mlp_expected, block.mlp_weights(REFERENCE))
        for isa in ISAS:
            cache, _ = block.fresh_cache()
            expected = composed_attention(native(isa, 1), block, x, cache, start)
            for threads in THREADS:
                kernels, case = native(isa, threads), (isa, threads, num_tokens, start)
                fresh, sentinels = block.fresh_cache()
                found = sentinels.around(x)
                bound = kernels.bind_attention(block.attention_weights(kernels))
                kernels.attention_block(found, bound, block.rope, fresh, start)
                assert_same_bits(found, expected, case)
                assert_same_bits(fresh.k, cache.k, case)
                assert_same_bits(fresh.v, cache.v, case)
                found = sentinels.around(x)
                kernels.mlp_block(found, kernels.bind_mlp(block.mlp_weights(kernels)))
                assert_same_bits(found, mlp_expected, case)  # no attention in it: the contract
                sentinels.check(case)


# A block quantizes the attention's output to 8 bits: where a value lies near a rounding boundary, a
# difference of 1e-6 moves it by one step, 1/127 of its largest (about 2), which a weight of at
# most 0.1 turns into 1.6e-3. Outputs change by 0.8 on average, and a wrong head, bias or norm
# changes them by as much.
BLOCK_TOLERANCE = 5e-3


def test_attention_block_is_close_to_the_reference() -> None:
    block = Block(qk_norm=True, bias=True, seed=5)
    x = torch.randn(40, block.hidden, generator=block.generator)
    cache, _ = block.fresh_cache()
    expected = x.clone()
    weights = REFERENCE.bind_attention(block.attention_weights(REFERENCE))
    REFERENCE.attention_block(expected, weights, block.rope, cache, 20)
    assert float((expected - x).abs().mean()) > 0.5  # the block does something
    for isa in ISAS:
        kernels = native(isa, 2)
        fresh, _ = block.fresh_cache()
        found = x.clone()
        bound = kernels.bind_attention(block.attention_weights(kernels))
        kernels.attention_block(found, bound, block.rope, fresh, 20)
        close(found, expected, BLOCK_TOLERANCE, isa)
        assert_same_bits(fresh.k, cache.k, isa)


def test_refusals_name_expected_and_found() -> None:
    kernels, generator = native("generic", 1), torch.Generator().manual_seed(0)
    packed = random_packed(Shape(8, 64, 4, 32), generator)
    weight = kernels.prepare(packed)
    with pytest.raises(KernelError, match=r"float32 \[tokens, 64\].*\[2, 32\]"):
        kernels.linear(torch.zeros(2, 32), weight)
    with pytest.raises(KernelError, match="strided"):
        kernels.linear(torch.zeros(64, 2).T, weight)
    with pytest.raises(KernelError, match=r"\[8\].*\[7\]"):
        kernels.linear(torch.zeros(2, 64), weight, torch.zeros(7))
    with pytest.raises(KernelError, match=r"ids in 0\.\.7.*8\.\.8"):
        kernels.embedding(torch.tensor([8]), weight)
    cache = random_cache(1, 4, 16, torch.float16, generator)
    with pytest.raises(KernelError, match=r">= 6, 16.*\[1, 4, 16\]"):
        kernels.attention(torch.zeros(2, 1, 16), cache, 4, 1.0)
    wide = random_cache(1, 4, 264, torch.float16, generator)
    with pytest.raises(KernelError, match="up to 256, found 264"):
        kernels.attention(torch.zeros(1, 1, 264), wide, 0, 1.0)
    with pytest.raises(KernelError, match=r"expected one of .*generic, found sse9"):
        NativeKernels(threads=1, isa="sse9")
    with pytest.raises(KernelError, match="at most: expected 1024, found 5000"):
        NativeKernels(threads=5000)
    with pytest.raises(KernelError, match="prepared by these kernels"):
        kernels.linear(torch.zeros(2, 64), REFERENCE.prepare(packed))
    assert kernels.linear(torch.zeros(0, 64), weight).shape == (0, 8)
