"""The simulated device by itself: what lies in its slots, what is streamed, and how fast its link
is."""

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import assert_same_bits, native, random_tokens
from test_kernels_experts import Case
from torch import Tensor

from localr1.experts.device import STREAM_SLOTS, SimulatedDevice, Streamed
from localr1.kernels.native import available_isas
from localr1.kernels.native_experts import ExpertForm, NativeExperts

CASE = Case(6, 3, 64, 32, 5)
BANDWIDTH, LATENCY = 1e6, 0.001
"""Slow enough that what the copies cost is far more than the machine's own time for them."""


class Setup:
    """Six experts in RAM, and a device with room for three of them beside its buffers."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        packed = CASE.packed(generator)
        self.kernels = native(available_isas()[0], 1)
        bank = self.kernels.prepare_experts(packed, len(packed))
        assert isinstance(bank, NativeExperts)
        self.bank = bank
        self.nbytes = int(bank.layout.nbytes)
        self.x = random_tokens(CASE.tokens, CASE.hidden, generator)
        self.chosen = CASE.routing(generator).experts
        memory = (3 + STREAM_SLOTS) * self.nbytes
        self.device = SimulatedDevice(memory, BANDWIDTH, LATENCY, 1, self.kernels.isa)
        self.layer = self.device.add_layer(ExpertForm.of(packed[0]), len(packed))

    def upload(self, expert: int, slot: int) -> float:
        address = int(self.bank.table[expert])
        return self.device.upload(address, self.nbytes, slot).result()

    def computed(self, streamed: tuple[int, ...] = ()) -> Tensor:
        outputs = torch.full((*self.chosen.shape, CASE.hidden), 7.0)
        passing = [Streamed(expert, int(self.bank.table[expert])) for expert in streamed]
        self.device.compute(self.layer, self.x, self.chosen, passing, outputs).result()
        return outputs

    def expected(self, experts: tuple[int, ...]) -> Tensor:
        """Outputs of these experts, 7 for all others."""
        outputs = torch.full((*self.chosen.shape, CASE.hidden), 7.0)
        kept = torch.isin(self.chosen, torch.tensor(experts, dtype=torch.int64))
        chosen = self.chosen.where(kept, -1)
        self.kernels.expert_outputs(self.x, chosen, self.bank, outputs)
        return outputs


@pytest.fixture
def setup() -> Iterator[Setup]:
    made = Setup()
    yield made
    made.device.close()


def test_only_what_is_placed_is_computed(setup: Setup) -> None:
    assert setup.device.resize(10) == 3
    setup.upload(1, 0)
    setup.upload(2, 2)
    assert_same_bits(setup.computed(), setup.expected(()), "nothing is placed")
    setup.device.place(setup.layer, 1, 0)
    setup.device.place(setup.layer, 2, 2)
    assert_same_bits(setup.computed(), setup.expected((1, 2)), "two")
    setup.device.place(setup.layer, 1, None)
    assert_same_bits(setup.computed(), setup.expected((2,)), "one was taken away")
    setup.upload(0, 0)
    setup.device.place(setup.layer, 0, 0)
    assert_same_bits(setup.computed(), setup.expected((0, 2)), "another in its slot")


def test_more_are_streamed_than_there_are_buffers(setup: Setup) -> None:
    setup.device.resize(1)
    setup.upload(4, 0)
    setup.device.place(setup.layer, 4, 0)
    found = setup.computed((0, 1, 2, 3, 5))
    assert_same_bits(found, setup.expected((0, 1, 2, 3, 4, 5)), "streamed and placed")


def test_an_expert_comes_back_before_another_takes_its_slot(setup: Setup) -> None:
    setup.device.resize(1)
    setup.upload(1, 0)
    back = torch.zeros(setup.nbytes, dtype=torch.uint8)
    saved = setup.device.download(0, back.data_ptr(), setup.nbytes)
    setup.upload(2, 0)
    assert saved.result() >= 0.99 * (LATENCY + setup.nbytes / BANDWIDTH)
    wanted = setup.expected((1, 2))  # Of what the bank had before its address is another.
    setup.bank.table[1] = back.data_ptr()
    setup.device.place(setup.layer, 2, 0)
    assert_same_bits(setup.computed((1,)), wanted, "streamed from its copy")


def test_the_link_is_as_slow_as_it_is_said_to_be(setup: Setup) -> None:
    """Never faster; how much slower is the machine's affair."""
    setup.device.resize(3)
    expected = LATENCY + setup.nbytes / BANDWIDTH
    assert setup.upload(0, 0) >= 0.99 * expected
    assert sum(setup.upload(expert, 1) for expert in (1, 2)) >= 2 * 0.99 * expected
