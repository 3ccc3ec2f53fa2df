"""Everything under the arithmetic contract: native equals reference bit for bit."""

# ruff: noqa: B023 (closures over loop variables are called within their turn of the loop)

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from kernel_cases import (
    ISAS,
    REFERENCE,
    THREADS,
    Sentinels,
    Shape,
    assert_same_bits,
    in_8_bits,
    native,
    random_cache,
    random_packed,
    random_rope,
    random_tokens,
)
from torch import Tensor

from localr1.kernels.api import Kernels, LayerCache, PackedWeight
from localr1.qtypes import SUPPORTED_BITS, Codes

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = (1, 2, 3, 4, 5, 7, 8, 13, 15, 16, 17, 33, 70)

# Chosen, not drawn: one row; one group; 7, 8, 9 and 17 groups around the 8 phases; rows around the
# vector widths 8 and 16; every scale type; codes at both ends, where 16-bit sums peak.
FIXED = (
    Shape(1, 32, 4, 32),
    Shape(1, 32, 8, 32, torch.float32),
    Shape(7, 224, 4, 32, torch.float16),
    Shape(8, 256, 8, 64, torch.float16),
    Shape(9, 288, 4, 32, torch.float32),
    Shape(15, 544, 8, 32),
    Shape(16, 128, 4, 128, zero=True),
    Shape(17, 384, 8, 128, torch.float16, zero=True),
    Shape(33, 320, 4, 64, torch.float32, zero=True),
    Shape(31, 576, 4, 32, extreme=True),
    Shape(31, 576, 8, 32, extreme=True),
    Shape(31, 256, 8, 32, zero=True, extreme=True),
    Shape(31, 256, 4, 32, zero=True, extreme=True),
    Shape(200, 576, 4, 32),
    Shape(40, 576, 5, 32),
    Shape(40, 576, 6, 64),
    Shape(31, 576, 5, 32, extreme=True),
    Shape(31, 576, 6, 32, extreme=True),
    Shape(31, 256, 5, 64, torch.float16, zero=True, extreme=True),
    Shape(31, 256, 6, 128, torch.float32, zero=True, extreme=True),
    Shape(40, 576, 4, 64, torch.float32, codes=Codes.NF4),
    Shape(7, 224, 4, 32, torch.float16, codes=Codes.NF4),
    Shape(31, 512, 4, 128, extreme=True, codes=Codes.NF4),
)


def drawn(
    count: int, seed: int, numbers_of_bits: Sequence[int] = SUPPORTED_BITS
) -> Iterator[tuple[Shape, int, torch.Generator]]:
    rng = random.Random(seed)
    fixed = [shape for shape in FIXED if shape.bits in numbers_of_bits]
    for i in range(count):
        group = rng.choice((32, 64, 128))
        if i < len(fixed):
            shape = fixed[i]
        else:
            shape = Shape(
                rng.randint(1, 70),
                group * rng.randint(1, 12),
                rng.choice(numbers_of_bits),
                group,
                rng.choice(DTYPES),
                zero=rng.random() < 0.3,
            )
            if shape.bits == 4 and not shape.zero and rng.random() < 0.4:
                shape = replace(shape, codes=Codes.NF4)
        yield shape, rng.choice(TOKENS), torch.Generator().manual_seed(seed + i)


class Outputs:
    """Makes every torch.empty of native.py the middle of a larger buffer."""

    def __init__(self) -> None:
        self.sentinels = Sentinels()

    def __enter__(self) -> Sentinels:
        def empty(*args: object, **kwargs: object) -> Tensor:
            return self.sentinels.around(torch.zeros(*args, **kwargs))  # type: ignore[call-overload]

        patched = SimpleNamespace(
            empty=empty,
            empty_like=lambda x: empty(x.shape),
            int8=torch.int8,
            float16=torch.float16,
        )
        self._patch = mock.patch("localr1.kernels.native.torch", patched)
        self._patch.start()
        return self.sentinels

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


def everywhere(case: object, run: Callable[[Kernels], Tensor], expected: Tensor) -> None:
    """run on every instruction set and number of threads returns expected, and only that."""
    for isa in ISAS:
        for threads in THREADS:
            with Outputs() as sentinels:
                found = run(native(isa, threads))
            assert_same_bits(found, expected, (isa, threads, case))
            sentinels.check((isa, threads, case))


def test_quantize_activations() -> None:
    for i, num_tokens in enumerate((*TOKENS, 200)):
        generator = torch.Generator().manual_seed(i)
        x = random_tokens(num_tokens, 32 * (1 + 3 * i), generator)
        q, scale = REFERENCE.quantize_activations(x)
        everywhere(("q", num_tokens), lambda k: k.quantize_activations(x)[0], q)
        everywhere(("scale", num_tokens), lambda k: k.quantize_activations(x)[1], scale)


def test_quantization_rounds_half_to_even() -> None:
    x = torch.zeros(1, 32)
    x[0, :5] = torch.tensor([127.0, 0.5, 1.5, 2.5, -2.5])  # scale 1, inverse 1
    expected = torch.zeros(1, 32, dtype=torch.int8)
    expected[0, :5] = torch.tensor([127, 0, 2, 2, -2], dtype=torch.int8)
    everywhere("half to even", lambda k: k.quantize_activations(x)[0], expected)


def test_unusual_values_follow_the_reference() -> None:
    """NaN and Inf reach the output as NaN or Inf, never as a number; tiny groups count as zero."""
    generator = torch.Generator().manual_seed(0)
    shape = Shape(20, 96, 4, 32)
    packed = random_packed(shape, generator)
    x = torch.randn(6, 96, generator=generator)
    x[0, 40] = torch.nan
    x[1, 3], x[2, 95] = torch.inf, -torch.inf
    x[3] = 0.0
    x[4] *= 1e-39
    x[5, 32:64] = 1e-45
    expected = REFERENCE.linear(x, REFERENCE.prepare(packed))
    assert not expected[:3].isfinite().any()
    assert expected[3:].isfinite().all()
    everywhere("unusual", lambda k: k.linear(x, k.prepare(packed)), expected)
    gated = REFERENCE.gate_up_silu(x, REFERENCE.prepare(packed), REFERENCE.prepare(packed))
    assert gated[0].isnan().all()
    everywhere("gate", lambda k: k.gate_up_silu(x, k.prepare(packed), k.prepare(packed)), gated)


@pytest.mark.parametrize("seed", [100, 200])
def test_linear(seed: int) -> None:
    for shape, num_tokens, generator in drawn(24, seed):
        packed = random_packed(shape, generator)
        x = random_tokens(num_tokens, shape.columns, generator)
        bias = torch.randn(shape.rows, generator=generator)
        weight = REFERENCE.prepare(packed)
        case = (shape, num_tokens)
        everywhere(case, lambda k: k.linear(x, k.prepare(packed)), REFERENCE.linear(x, weight))
        residual = torch.randn(num_tokens, shape.rows, generator=generator)
        expected = residual.clone()
        REFERENCE.linear_add(x, weight, bias, expected)

        def add(k: Kernels) -> Tensor:
            sentinels = Sentinels()
            out = sentinels.around(residual)
            k.linear_add(x, k.prepare(packed), bias, out)
            sentinels.check(case)
            return out

        everywhere((*case, "add"), add, expected)


def test_one_token_of_many_equals_the_token_alone() -> None:
    for shape, _, generator in drawn(24, 300):
        packed = random_packed(shape, generator)
        x = random_tokens(40, shape.columns, generator)
        for isa in ISAS:
            kernels = native(isa, 1)
            weight = kernels.prepare(packed)
            together = kernels.linear(x, weight)
            alone = torch.cat([kernels.linear(x[i : i + 1], weight) for i in range(40)])
            assert_same_bits(together, alone, (isa, shape))


def test_sums_at_their_peak() -> None:
    """All codes at one end and all activations at one: where sums of 16 bits are fullest."""
    shapes = [Shape(9, 96, bits, 32) for bits in SUPPORTED_BITS]
    for shape in (*shapes, Shape(9, 96, 4, 32, codes=Codes.NF4)):
        packed = random_packed(shape, torch.Generator().manual_seed(shape.bits))
        for word, sign in itertools.product((0, -1), (1.0, -1.0)):
            full = replace(packed, packed=torch.full_like(packed.packed, word))
            x = torch.full((5, 96), sign)
            expected = REFERENCE.linear(x, REFERENCE.prepare(full))
            everywhere((shape, word, sign), lambda k: k.linear(x, k.prepare(full)), expected)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_nf4_is_its_values_in_8_bits(group: int) -> None:
    """Rows that fill row blocks of both widths, and that do not; alone and in tiles of tokens."""
    for rows, num_tokens in ((64, 1), (64, 8), (21, 1), (21, 19)):
        generator = torch.Generator().manual_seed(rows + num_tokens)
        shape = Shape(rows, 9 * group, 4, group, torch.float32, codes=Codes.NF4)
        packed = random_packed(shape, generator)
        wide = in_8_bits(packed)
        x = random_tokens(num_tokens, shape.columns, generator)
        ids = torch.randint(0, rows, (num_tokens,), generator=generator)

        def run(k: Kernels, weight: PackedWeight) -> Tensor:
            prepared = k.prepare(weight)
            return torch.cat((k.linear(x, prepared), k.embedding(ids, prepared)), dim=1)

        expected = run(REFERENCE, wide)
        assert_same_bits(run(REFERENCE, packed), expected, shape)
        everywhere(shape, lambda k: run(k, wide), expected)
        everywhere(shape, lambda k: run(k, packed), expected)
        for isa in ISAS:
            codes, twice = (native(isa, 1).prepare(each).nbytes for each in (packed, wide))
            blocks = -(-rows // native(isa, 1).rows_per_block) * native(isa, 1).rows_per_block
            assert twice - codes == blocks * shape.columns // 2


def test_norm_linear() -> None:
    for shape, num_tokens, generator in drawn(26, 400):
        packs = [
            random_packed(Shape(rows, shape.columns, bits, shape.group, shape.dtype), generator)
            for rows, bits in ((shape.rows, shape.bits), (5, 8), (17, 6))
        ]
        biases = (torch.randn(shape.rows, generator=generator), None, torch.randn(17))
        x = random_tokens(num_tokens, shape.columns, generator)
        norm = torch.randn(shape.columns, generator=generator)

        def run(k: Kernels) -> Tensor:
            weights = tuple(k.prepare(p) for p in packs)
            return k.norm_linear(x, norm, 1e-5, weights, biases)

        everywhere((shape, num_tokens), run, run(REFERENCE))


def test_gate_up_silu() -> None:
    for shape, num_tokens, generator in drawn(28, 500):
        gate, up = random_packed(shape, generator), random_packed(shape, generator)
        x = random_tokens(num_tokens, shape.columns, generator)
        expected = REFERENCE.gate_up_silu(x, REFERENCE.prepare(gate), REFERENCE.prepare(up))
        everywhere(
            (shape, num_tokens),
            lambda k: k.gate_up_silu(x, k.prepare(gate), k.prepare(up)),
            expected,
        )


def test_embedding() -> None:
    for shape, num_tokens, generator in drawn(26, 600):
        packed = random_packed(shape, generator)
        ids = torch.randint(0, shape.rows, (num_tokens,), generator=generator)
        expected = REFERENCE.embedding(ids, REFERENCE.prepare(packed))
        everywhere((shape, num_tokens), lambda k: k.embedding(ids, k.prepare(packed)), expected)


def test_rms_norm() -> None:
    """The sum of squares has a fixed order too, so the norm is equal and not merely close."""
    for i, size in enumerate((1, 7, 8, 31, 32, 63, 64, 65, 96, 130, 576, 1000)):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(1 + i, size, generator=generator) * 3.0
        weight = torch.randn(size, generator=generator)
        expected = REFERENCE.rms_norm(x, weight, 1e-6)
        everywhere(size, lambda k: k.rms_norm(x, weight, 1e-6), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_append(dtype: torch.dtype, normed: bool) -> None:
    cases = ((8, 4, 1, 1), (64, 32, 3, 5), (64, 16, 1, 17), (72, 27, 5, 9), (256, 128, 2, 3))
    for i, (dim, pairs, groups, num_tokens) in enumerate(cases):
        generator = torch.Generator().manual_seed(i)
        heads, start = 2 * groups, 3 * i
        qkv = torch.randn(num_tokens, (heads + 2 * groups) * dim, generator=generator)
        qkv[0, :4] = torch.tensor([1e-7, -3e-8, 70000.0, 65519.0])  # float16: subnormal, infinite
        qkv[-1, -4:] = torch.tensor([1e-7, -3e-8, 70000.0, 65519.0])
        q_norm = torch.randn(dim, generator=generator) if normed else None
        k_norm = torch.randn(dim, generator=generator) if normed else None
        rope = random_rope(40, pairs, generator)
        before = random_cache(groups, 40, dim, dtype, generator)

        def run(k: Kernels) -> Tensor:
            sentinels = Sentinels()
            cache = LayerCache(sentinels.around(before.k), sentinels.around(before.v))
            q = k.rope_append(qkv, heads, q_norm, k_norm, 1e-6, rope, cache, start)
            sentinels.check("cache")
            return torch.cat([t.float().flatten() for t in (q, cache.k, cache.v)])

        everywhere((dim, pairs, groups), run, run(REFERENCE))


def test_prepared_size_is_the_layouts() -> None:
    from localr1.kernels import _native

    for shape, _, generator in drawn(26, 700):
        for isa in ISAS:
            kernels = native(isa, 1)
            weight = kernels.prepare(random_packed(shape, generator))
            rows = 16 if isa == "avx512vnni" else 8
            scale_type = DTYPES.index(shape.dtype)
            assert weight.nbytes == _native.matrix_bytes(
                shape.rows,
                shape.columns,
                rows,
                shape.scheme.code_type,
                shape.group,
                scale_type,
                shape.zero,
            )
    whole = Shape(576, 576, 4, 32)
    weight = native(ISAS[0], 1).prepare(random_packed(whole, torch.Generator()))
    assert weight.nbytes * 8 == whole.scheme.bits_per_weight * 576 * 576
