"""Mixtures on several cards: each has the experts of its own layers. The answer is that of one
card, to the bit; a card that is full or fails is what it is alone. On the model of cards."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from card_models import PlacedMixture, mixture_on, run, some_cards
from driver_model import LARGE, ModelDriver
from kernel_cases import assert_same_bits
from stored_models import tokens
from test_card_mixture import (
    ILLEGAL,
    LENGTH,
    MODELS,
    NOTHING_MOVES,
    PREFILL,
    gives_the_bits_of_the_cpu,
    rates_that_prefer_the_card,
    run_thrice,
    says_what_the_cpu_says,
)
from test_load_experts import QUESTION, ask, nano
from test_models_quantized import relative

from localr1.errors import DeviceError, MemoryLimitError
from localr1.experts.cuda import LOW_MEMORY, CudaDevice
from localr1.experts.options import CardSpec, ExpertOptions
from localr1.experts.store import PASSES_BETWEEN_LOOKS
from localr1.kernels.native import NativeKernels
from localr1.load import load_engine
from localr1.sampler import SamplingParams

__all__ = ["nano", "rates_that_prefer_the_card"]  # Fixtures.


def each_holds_its_own(setup: PlacedMixture) -> bool:
    """Every expert that a card holds is of a layer that it computes; each with such holds some."""
    assert setup.store.hot is not None
    numbers = np.array(setup.store.layer_numbers)
    for tier, card in zip(setup.store.hot.tiers, setup.model.layers.cards, strict=True):
        keys = tier.residency.resident_keys
        if bool(card.mixtures) != bool(len(keys)):
            return False
        if not set(numbers[keys // tier.residency.num_experts]) <= set(card.mixtures):
            return False
    return True


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize(
    ("ram", "device", "changes"),
    [
        (1.0, 0.2, [{"seed": 1, "eager": True}, {"seed": 2}]),
        (0.3, 0.4, [{"seed": 2}, {"seed": 0, "pinned": False}]),
        (0.0, 0.5, [{"others_first": True}] * 3),
    ],
)
def test_the_bits_are_those_of_one_card(
    model_type: str, ram: float, device: float, changes: list[dict[str, Any]]
) -> None:
    """Wherever experts lie, cold and warm, of a prompt at once and one by one."""
    ids = tokens(LENGTH)
    with mixture_on(some_cards({}), model_type, 1.0, 0.3) as setup:
        wanted = run(setup.model, ids, PREFILL, LENGTH - PREFILL)
    with mixture_on(some_cards(*changes), model_type, ram, device) as setup:
        for _ in range(3):
            found = run(setup.model, ids, PREFILL, LENGTH - PREFILL)
            assert_same_bits(found, wanted, (ram, device))
        one_by_one = run(setup.model, ids, 1, LENGTH - PREFILL)
        assert_same_bits(one_by_one[-4:], wanted[-4:], "a prompt one by one")
        assert each_holds_its_own(setup)
        assert setup.store.usage.device_hits > 0
        if ram:
            assert setup.store.usage.promotions > 0


@pytest.mark.parametrize("asked", [2, 3])
@pytest.mark.parametrize("model_type", MODELS)
def test_layers_of_the_cpu_have_their_experts_on_some_card(model_type: str, asked: int) -> None:
    with mixture_on(some_cards({}, {}), model_type, 0.6, 0.4, asked=asked) as setup:
        says_what_the_cpu_says(setup)
        assert setup.store.hot is not None
        keys = np.array(setup.store.hot.resident_keys)
        numbers = np.array(setup.store.layer_numbers)
        assert 3 in numbers[keys // setup.store.hot.tiers[0].residency.num_experts]


def test_slots_of_one_card_give_way_to_other_programs() -> None:
    """Where they are short, and nowhere else."""
    drivers = some_cards({"total": LOW_MEMORY + (64 << 20)}, {"total": LARGE})
    with mixture_on(drivers, "qwen3_moe", 1.0, 0.5, options=NOTHING_MOVES) as setup:
        says_what_the_cpu_says(setup)
        assert setup.store.hot is not None
        before = [tier.residency.num_slots for tier in setup.store.hot.tiers]
        drivers[0].others = 64 << 20
        for _ in range(PASSES_BETWEEN_LOOKS // (LENGTH - PREFILL) + 2):
            says_what_the_cpu_says(setup)
        after = [tier.residency.num_slots for tier in setup.store.hot.tiers]
        assert after[0] < before[0]
        assert after[1] == before[1]
        drivers[0].others = 0
        gpu, cpu = setup.model, setup.host
        ids = tokens(LENGTH)
        assert relative(run(gpu, ids, 1, 9), run(cpu, ids, 1, 9)) < 0.01


@pytest.mark.parametrize("number", [0, 1])
def test_memory_ends_at_every_allocation_of_either_card(number: int) -> None:
    """One error, nothing left behind; or fewer layers or slots, and the same text."""
    reached, at, errors = False, 0, 0
    while not reached:
        at += 1
        drivers = some_cards({}, {})
        drivers[number].arm("allocate", at, MemoryLimitError("model: allocate", found="no memory"))
        try:
            with mixture_on(drivers, "qwen3_moe", 1.0, 0.3) as setup:
                reached = drivers[number].calls["allocate"] < at
                ids = tokens(7)
                assert relative(run(setup.model, ids, 5, 2), run(setup.host, ids, 5, 2)) < 0.01
        except MemoryLimitError:
            errors += 1
    assert errors >= 3


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    ("kind", "at", "lost"),
    [
        ("launch", 90, False),
        ("launch_graph", 2, True),
        ("call_host", 2, True),
        ("synchronize", 7, False),
        ("copy_in", 2, True),
        ("copy_out", 2, False),
    ],
)
def test_any_card_that_fails_costs_one_error(number: int, kind: str, at: int, lost: bool) -> None:
    """Of the layers or of the experts' copies; afterwards the CPU computes all of both."""
    with mixture_on(some_cards({}, {}), "deepseek_v3", 1.0, 0.4) as setup:
        setup.drivers[number].arm(kind, at, ILLEGAL, lost=lost)
        with pytest.raises(DeviceError, match="ILLEGAL_ADDRESS"):
            run_thrice(setup, tokens(LENGTH))
        assert setup.model.is_lost
        hits = setup.store.usage.device_hits
        for _ in range(2):
            gives_the_bits_of_the_cpu(setup)
        assert setup.store.usage.device_hits == hits
        assert setup.store.num_device_slots == setup.store.num_on_device == 0


def test_an_expert_that_cannot_be_copied_to_one_card_is_the_end_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failed: Future[float] = Future()
    failed.set_exception(ILLEGAL)
    with mixture_on(some_cards({}, {}), "deepseek_v3", 1.0, 0.2) as setup:
        monkeypatch.setattr(setup.store.devices[1], "upload", lambda *_: failed)
        with pytest.raises(DeviceError, match="ILLEGAL_ADDRESS"):
            run_thrice(setup, tokens(LENGTH))
        assert setup.model.is_lost
        gives_the_bits_of_the_cpu(setup)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (ExpertOptions(ram="50%", devices="0:64MiB,1:64MiB", vram="600KiB,300KiB"), "0 computes 3"),
        (ExpertOptions(device="cuda:64MiB", devices="1,0", gpu_layers=0), ""),
    ],
)
def test_r1_nano_on_two_cards(
    nano: Path, options: ExpertOptions, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the same door as chat: layers and experts, or experts alone."""
    drivers = some_cards({}, {})
    opened: list[ModelDriver] = []

    def open_model(programs: object, spec: CardSpec, kernels: NativeKernels) -> CudaDevice:
        opened.append(drivers[spec.number])
        opened[-1].enter()
        assert spec.memory is not None
        return CudaDevice(opened[-1], spec.memory, kernels)

    monkeypatch.setattr("localr1.load.open_cuda", open_model)
    engine = load_engine(nano, threads=1, context=256, experts=options)
    try:
        assert told in engine.where
        assert "4042" in ask(engine, QUESTION, SamplingParams(temperature=0.0)).text
        assert engine.experts is not None
        slots = [device.num_slots for device in engine.experts.devices]
        assert min(slots) > 0
        if options.vram is not None:
            assert slots[0] > slots[1], "as much as each was given"
        if not told:
            assert [each.name for each in opened] == ["model 1", "model 0"]
            assert engine.where == ""
    finally:
        engine.close()
    for driver in drivers:
        assert driver.closed == 1
        assert driver.taken == driver.num_pinned == 0
