"""The cache in 8 bits: rows as the reference writes them, bit for bit, and attention that reads
them; half the memory, and answers that stay what they were."""

import io
from contextlib import closing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from localr1.cache.dense import DenseCache
from localr1.cli.models import model_to_run
from localr1.cli.output import Output
from localr1.embedded import R1_NANO
from localr1.engine.engine import Engine
from localr1.engine.events import Delta, GenerationParams
from localr1.errors import KernelError, UsageError
from localr1.experts.workspace import Packed, cache_bytes_per_token, cache_in_8_bits
from localr1.kernels.api import LayerCache, RopeTable
from localr1.kernels.cache_rows import GROUP, load_rows, row_width, store_rows
from localr1.kernels.native import NativeKernels, available_isas
from localr1.kernels.reference import ReferenceKernels
from localr1.load import load_engine
from localr1.models.step import Step
from localr1.sampler import SamplingParams
from localr1.settings import Settings

ATTENTION_TOLERANCE = 2e-5
"""Of attention over the same rows, relative to the largest: sums in another order."""


def rows_of(values: Tensor) -> Tensor:
    rows = torch.empty(
        *values.shape[:-1], row_width(values.shape[-1], torch.int8), dtype=torch.int8
    )
    store_rows(rows, values)
    return rows


@pytest.mark.parametrize("count", [8, 32, 64, 80, 96, 576])
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1.0, 300.0])
def test_a_value_is_off_by_half_a_step_at_most(count: int, size: float) -> None:
    values = size * torch.randn(50, count, generator=torch.Generator().manual_seed(count))
    rows = rows_of(values)
    assert rows.shape[-1] == count + 2 * -(-count // GROUP)
    found = load_rows(rows, count)
    for first in range(0, count, GROUP):
        part = slice(first, first + GROUP)
        step = values[:, part].abs().amax(-1, keepdim=True) / 127
        # Half a step of the scale, which float16 rounds to 11 digits; one below 2**-14 has
        # fewer, so that 127 of them may end before the largest value.
        off = (0.502 * step).clamp(min=127 * 2.0**-25)
        assert ((found - values)[:, part].abs() <= off).all()
    assert ((found - values).abs().amax() > 0).item()


def test_edges_of_a_row() -> None:
    values = torch.zeros(6, 64)
    values[1, :32] = 1e-9  # Below what a float16 scale can say: zeros.
    values[2, 3] = torch.nan
    values[3, 40] = torch.inf
    values[4] = -127.0
    found = load_rows(rows_of(values), 64)
    assert not found[:2].any()
    assert found[2, :32].isnan().all()
    assert not found[2, 32:].any()
    assert found[3, 32:].isnan().all()
    assert (found[4] == -127.0).all()


def empty_cache(heads: int, capacity: int, head_dim: int) -> LayerCache:
    """All 77, which no code of these rows is behind their end."""
    shape = (heads, capacity, row_width(head_dim, torch.int8))
    return LayerCache(*(torch.full(shape, 77, dtype=torch.int8) for _ in range(2)))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("head_dim", [16, 48, 64, 128])
@pytest.mark.parametrize("threads", [1, 3])
def test_native_rows_and_attention_are_the_references(
    isa: str, head_dim: int, threads: int
) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    heads, kv_heads, tokens, start, capacity = 4, 2, 70, 9, 90
    native, reference = NativeKernels(threads, isa), ReferenceKernels()
    angles = torch.randn(capacity, head_dim // 2, generator=generator)
    rope = RopeTable(angles.cos().contiguous(), angles.sin().contiguous())
    ours, theirs = (empty_cache(kv_heads, capacity, head_dim) for _ in range(2))
    for first, count in ((0, start), (start, tokens)):
        qkv = torch.randn(count, (heads + 2 * kv_heads) * head_dim, generator=generator)
        qkv[-1, -5] = 1e5
        expected = reference.rope_append(qkv, heads, None, None, 1e-6, rope, theirs, first)
        q = native.rope_append(qkv, heads, None, None, 1e-6, rope, ours, first)
        assert torch.equal(q, expected)
    assert torch.equal(ours.k, theirs.k)
    assert torch.equal(ours.v, theirs.v)
    assert (ours.k[:, start + tokens :] == 77).all(), "nothing behind the last row"
    out = native.attention(q, ours, start, 0.3)
    wanted = reference.attention(q, theirs, start, 0.3)
    assert (out - wanted).abs().max() <= ATTENTION_TOLERANCE * wanted.abs().max()
    # As for the other kinds: the same bits for a token alone.
    alone = native.attention(q[-1:].contiguous(), ours, start + tokens - 1, 0.3)
    assert torch.equal(alone[0], out[-1])


def test_rows_of_another_width_are_refused() -> None:
    cache = LayerCache(*(torch.zeros(2, 8, 64, dtype=torch.int8) for _ in range(2)))
    with pytest.raises(KernelError, match=r"int8 \[heads, >= 1, 68\]"):
        NativeKernels(1).attention(torch.zeros(1, 2, 64), cache, 0, 1.0)


@settings(max_examples=60, deadline=None)
@given(heads=st.integers(1, 8), head_dim=st.sampled_from([16, 64, 80, 128]))
def test_a_dense_cache_takes_8_and_a_half_bits_a_value(heads: int, head_dim: int) -> None:
    cache = DenseCache(3, heads, head_dim, torch.int8, 100)
    assert cache.position_bytes == 3 * heads * 2 * (head_dim + 2 * -(-head_dim // 32))


# Whole models.


def final_logits(engine: Engine, ids: list[int]) -> Tensor:
    cache = engine.model.new_cache(len(ids))
    logits = [
        engine.model.forward(Step(torch.tensor(ids[at : at + 24]), at, all_logits=True), cache)
        for at in range(0, len(ids), 24)
    ]
    return torch.cat(logits).log_softmax(-1)


@pytest.mark.parametrize("packed", [True, False])
def test_the_embedded_model_says_the_same_in_half_the_memory(packed: bool) -> None:
    output = Output(io.StringIO(), io.StringIO())
    path = model_to_run("r1-nano", Settings.from_environment(), output) if packed else R1_NANO
    with (
        closing(load_engine(path, threads=1)) as whole,
        closing(load_engine(path, threads=1, kv_bits=8)) as narrow,
    ):
        prompt = whole.prompt([{"role": "user", "content": "What is 47 * 86?"}])
        params = GenerationParams(SamplingParams(temperature=0.0), 300)
        texts = [
            "".join(e.text for e in engine.generate(prompt.ids, params) if isinstance(e, Delta))
            for engine in (whole, narrow)
        ]
        assert "\\boxed{4042}" in texts[0]
        assert "\\boxed{4042}" in texts[1]
        ids = [*prompt.ids, *whole.tokenizer.encode(texts[0])]
        exact, found = (final_logits(engine, ids) for engine in (whole, narrow))
        divergence = (exact.exp() * (exact - found)).sum(-1).mean().item()
        assert 0.0 < divergence < 0.01, "a dropped scale gives more than 1"
        caches = [engine.sequence.cache for engine in (whole, narrow)]
        bits = 16 if packed else 32
        # 80 values and three scales of 16 bits.
        assert caches[0].position_bytes * 8 == 6 * 80 * bits
        assert caches[1].position_bytes == 6 * (80 + 2 * 3)
        config = narrow.model.config
        planned = cache_bytes_per_token(config, Packed(packed, packed, packed, True))
        assert planned == caches[1].position_bytes
        assert narrow.looks_ahead == packed


def test_only_8_and_16_bits_mean_something() -> None:
    assert [cache_in_8_bits(bits) for bits in (None, 16, 8)] == [False, False, True]
    with pytest.raises(UsageError, match="--kv-bits: expected 8 or 16, found 4"):
        cache_in_8_bits(4)
