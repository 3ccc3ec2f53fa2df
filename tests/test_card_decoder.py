"""Whole layers on a card, on the model of one that runs the real kernels: what it says is what the
CPU says, a token takes one wait of the host, and a card that fails or is full costs one error."""

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from card_models import (
    CAPACITY,
    CASES,
    Placed,
    on_host,
    placed,
    placed_on,
    rows_per_block,
    run,
    some_cards,
    source,
)
from driver_model import LARGE, ModelDriver
from gpu_model import skip_where_there_is_no_model
from kernel_cases import assert_same_bits, in_8_bits
from packed_models import SHAPE, pack, packed_checkpoint
from test_models_quantized import SAME_BLOCKS, relative
from tiny_models import MemoryCheckpoint, prompt, run_in_chunks, tiny_transformer
from torch import Tensor

from localr1.cache.sequence import Cache
from localr1.candidates import Candidates, Sought
from localr1.card import layers as card_layers
from localr1.card import selection, workspace
from localr1.card.cache import CardCache
from localr1.card.decoder import CardDecoder
from localr1.card.loading import CardRoom, put_on_cards
from localr1.card.region import Region
from localr1.card.step import StepLaunches
from localr1.card.weights import place_side_by_side
from localr1.card.workspace import Sizes
from localr1.errors import ContextError, DeviceError, KernelError, MemoryLimitError, UsageError
from localr1.kernels.api import PackedWeight
from localr1.kernels.native import NativeKernels
from localr1.kernels.native_weight import NativeWeight
from localr1.models.api import Model
from localr1.models.decoder import Decoder
from localr1.models.registry import load_model
from localr1.models.step import Step
from localr1.qtypes import Codes, QuantScheme
from localr1.sampler import TOTAL_ERROR

DRIVERS: dict[str, dict[str, Any]] = {
    "late": {"seed": 2},
    "at once": {"seed": 1, "eager": True},
    "pageable": {"seed": 0, "pinned": False},
}


def model_driver(**changes: Any) -> ModelDriver:
    skip_where_there_is_no_model()
    return ModelDriver(rows_per_block(), **changes)


@pytest.mark.parametrize(
    ("case", "bits", "kind"),
    [
        ("llama-mqa-biases", 4, "late"),
        ("llama-mqa-biases", 8, "pageable"),
        ("qwen2-tied", 8, "late"),
        ("qwen2-tied", 4, "at once"),
        ("qwen3", 4, "pageable"),
        ("qwen3", 8, "at once"),
    ],
)
def test_logits_are_those_of_the_cpu(
    case: str, bits: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all tokens, in chunks; the same bits behind a prompt in tiles, and of several runs.
    Only attention's sums differ: the first layer's cache has the CPU's bits."""
    monkeypatch.setattr(workspace, "MOST_TOKENS", 64)
    ids = prompt(0, 90)
    with placed(case, bits, driver=model_driver(**DRIVERS[kind])) as setup:
        found = run_in_chunks(setup.model, ids, [67, 1, 9])
        expected = run_in_chunks(setup.host, ids, [67, 1, 9])
        assert relative(found, expected) < SAME_BLOCKS
        in_tiles = products_in_tiles(setup)
        assert in_tiles == 5 * 3 + 2  # Of 64 tokens: the layers, and the head in two parts.
        assert_same_bits(run(setup.model, ids, 31, 2), found[-3:], "in tiles and without")
        assert products_in_tiles(setup) == in_tiles
        assert_first_cache_is_the_cpus(setup)


def test_nf4_is_its_values_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone and in tiles; the codes are those of integers, read as NF4's."""
    monkeypatch.setattr(workspace, "MOST_TOKENS", 64)
    found, launched = [], []
    for convert in (lambda weight: weight, in_8_bits):
        kernels = NativeKernels(threads=1)
        prepare = kernels.prepare

        def prepare_nf4(
            weight: PackedWeight,
            convert: Callable[[PackedWeight], PackedWeight] = convert,
            prepare: Callable[[PackedWeight], NativeWeight] = prepare,
        ) -> NativeWeight:
            if weight.scheme.bits != 4:
                return prepare(weight)
            scheme = dataclasses.replace(weight.scheme, codes=Codes.NF4)
            return prepare(convert(dataclasses.replace(weight, scheme=scheme)))

        monkeypatch.setattr(kernels, "prepare", prepare_nf4)
        host = load_model(source("qwen3"), kernels)
        assert isinstance(host, Decoder)
        driver = model_driver()
        model = put_on_cards(host, [CardRoom(driver, LARGE)], CAPACITY, None)
        try:
            found.append(run(model, prompt(0, 90), 88, 2))
        finally:
            model.close()
        launched.append(set(driver.launched))
    assert {"matvec_nf4_t1", "matmul_nf4"} <= launched[0]
    assert not any("nf4" in kernel for kernel in launched[1])
    assert_same_bits(found[0], found[1], "on a card")


def products_in_tiles(setup: Placed) -> int:
    return sum(name.startswith("matmul_int") for name in setup.driver.launched)


def assert_first_cache_is_the_cpus(setup: Placed) -> None:
    config, ids = setup.host.config, prompt(0, 70)
    on_card, on_cpu = setup.model.new_cache(CAPACITY), setup.host.new_cache(CAPACITY)
    for model, cache in ((setup.model, on_card), (setup.host, on_cpu)):
        model.forward(Step(ids, 0), cache)
    assert isinstance(on_card, CardCache)
    assert on_card.on_card is not None
    first, expected = on_card.on_card[0].layers[0], on_cpu.layer(0)
    shape = (config.num_kv_heads, CAPACITY, config.head_dim)
    stream = setup.driver.stream()
    for address, wanted in ((first.keys, expected.k), (first.values, expected.v)):
        copied = torch.empty(shape, dtype=torch.float16)
        setup.driver.copy_out(copied.data_ptr(), address, copied.nbytes, stream)
        setup.driver.synchronize(stream)
        assert_same_bits(copied[:, :70], wanted[:, :70], "cache of the first layer")


@pytest.mark.parametrize("case", CASES)
def test_greedy_text_is_that_of_the_cpu(case: str) -> None:
    """Up to the first token where the CPU itself is undecided: random weights come to such ties."""
    with placed(case) as setup:
        on_card, on_cpu = setup.model.new_cache(64), setup.host.new_cache(64)
        ids, said = prompt(1, 5), 0
        while said < 40:
            found = setup.model.forward(Step(ids, on_card.length), on_card)[0]
            expected = setup.host.forward(Step(ids, on_cpu.length), on_cpu)[0]
            ids = expected.argmax()[None]
            if int(found.argmax()) != int(ids):
                first, second = expected.topk(2).values
                assert float(first - second) < SAME_BLOCKS * float(expected.norm())
                break
            said += 1
        assert said >= 30


def selected(model: CardDecoder, cache: Cache[Any], ids: Tensor, sought: Sought) -> Candidates:
    found = model.select(Step(ids, cache.length), cache, sought)
    assert isinstance(found, Candidates)
    return found


@pytest.mark.parametrize("kind", DRIVERS)
def test_candidates_are_copied_and_no_logits(kind: str) -> None:
    """Of a prompt and one by one, at every depth in the same graph: those among the logits; all of
    them where that is asked."""
    ids, depths = prompt(5, 24), [0.0, 0.5, 1.0, 0.0, 2.0, 0.25, 0.5, 0.0, 1.0]
    with placed(driver=model_driver(**DRIVERS[kind])) as setup:
        wanted = run_in_chunks(setup.model, ids, [8, 8])[15:].numpy()
        cache = setup.model.new_cache(64)
        for number, (logits, depth) in enumerate(zip(wanted, depths, strict=True)):
            step = ids[:16] if number == 0 else ids[15 + number : 16 + number]
            found = selected(setup.model, cache, step, Sought(depth, 1.5))
            assert setup.driver.copied_out == setup.model.layers.sizes.selection.nbytes
            candidates = logits >= logits.max() - np.float32(depth)
            assert found.floor == logits.max() - np.float32(depth)
            assert found.ids.tolist() == np.flatnonzero(candidates).tolist()
            assert found.logits.tolist() == logits[candidates].tolist()
            weights = np.exp(1.5 * (logits[~candidates].astype(np.float64) - logits.max()))
            assert found.num_rest == weights.size
            assert found.rest == pytest.approx(weights.sum(), rel=TOTAL_ERROR)
            if depth == 0.5:
                assert_same_bits(found.all_logits()[0], torch.from_numpy(logits), number)
        assert setup.driver.launched.count("gather_candidates") == 9
        setup.model.forward(Step(ids[:1], 24), cache)
        assert setup.driver.copied_out == 4 * setup.host.config.vocab_size


def test_without_a_head_on_the_card_or_room_for_candidates_there_are_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(selection, "CAPACITY", 20)
    ids = prompt(5, 6)
    for asked in (2, None):
        with placed(asked=asked) as setup:
            model = setup.model
            wanted = model.forward(Step(ids, 0), model.new_cache(6))
            found = model.select(Step(ids, 0), model.new_cache(6), Sought(100.0, 1.0))
            assert isinstance(found, Tensor)
            assert_same_bits(found, wanted, "logits")


@pytest.mark.parametrize("kind", ["enter", "copy_out", "synchronize"])
def test_a_card_that_fails_when_all_logits_are_fetched(kind: str) -> None:
    ids = prompt(0, 5)
    with placed() as setup:
        cache = setup.model.new_cache(40)
        found = selected(setup.model, cache, ids[:4], Sought(1.0, 1.0))
        setup.driver.arm(kind, 1, ILLEGAL, lost=True)
        with pytest.raises(DeviceError, match="ILLEGAL_ADDRESS"):
            found.all_logits()
        assert setup.model.is_lost
        assert cache.length == 0
        expected = setup.host.forward(Step(ids, 0), setup.host.new_cache(5))
        assert_same_bits(setup.model.forward(Step(ids, 0), cache), expected, "the CPU's")


@pytest.mark.parametrize("cards", [1, 2])
def test_logits_that_are_no_numbers_come_back_whole(cards: int) -> None:
    """For the host to say so; what is next is sought there again."""
    ids = prompt(5, 6)
    with placed_on(some_cards(*[{}] * cards), [1 << 40] * cards) as setup:
        x = setup.host.embed(ids[:1])
        layers, memory = setup.model.layers, setup.model.layers.sequence()
        for value in (1.0, float("nan"), 1.0):
            found = layers.select(value * x, 0, memory, layers.whole, Sought(1.0, 1.0))
            if value == 1.0:
                assert isinstance(found, Candidates)
                continue
            assert isinstance(found, Tensor)
            assert found.shape == (1, setup.host.config.vocab_size)
            assert found.isnan().any()
        layers.give_back(memory)


def test_more_positions_than_a_span() -> None:
    """Attention over several spans of 128 positions, and the last token of a long prompt."""
    ids = prompt(2, 300)
    with placed() as setup:
        found = run(setup.model, ids, 128, 3)
        assert relative(found, run(setup.host, ids, 128, 3)) < SAME_BLOCKS


def test_bits_do_not_depend_on_how_a_prompt_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once or in chunks, with attention in parts, and in shorter runs."""
    ids = prompt(3, 153)
    with placed() as setup:
        whole = run(setup.model, ids, 150, 3)
        launched = setup.driver.launched
        assert launched.count("matmul_int4") == 3 * 5
        assert launched.count("merge_spans") == 3 * (1 + 3)
        assert_same_bits(run(setup.model, ids, 67, 3), whole, "in chunks")
    # A window so long that there is room for the spans of 11 tokens; what a prompt does not reach
    # leaves its own to others.
    monkeypatch.setattr(workspace, "ATTENTION_BYTES", 11 * 4 * 3 * 4 * (32 + 2))
    with placed() as setup:
        assert setup.model.layers.sizes.most_states == 11 * 4 * 3
        assert_same_bits(run(setup.model, ids, 150, 3), whole, "attention in parts")
        assert setup.driver.launched.count("merge_spans") == 3 * (10 + 3)
    monkeypatch.setattr(workspace, "RUN_BYTES", 70 * 3400)
    with placed() as setup:
        assert setup.model.layers.sizes.most_tokens == 64
        assert_same_bits(run(setup.model, ids, 150, 3), whole, "in runs of 64")


def test_attention_reaches_as_far_as_there_are_positions() -> None:
    """A run of a prompt does not look at the whole window's spans, and few programs do for all."""
    sizes = Sizes(64, 64, 96, 128, 64, 4, 16, capacity=5000)
    assert [sizes.reach(end) for end in (1, 128, 129, 300, 513, 2049, 4097, 5000)] == [
        128, 128, 256, 512, 1024, 4096, 5000, 5000,
    ]  # fmt: skip


def decoded_calls(setup: Placed, tokens: int) -> dict[str, int]:
    """Calls of the driver for so many tokens, once all programs are there."""
    cache = setup.model.new_cache(CAPACITY)
    ids = prompt(4, 6 + tokens)
    setup.model.forward(Step(ids[:4], 0), cache)
    for position in (4, 5):
        setup.model.forward(Step(ids[position : position + 1], position), cache)
    setup.driver.calls = {}
    for position in range(6, 6 + tokens):
        setup.model.forward(Step(ids[position : position + 1], position), cache)
    return setup.driver.calls


def test_a_token_is_one_graph_and_one_wait() -> None:
    with placed() as setup:
        assert decoded_calls(setup, 5) == {"enter": 5, "launch_graph": 5, "synchronize": 5}
        layers = setup.model.layers
        (memory,) = layers.sequence()
        program = memory.programs[1, 1, layers.whole, CAPACITY, True, False]
        assert len(program) == 1 + 12 * 3 + 2 + 1  # A copy there, launches, and one back.


def test_without_pinned_memory_a_token_is_a_list_of_launches_and_one_wait() -> None:
    with placed(driver=model_driver(pinned=False)) as setup:
        calls = decoded_calls(setup, 5)
        assert calls["synchronize"] == 5
        assert calls["copy_in"] == calls["copy_out"] == 5
        assert calls["launch"] == 5 * (12 * 3 + 2)
        assert "launch_graph" not in calls


@pytest.mark.parametrize("asked", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_cpu_computes_the_rest(case: str, asked: int) -> None:
    ids = prompt(0, 40)
    with placed(case, asked=asked) as setup:
        assert setup.model.layers.num_layers == asked
        assert not setup.model.layers.has_head
        assert f"computes {asked} of 3 layers, the CPU the rest" in setup.model.where
        found = run_in_chunks(setup.model, ids, [17, 11])
        assert relative(found, run_in_chunks(setup.host, ids, [17, 11])) < SAME_BLOCKS
        cache = setup.model.new_cache(8)
        setup.model.forward(Step(ids[:8], 0), cache)
        whole = setup.host.new_cache(8)
        assert cache.position_bytes == whole.position_bytes * (3 - asked) // 3
        assert decoded_calls(setup, 4) == {"enter": 4, "launch_graph": 4, "synchronize": 4}


def test_only_the_first_layers_can_be_computed() -> None:
    """One in the middle is not quantized: what lies behind it stays on the CPU."""
    sizes = {**SHAPE, "max_position_embeddings": CAPACITY, "num_hidden_layers": 3}
    theirs = tiny_transformer("qwen3", 0, **sizes)
    checkpoint = packed_checkpoint(theirs, 4, keep=lambda prefix: ".1.mlp" in prefix)
    driver = model_driver()
    driver.enter()
    host = on_host(checkpoint)
    model = put_on_cards(host, [CardRoom(driver, 1 << 40)], 64)
    assert model.layers.num_layers == 1
    ids = prompt(0, 20)
    found = run_in_chunks(model, ids, [9])
    assert relative(found, run_in_chunks(host, ids, [9])) < SAME_BLOCKS
    model.close()


def test_a_model_that_is_not_quantized_is_refused() -> None:
    checkpoint = MemoryCheckpoint.of(tiny_transformer("llama", 0))
    driver = model_driver()
    driver.enter()
    with pytest.raises(KernelError, match="quantized: the card computes no others"):
        put_on_cards(on_host(checkpoint), [CardRoom(driver, 1 << 40)], 64)
    assert driver.taken == 0


PLANTED: dict[str, Callable[[Any], Any]] = {
    "gate and up swapped": lambda w: dataclasses.replace(w, gate=w.up, up=w.gate),
    "another epsilon": lambda w: dataclasses.replace(w, eps=0.3),
}


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_seen(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = StepLaunches.mlp
    monkeypatch.setattr(
        StepLaunches, "mlp", lambda self, weights: original(self, PLANTED[error](weights))
    )
    ids = prompt(0, 30)
    with placed() as setup:
        found = run_in_chunks(setup.model, ids, [20])
        assert relative(found, run_in_chunks(setup.host, ids, [20])) > 3 * SAME_BLOCKS


def test_matrices_of_different_layouts_are_several_launches() -> None:
    """Those of the same are one: whatever they are, in the same bits as each by itself."""
    generator = torch.Generator().manual_seed(0)
    kernels = NativeKernels(threads=1)
    rows = kernels.rows_per_block

    def linear(bits: int, num_rows: int) -> NativeWeight:
        packed, scale, _ = pack(torch.randn(num_rows, 64, generator=generator), bits)
        weight = PackedWeight(packed, scale, None, QuantScheme(bits, 32), num_rows, 64)
        return kernels.prepare(weight)

    bias = torch.ones(rows)
    for parts, launches in (
        ([(linear(4, rows), None), (linear(4, rows + 1), None)], 1),
        ([(linear(4, rows), bias), (linear(4, rows), bias)], 1),
        ([(linear(4, rows), None), (linear(4, rows), bias)], 2),
        ([(linear(4, rows), None), (linear(8, rows), None)], 2),
        ([(linear(4, rows + 1), None), (linear(4, rows), None)], 2),
    ):
        region = Region()
        placed_parts = place_side_by_side(parts, region)
        assert len(placed_parts) == launches
        assert sum(each.rows for each in placed_parts) == sum(w.out_features for w, _ in parts)


# What a card holds, and what happens when it is full


def test_as_many_layers_as_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the head behind all of them: as much as is taken when all is there is enough for all."""
    monkeypatch.setattr(workspace, "MOST_TOKENS", 16)  # What runs take is small beside layers.
    ids = prompt(0, 20)
    with placed() as setup:
        whole = setup.driver.taken
    seen: list[tuple[int, bool]] = []
    for memory in range(whole, whole // 4, -4096):
        with placed(memory=memory) as setup:
            layers = setup.model.layers
            assert setup.driver.taken == layers.nbytes <= memory
            state = layers.num_layers, layers.has_head
            if state not in seen:
                found = run_in_chunks(setup.model, ids, [12])
                assert relative(found, run_in_chunks(setup.host, ids, [12])) < SAME_BLOCKS
                seen.append(state)
        if state == (1, False):
            break
    assert seen == [(3, True), (3, False), (2, False), (1, False)]
    with (
        pytest.raises(MemoryLimitError, match="model: memory for 1 layer of the model: expected"),
        placed(memory=whole // 8),
    ):
        pass


def test_more_than_fits_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "MOST_TOKENS", 16)
    with placed() as setup:
        whole = setup.driver.taken
    with (
        pytest.raises(MemoryLimitError, match=r"memory for 3 layers of the model.*which hold 1"),
        placed(memory=whole * 5 // 8, asked=3),
    ):
        pass
    with (
        pytest.raises(UsageError, match="--gpu-layers: expected at least 1, found 0"),
        placed(asked=0),
    ):
        pass
    with placed(asked=99) as setup:
        assert setup.model.layers.has_head


def test_memory_ends_at_every_allocation() -> None:
    """With what was there before: fewer layers, or one error, and nothing left behind."""
    ids = prompt(0, 20)
    reached, at, outcomes = False, 0, []
    while not reached:
        at += 1
        driver = model_driver()
        driver.arm("allocate", at, MemoryLimitError("model: allocate", found="no memory"))
        try:
            with placed(driver=driver) as setup:
                reached = driver.calls["allocate"] < at
                layers = setup.model.layers
                outcomes.append((layers.num_layers, layers.has_head))
                found = run_in_chunks(setup.model, ids, [12])
                assert relative(found, run_in_chunks(setup.host, ids, [12])) < SAME_BLOCKS
        except MemoryLimitError:
            outcomes.append((0, False))
            assert driver.taken == driver.num_pinned == 0
    # Workspace, rope; weights and cache of each layer; the head.
    wanted = [0, 0, 0, 0, 1, 1, 2, 2]
    assert outcomes == [*((n, False) for n in wanted), (3, False), (3, True)]


def test_a_cache_that_is_gone_leaves_its_memory_to_the_next() -> None:
    ids = prompt(0, 12)
    driver = model_driver()
    with placed(driver=driver) as setup:
        first = setup.model.new_cache(CAPACITY)
        taken = driver.taken
        second = setup.model.new_cache(40)  # Beside the first one.
        assert driver.taken > taken
        for cache in (first, second):
            setup.model.forward(Step(ids, 0), cache)
        expected = setup.host.forward(Step(ids[:1], 0), setup.host.new_cache(1))
        both = driver.taken
        del first, second, cache
        gc.collect()
        third = setup.model.new_cache(40)
        assert driver.taken == both
        found = setup.model.forward(Step(ids[:1], 0), third)
        assert relative(found, expected) < SAME_BLOCKS
        driver.arm("allocate", 2, MemoryLimitError("model: allocate"))
        fourth = setup.model.new_cache(40)
        with pytest.raises(MemoryLimitError):
            setup.model.new_cache(40)
        assert driver.taken == both
        del fourth
        with pytest.raises(ContextError, match="this model was made for"):
            setup.model.new_cache(CAPACITY + 1)
    told = "at most 100 tokens, what the card has room for"
    with placed(capacity=100) as setup, pytest.raises(ContextError, match=told):
        setup.model.new_cache(101)


# A card that fails

ILLEGAL = DeviceError("model: cuStreamSynchronize", found="ILLEGAL_ADDRESS")


def run_on(model: Model, cache: Cache[Any]) -> None:
    """Four tokens, then eight one by one."""
    ids = prompt(0, 12)
    model.forward(Step(ids[:4], 0), cache)
    for position in range(4, 12):
        model.forward(Step(ids[position : position + 1], position), cache)


@pytest.mark.parametrize(
    ("kind", "at", "asked", "lost"),
    [
        ("enter", 1, None, False),
        ("copy_in", 1, None, True),
        ("launch", 1, 2, False),
        ("launch", 20, None, True),
        ("launch", 50, None, False),
        ("copy_out", 1, None, False),
        ("synchronize", 1, 2, True),
        ("synchronize", 4, None, False),
        ("begin_capture", 1, None, False),
        ("end_capture", 1, 2, True),
        ("launch_graph", 2, None, True),
        ("launch_graph", 2, 2, False),
    ],
)
def test_a_card_that_fails_costs_one_error(
    kind: str, at: int, asked: int | None, lost: bool
) -> None:
    """Whatever it was doing; afterwards the CPU computes everything, to the bit."""
    ids = prompt(0, 12)
    with placed(asked=asked) as setup:
        model = setup.model
        cache, other = model.new_cache(40), model.new_cache(40)
        model.forward(Step(ids[:3], 0), other)
        setup.driver.arm(kind, at, ILLEGAL, lost=lost)
        told = r"model: .* tokens? through . layers of 64 x 96.*ILLEGAL_ADDRESS"
        with pytest.raises(DeviceError, match=told):
            run_on(model, cache)
        assert model.is_lost
        assert cache.length == 0
        expected = run_in_chunks(setup.host, ids, [4])
        assert_same_bits(run_in_chunks(model, ids, [4]), expected, "a new cache")
        logits = model.forward(Step(ids, 0, all_logits=True), cache)
        assert_same_bits(logits[:4], expected[:4], "the cache that was in use")
        with pytest.raises(DeviceError, match="ILLEGAL_ADDRESS"):
            model.forward(Step(ids[3:4], 3), other)
        assert other.length == 0
        assert_same_bits(model.forward(Step(ids[:1], 0), other), expected[:1], "the other")


def test_an_interrupt_leaves_the_card_in_use() -> None:
    """A Ctrl-C while the host waits: what both streams were given is waited for at once."""
    ids = prompt(0, 12)
    with placed() as setup:
        cache = setup.model.new_cache(40)
        setup.model.forward(Step(ids[:6], 0), cache)
        setup.driver.arm("synchronize", 1, KeyboardInterrupt())  # type: ignore[arg-type]
        with pytest.raises(KeyboardInterrupt):
            setup.model.forward(Step(ids[6:10], 6), cache)
        assert cache.length == 6
        assert setup.driver.is_idle
        found = setup.model.forward(Step(ids[6:], 6, all_logits=True), cache)
        expected = run_in_chunks(setup.host, ids, [12])[6:]
        assert relative(found, expected) < SAME_BLOCKS
        assert setup.driver.calls["synchronize"] == 4


def test_small_staging_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that go to the card in many pieces are the same weights."""
    monkeypatch.setattr(card_layers, "STAGING_BYTES", 1024)
    ids = prompt(0, 20)
    with placed() as setup:
        found = run_in_chunks(setup.model, ids, [12])
        assert relative(found, run_in_chunks(setup.host, ids, [12])) < SAME_BLOCKS
