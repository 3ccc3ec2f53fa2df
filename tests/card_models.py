"""Tiny quantized models whose layers are on the model of a card."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from driver_model import LARGE, Machine, ModelDriver
from gpu_model import skip_where_there_is_no_model
from packed_models import SHAPE, packed_checkpoint
from stored_models import FailingCheckpoint
from stored_models import source as mixture_source
from tiny_models import MemoryCheckpoint, tiny_transformer
from torch import Tensor

from localr1.card.decoder import CardDecoder
from localr1.card.experts import StoreOnCards
from localr1.card.loading import CardRoom, put_on_cards
from localr1.experts.cuda import CudaDevice
from localr1.experts.hosting import Hosting, Slots, host_experts
from localr1.experts.store import ExpertStore
from localr1.experts.store_options import StoreOptions
from localr1.kernels.native import NativeKernels
from localr1.load import homes
from localr1.models.api import Model
from localr1.models.decoder import Decoder
from localr1.models.registry import load_model
from localr1.models.step import Step

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mqa-biases": (
        "llama",
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
}
CAPACITY = 320


@cache
def source(case: str, bits: int = 4, layers: int = 3) -> MemoryCheckpoint:
    model_type, changes = CASES[case]
    sizes = {"num_hidden_layers": layers, "max_position_embeddings": CAPACITY, **SHAPE, **changes}
    return packed_checkpoint(tiny_transformer(model_type, 0, **sizes), bits)


def on_host(checkpoint: MemoryCheckpoint) -> Decoder:
    model = load_model(checkpoint, NativeKernels(threads=1))
    assert isinstance(model, Decoder)
    return model


@dataclass
class Placed:
    """host: the same model on the CPU alone. drivers: of all cards; driver: the first."""

    model: CardDecoder
    drivers: list[ModelDriver]
    host: Decoder

    @property
    def driver(self) -> ModelDriver:
        return self.drivers[0]


def rows_per_block() -> int:
    return NativeKernels(threads=1).rows_per_block


@contextmanager
def placed(
    case: str = "qwen3",
    bits: int = 4,
    *,
    driver: ModelDriver | None = None,
    memory: int = LARGE,
    asked: int | None = None,
    capacity: int = CAPACITY,
) -> Iterator[Placed]:
    """On one card, which is empty again at the end."""
    skip_where_there_is_no_model()
    drivers = [driver or ModelDriver(rows_per_block())]
    with placed_on(drivers, [memory], case, bits, asked=asked, capacity=capacity) as setup:
        yield setup


@contextmanager
def placed_on(
    drivers: list[ModelDriver],
    memory: list[int],
    case: str = "qwen3",
    bits: int = 4,
    *,
    layers: int = 3,
    asked: int | None = None,
    capacity: int = CAPACITY,
) -> Iterator[Placed]:
    """memory: bytes of each card that may be taken. Nothing is left on a card at the end."""
    host = on_host(source(case, bits, layers))
    cards = [CardRoom(*each) for each in zip(drivers, memory, strict=True)]
    model = put_on_cards(host, cards, capacity, asked)
    try:
        yield Placed(model, drivers, host)
    finally:
        model.close()
    for driver in drivers:
        assert model.is_lost or driver.taken == driver.num_pinned == 0
        assert driver.closed == 1


def some_cards(*changes: dict[str, Any]) -> list[ModelDriver]:
    """Of one machine, each with what is special about it."""
    skip_where_there_is_no_model()
    machine = Machine()
    return [
        ModelDriver(rows_per_block(), machine=machine, name=f"model {number}", **each)
        for number, each in enumerate(changes)
    ]


def run(model: Model, ids: Tensor, prefill: int, decoded: int) -> Tensor:
    """Logits of the last `decoded` + 1 tokens: all before in one step, these one by one."""
    memory = model.new_cache(len(ids))
    count = len(ids) - decoded
    start = 0
    rows: list[Tensor] = []
    while start < count:
        end = min(start + prefill, count)
        rows = [model.forward(Step(ids[start:end], start), memory)]
        start = end
    for position in range(count, len(ids)):
        rows.append(model.forward(Step(ids[position : position + 1], position), memory))
    return torch.cat(rows)


@dataclass
class PlacedMixture:
    """A mixture whose layers, and some of whose experts, are on cards. host: the same model with
    all of its experts in RAM. drivers: of all cards; driver: the first."""

    model: CardDecoder
    drivers: list[ModelDriver]
    store: ExpertStore
    checkpoint: FailingCheckpoint
    host: Decoder

    @property
    def driver(self) -> ModelDriver:
        return self.drivers[0]


@contextmanager
def placed_mixture(
    model_type: str,
    ram: float,
    device: float,
    *,
    driver: ModelDriver | None = None,
    asked: int | None = None,
    options: StoreOptions | None = None,
) -> Iterator[PlacedMixture]:
    """On one card, which is empty again at the end. ram, device: shares of all experts that there
    is room for."""
    skip_where_there_is_no_model()
    drivers = [driver or ModelDriver(rows_per_block())]
    with mixture_on(drivers, model_type, ram, device, asked=asked, options=options) as setup:
        yield setup


@contextmanager
def mixture_on(
    drivers: list[ModelDriver],
    model_type: str,
    ram: float,
    device: float,
    *,
    asked: int | None = None,
    options: StoreOptions | None = None,
) -> Iterator[PlacedMixture]:
    """device: of each card, as a share of all experts. Nothing is left on a card at the end."""
    checkpoint = FailingCheckpoint(mixture_source(model_type))
    kernels = NativeKernels(threads=1)
    model = load_model(checkpoint, kernels, leave_experts=True)
    assert isinstance(model, Decoder)
    hardware: list[CudaDevice] = []
    for driver in drivers:
        driver.enter()
        hardware.append(CudaDevice(driver, LARGE, kernels))
    rooms = [CardRoom(driver, LARGE) for driver in drivers]
    card = put_on_cards(model, rooms, CAPACITY, asked, owns_drivers=False)
    hosting = Hosting(
        slots=lambda _, count: Slots(int(ram * count), [int(device * count)] * len(drivers)),
        devices=hardware,
        homes=homes(model, card, hardware),
        options=options or StoreOptions(),
    )
    store = host_experts(model, checkpoint, kernels, hosting)
    assert store is not None
    card.use_experts(StoreOnCards(store, hardware))
    host = load_model(mixture_source(model_type), NativeKernels(threads=1))
    assert isinstance(host, Decoder)
    try:
        yield PlacedMixture(card, drivers, store, checkpoint, host)
    finally:
        card.close()
        store.close()
    for driver in drivers:
        assert card.is_lost or driver.taken == driver.num_pinned == 0
        assert driver.closed == 1
