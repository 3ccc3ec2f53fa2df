"""The engine and the simulator replay the same routing: they must find the same experts in the same
places. How fast that is, benchmarks/experts.py compares."""

from concurrent.futures import wait
from contextlib import closing
from pathlib import Path

import pytest
import torch
from test_load_experts import nano

from localr1.cli.measure import sampled_ids
from localr1.experts.hardware import HardwareProfile
from localr1.experts.options import ExpertOptions
from localr1.experts.recorder import RoutingRecorder
from localr1.experts.simulate import Budgets, MixtureSizes, simulate
from localr1.load import load_engine
from localr1.models.step import Step

__all__ = ["nano"]  # A fixture.

TOKENS = 64
TOLERANCE = 0.01
"""Of the hit rates."""


@pytest.mark.parametrize("policy", ["adaptive", "lru", "static"])
@pytest.mark.parametrize(
    ("ram", "device"),
    [("50%", "cpu"), ("20%", "cpu"), ("100%", "simulated:1MiB"), ("30%", "simulated:1500KiB")],
)
def test_hit_rates_are_those_of_the_simulator(
    nano: Path, policy: str, ram: str, device: str
) -> None:
    options = ExpertOptions(ram=ram, device=device, policy=policy, read_ahead=False)
    with closing(load_engine(nano, threads=2, experts=options)) as engine:
        ids = sampled_ids(engine.model, TOKENS)
    with closing(load_engine(nano, threads=2, experts=options)) as engine:
        assert engine.experts is not None
        store, recorder = engine.experts, RoutingRecorder(engine.model, engine.name)
        size = store.slot_bytes
        budgets = Budgets(store.num_device_slots * size, store.num_ram_slots * size)
        cache = engine.model.new_cache(TOKENS)
        for position, token in enumerate(ids):
            engine.model.forward(Step(torch.tensor([token]), position), cache)
            if store.hot is not None:  # However busy the machine: a copy ends in its pass.
                wait([upload.future for upload in store.hot.uploads])
        recorder.end_sequence(0)
        used = store.usage.copy()
    # A CPU so slow that every copy is done when the next token begins, as it is here. Where an
    # expert lies on both sides either may compute it, which is a hit all the same.
    on_device = 25.0 if device != "cpu" else 0.0
    profile = HardwareProfile(
        "slow", budgets.vram, budgets.ram, on_device, on_device, on_device, 0.01, 0.01, 1.0, 0.0
    )
    said = simulate(recorder.trace(), MixtureSizes(size, size), profile, budgets, policy)
    assert used.uses == said.uses
    assert abs(used.hit_rate - said.hit_rate) <= TOLERANCE
    assert abs(used.reads - said.reads) / said.uses <= TOLERANCE
    assert abs(used.promotions - said.promotions) <= 0.05 * max(said.promotions, 20)
    assert abs(used.demotions - said.demotions) <= 0.05 * max(said.demotions, 20)
    if (ram, policy) == ("30%", "adaptive"):
        assert said.demotions > 0
    if device == "cpu":
        assert used.ram_hits == said.ram_uses
