"""What the host computes of a token on cards without Python is what it computes with it: the same
bits, and the store learns the same and moves the same experts. On the model of cards."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from card_models import PlacedMixture, mixture_on, placed_mixture, run, some_cards
from driver_model import ModelDriver
from kernel_cases import assert_same_bits
from stored_models import tokens
from test_card_mixture import (
    LENGTH,
    NOTHING_MOVES,
    PREFILL,
    rates_that_prefer_the_card,
    says_what_the_cpu_says,
)
from torch import Tensor

from localr1.errors import CheckpointError
from localr1.experts.store import ExpertStore
from localr1.experts.store_options import StoreOptions
from localr1.experts.usage import ExpertUsage
from localr1.kernels.host_mixtures import HostMixtures, Way
from localr1.models.step import Step

__all__ = ["rates_that_prefer_the_card"]  # A fixture.

PROMPT, DECODED = 4, 7


def always_in_python(patch: pytest.MonkeyPatch) -> None:
    go = HostMixtures.go
    patch.setattr(
        HostMixtures, "go", lambda self, way: go(self, Way.PYTHON if way is Way.NATIVE else way)
    )


def count_completed(patch: pytest.MonkeyPatch) -> list[int]:
    """The layers that the store itself is asked to complete."""
    asked: list[int] = []
    complete = ExpertStore.complete

    def counted(store: ExpertStore, layer: int, *arguments: Any) -> None:
        asked.append(layer)
        complete(store, layer, *arguments)

    patch.setattr(ExpertStore, "complete", counted)
    return asked


def without_times(usage: ExpertUsage) -> ExpertUsage:
    return replace(
        usage, seconds=0, ram_seconds=0, device_seconds=0, link_seconds=0, disk_seconds=0
    )


def story(setup: PlacedMixture) -> tuple[Tensor, list[tuple[Any, ...]]]:
    """Logits; and behind every pass what the store has counted, and what lies where. Copies are
    waited for, so that they end in the same pass every time."""
    model, store = setup.model, setup.store
    assert store.hot is not None
    cache, ids = model.new_cache(64), tokens(PROMPT + DECODED)
    logits, passes = [], []
    for begin, end in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, len(ids)))]:
        logits.append(model.forward(Step(ids[begin:end], begin), cache))
        store.hot.settle()
        held = store.hot_set()
        passes.append(
            (
                without_times(store.usage),
                held.counts.tolist(),
                sorted(held.ram.tolist()),
                held.device.tolist(),
                store._ranking.scores.tolist(),
            )
        )
    return torch.cat(logits), passes


@pytest.mark.parametrize(
    ("model_type", "ram", "device", "cards", "asked"),
    [
        ("qwen3_moe", 1.0, 0.3, 1, None),
        ("deepseek_v3", 0.4, 0.5, 1, 3),
        ("deepseek_v3", 0.8, 0.15, 2, None),
    ],
)
def test_the_store_learns_what_it_would_in_python(
    model_type: str,
    ram: float,
    device: float,
    cards: int,
    asked: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = StoreOptions(read_ahead=False, read_threads=1)
    completed = count_completed(monkeypatch)
    told = []
    for patch in (None, always_in_python):
        if patch is not None:
            patch(monkeypatch)
        completed.clear()
        drivers = some_cards(*[{"seed": 1}] * cards)
        with mixture_on(drivers, model_type, ram, device, asked=asked, options=options) as setup:
            told.append((*story(setup), setup.store.usage.copy(), len(completed)))
            mixtures = len(setup.model.layers.mixtures)
    (found, passes, usage, in_python), (expected, wanted, _, all_in_python) = told
    assert_same_bits(found, expected, "logits")
    for number, (one, other) in enumerate(zip(passes, wanted, strict=True)):
        assert one == other, number
    assert in_python <= usage.reads
    assert (in_python == 0) == (usage.reads == 0)
    assert in_python < all_in_python == DECODED * mixtures
    assert usage.promotions > 0
    assert usage.ram_hits > 0
    assert usage.ram_seconds > 0.0


@pytest.mark.parametrize(("ram", "device", "asked"), [(0.7, 0.5, False), (0.4, 0.2, True)])
def test_reading_ahead_needs_python(
    ram: float, device: float, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where some expert lies in its file alone; else there is nothing to be read."""
    completed = count_completed(monkeypatch)
    options = StoreOptions("static", read_ahead=True)
    with placed_mixture("qwen3_moe", ram, device, options=options) as setup:
        says_what_the_cpu_says(setup)
        mixtures = len(setup.model.layers.mixtures)
        assert len(completed) == (mixtures * (LENGTH - PREFILL) if asked else 0)
        assert (setup.store.usage.prefetched > 0) == asked


def test_what_has_arrived_needs_no_python() -> None:
    """Not even in the first token behind it."""
    with placed_mixture("qwen3_moe", 0.5, 0.3, options=NOTHING_MOVES) as setup:
        store, ram = setup.store, setup.store.ram
        absent = (ram.residency.slot_of < 0) & ~store._on_device
        layer, expert = np.argwhere(absent)[0].tolist()
        ram.request(layer, expert)
        ram._reads[layer, expert].future.result()
        assert not ram.holds(layer, expert)
        assert not store.prepare_for_cards()
        assert ram.holds(layer, expert)


def test_an_error_ends_the_token_in_the_layer_it_came_up_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with Python: nothing behind it is computed, or counted."""
    counted = []
    for patch in (None, always_in_python):
        if patch is not None:
            patch(monkeypatch)
        options = StoreOptions("static", read_ahead=False, read_threads=1)
        with placed_mixture("qwen3_moe", 0.5, 0.3, options=options) as setup:
            setup.checkpoint.arm(CheckpointError("bad sector"), 3)  # Of the third layer.
            with pytest.raises(CheckpointError, match="bad sector"):
                run(setup.model, tokens(LENGTH), 1, LENGTH - 1)
            counted.append((without_times(setup.store.usage), setup.store.counts.tolist()))
            *known, behind = setup.store.counts.sum(axis=1).tolist()
            assert known == [behind + 3] * 3
            says_what_the_cpu_says(setup)
    assert counted[0] == counted[1]


def interrupt(driver: ModelDriver, kind: str, at: int) -> None:
    """The at-th call of a kind from now on raises what Ctrl-C does, once."""
    left = at

    def on_call(called: str) -> None:
        nonlocal left
        left -= called == kind
        if called == kind and left == 0:
            raise KeyboardInterrupt

    driver.on_call = on_call


@pytest.mark.parametrize(
    ("number", "kind", "at"),
    [
        (0, "call_host", 2),
        (0, "launch", 40),  # Of a graph that is being made.
        (1, "call_host", 3),
        (1, "launch_graph", 2),
        (0, "synchronize", 4),
    ],
)
def test_nothing_runs_any_more_when_a_token_was_interrupted(
    number: int, kind: str, at: int
) -> None:
    """As what it uses may be moved from then on; and the next token is as ever."""
    drivers = some_cards({"seed": 2}, {"seed": 2})
    with mixture_on(drivers, "qwen3_moe", 1.0, 0.4, options=NOTHING_MOVES) as setup:
        interrupt(drivers[number], kind, at)
        with pytest.raises(KeyboardInterrupt):
            run(setup.model, tokens(LENGTH), 1, LENGTH - 1)
        assert setup.driver.is_idle
        says_what_the_cpu_says(setup)
