"""Latent attention in one native call: close to the reference within a named tolerance, and the
same bits for any number of threads, for a token alone and among others, and whatever is split.
"""

import dataclasses

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
    random_packed,
    random_rope,
)
from torch import Tensor

from localr1.errors import KernelError
from localr1.kernels.api import Kernels, LatentWeights, PackedWeight, RopeTable
from localr1.kernels.cache_rows import load_rows, row_width, store_rows

# The attention's output is quantized to 8 bits: where a value lies near a rounding boundary,
# float32 sums in another order move it by one step, 1/127 of its largest (about 2), which a weight
# of about 0.02 turns into 3e-4; a few coincide. Outputs change by 0.3 and more; a head, position,
# norm or scale that is wrong changes them by as much.
LATENT_TOLERANCE = 5e-3


@dataclasses.dataclass(frozen=True)
class Sizes:
    """heads, latent, key (without a position), rope, value; rank of the queries' latent or None."""

    heads: int
    latent: int
    key: int
    rope: int
    value: int
    hidden: int = 64
    rank: int | None = None
    dtype: torch.dtype = torch.bfloat16


# Around tiles of 32 rows and whole vectors: 1, 4, 7, 33 and 128 heads; sizes that are no multiple
# of 16 where none need be (key, rope and latent of no packed matrix's columns).
SIZES = (
    Sizes(1, 16, 8, 2, 32),
    Sizes(4, 20, 12, 8, 8, rank=32),
    Sizes(8, 64, 32, 16, 32, hidden=96, dtype=torch.float16),
    Sizes(7, 33, 9, 6, 32, dtype=torch.float32),
    Sizes(33, 40, 16, 8, 32, rank=64),
    Sizes(128, 512, 24, 64, 24, rank=96),
)
# (tokens, past): one and several, chunks of 64 and spans of 512 positions and their neighbours. The
# last two are computed in expanded form by the second to fifth of SIZES, the second from 21 tokens.
STEPS = ((1, 0), (1, 63), (1, 64), (5, 0), (2, 511), (1, 1100), (40, 500), (193, 0), (120, 70))


class Block:
    def __init__(self, sizes: Sizes, bias: bool, positions: int, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.sizes, self.generator = sizes, g
        s = sizes

        def packed(rows: int, columns: int, bits: int = 8) -> PackedWeight:
            weight = random_packed(Shape(rows, columns, bits, 32), g)
            weight.scale.copy_(torch.randn(weight.scale.shape, generator=g))
            weight.scale.mul_((1.0 if bits == 8 else 16.0) / (74.0 * columns**0.5))
            return weight

        reads = s.hidden if s.rank is None else s.rank
        self.matrices = {
            "q": packed(s.heads * (s.key + s.rope), reads),
            "kv_down": packed(s.latent + s.rope, s.hidden, 4),
            "o": packed(s.hidden, s.heads * s.value),
        }
        if s.rank is not None:
            self.matrices["q_down"] = packed(s.rank, s.hidden)
        self.biases = {
            name: torch.randn(w.out_features, generator=g) * 0.1 if bias else None
            for name, w in self.matrices.items()
        }
        self.norm = torch.randn(s.hidden, generator=g)
        self.q_norm = None if s.rank is None else torch.randn(s.rank, generator=g)
        self.kv_norm = torch.randn(s.latent, generator=g)
        shape = torch.randn(s.heads, s.key, s.latent, generator=g) / s.latent**0.5
        self.key_up = shape.to(s.dtype)
        shape = torch.randn(s.heads, s.latent, s.value, generator=g) / s.latent**0.5
        self.value_up = shape.to(s.dtype)
        self.rope = random_rope(positions, s.rope // 2, g)
        self.rows = torch.randn(positions, s.latent + s.rope, generator=g)

    def weights(self, kernels: Kernels) -> LatentWeights:
        prepared = {name: kernels.prepare(weight) for name, weight in self.matrices.items()}
        return LatentWeights(
            norm=self.norm,
            q_down=prepared.get("q_down"),
            q_norm=self.q_norm,
            q=prepared["q"],
            kv_down=prepared["kv_down"],
            kv_norm=self.kv_norm,
            key_up=self.key_up,
            value_up=self.value_up,
            o=prepared["o"],
            q_down_bias=self.biases.get("q_down"),
            q_bias=self.biases["q"],
            kv_down_bias=self.biases["kv_down"],
            o_bias=self.biases["o"],
            rope_size=self.sizes.rope,
            eps=1e-5,
            latent_eps=1e-6,
            scale=1.5 * (self.sizes.key + self.sizes.rope) ** -0.5,
        )

    def run(
        self, kernels: Kernels, x: Tensor, start: int, dtype: torch.dtype = torch.float16
    ) -> tuple[Tensor, Tensor]:
        """(x after the block, the cache after it); what lies behind the last token is NaN."""
        sentinels = Sentinels()
        rows = self.rows.clone()
        rows[start:] = torch.nan
        if dtype == torch.int8:
            in_8_bits = rows.new_empty(len(rows), row_width(rows.shape[1], dtype), dtype=torch.int8)
            store_rows(in_8_bits, rows)
            rows = in_8_bits
        cache, found = sentinels.around(rows.to(dtype)), sentinels.around(x)
        bound = kernels.bind_latent(self.weights(kernels))
        kernels.latent_block(found, bound, self.rope, cache, start)
        sentinels.check((self.sizes, start))
        return found, cache


def same_cache(
    found: Tensor, expected: Tensor, end: int, case: object, width: int | None = None
) -> None:
    """width: values of a row, where it stands in 8 bits."""
    assert_same_bits(found[:end], expected[:end], case)
    rest = found[end:] if width is None else load_rows(found[end:], width)
    assert rest.isnan().all(), case


@pytest.mark.parametrize("cached", ["floats", "8 bits"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"{s.heads}")
def test_latent_block(sizes: Sizes, cached: str) -> None:
    steps = STEPS if sizes.heads < 128 else STEPS[:4]
    for seed, (tokens, start) in enumerate(steps):
        block = Block(sizes, seed % 2 == 1, start + tokens + 3, seed)
        dtype = torch.float16 if seed % 3 else torch.float32
        if cached == "8 bits":
            dtype = torch.int8
        x = torch.randn(tokens, sizes.hidden, generator=block.generator)
        expected, expected_cache = block.run(REFERENCE, x, start, dtype)
        assert float((expected - x).abs().mean()) > 0.1
        for isa in ISAS:
            first: Tensor | None = None
            for threads in THREADS:
                case = (isa, threads, sizes, tokens, start)
                found, cache = block.run(native(isa, threads), x, start, dtype)
                width = sizes.latent + sizes.rope if dtype == torch.int8 else None
                same_cache(cache, expected_cache, start + tokens, case, width)
                difference = float((found - expected).abs().max())
                assert difference <= LATENT_TOLERANCE, (case, difference)
                first = found if first is None else first
                assert_same_bits(found, first, case)


# Absorbed: at once (spans in turn), in parts, or one by one (spans side by side). Expanded: in one,
# two or more tiles of queries.
CUTS = {"absorbed": (500, 50, (1, 7, 40)), "expanded": (70, 390, (65, 78, 130, 195))}


@pytest.mark.parametrize("form", CUTS)
@pytest.mark.parametrize("isa", ISAS)
def test_a_token_does_not_depend_on_its_step(isa: str, form: str) -> None:
    """Within one form the same bits."""
    kernels = native(isa, 2)
    start, tokens, steps = CUTS[form]
    block = Block(SIZES[2], False, start + tokens)
    x = torch.randn(tokens, block.sizes.hidden, generator=block.generator)
    whole, cache = block.run(kernels, x, start)
    for step in steps:
        again, sentinel = x.clone(), block.rows.half()
        bound = kernels.bind_latent(block.weights(kernels))
        for i in range(0, tokens, step):
            part = again[i : i + step]
            kernels.latent_block(part, bound, block.rope, sentinel, start + i)
        assert_same_bits(again, whole, (isa, step))
        assert_same_bits(sentinel, cache, (isa, step))


PLANTED = {
    "scale": lambda w: dataclasses.replace(w, scale=1.2 * w.scale),
    "latent_eps": lambda w: dataclasses.replace(w, latent_eps=0.5),
    "a head's keys": lambda w: dataclasses.replace(w, key_up=w.key_up.roll(1, 0).contiguous()),
    "a head's values": lambda w: dataclasses.replace(w, value_up=w.value_up.roll(1, 0)),
    "kv_norm": lambda w: dataclasses.replace(w, kv_norm=w.kv_norm.roll(1)),
    "q_norm": lambda w: dataclasses.replace(w, q_norm=w.q_norm.roll(1)),
    "bias": lambda w: dataclasses.replace(w, o_bias=None),
}


@pytest.mark.parametrize("error", PLANTED)
def test_the_tolerance_sees(error: str) -> None:
    block = Block(SIZES[4], True, 80)
    x = torch.randn(3, block.sizes.hidden, generator=block.generator)
    expected, _ = block.run(REFERENCE, x, 70)
    right = block.weights
    block.weights = lambda kernels: PLANTED[error](right(kernels))  # type: ignore[method-assign]
    found, _ = block.run(native(ISAS[0], 1), x, 70)
    assert float((found - expected).abs().max()) > 2 * LATENT_TOLERANCE


def test_nan_reaches_the_tokens_that_see_it() -> None:
    block = Block(SIZES[2], False, 80)
    x = torch.randn(3, block.sizes.hidden, generator=block.generator)
    x[1, 4] = torch.nan
    for isa in ISAS:
        found, _ = block.run(native(isa, 2), x, 70)
        assert found[1:].isnan().all()


def test_what_does_not_fit_is_refused() -> None:
    block, kernels = Block(SIZES[1], False, 10), native(ISAS[0], 1)
    for each in (kernels, REFERENCE):
        weights = block.weights(each)
        with pytest.raises(KernelError, match=r"q_norm: expected .*\[64\].*\[32\]"):
            each.bind_latent(dataclasses.replace(weights, q_down=weights.o))
        with pytest.raises(KernelError, match="value_up"):
            each.bind_latent(dataclasses.replace(weights, value_up=weights.value_up.mT))
        bound = each.bind_latent(weights)
        x, cache = torch.zeros(2, 64), torch.zeros(10, 28)
        with pytest.raises(KernelError, match=r">= 11, 28.*\[10, 28\]"):
            each.latent_block(x, bound, block.rope, cache, 9)
        with pytest.raises(KernelError, match="start -1"):
            each.latent_block(x, bound, block.rope, cache, -1)
        short = RopeTable(block.rope.cos[:4], block.rope.sin[:4])
        with pytest.raises(KernelError, match="rope table"):
            each.latent_block(x, bound, short, cache, 3)
