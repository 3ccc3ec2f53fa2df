"""The host's share of a mixture, called as a card's driver does it: the bits of
`Kernels.expert_outputs`, without Python wherever that can be."""

import ctypes
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from kernel_cases import ISAS, Sentinels, assert_same_bits, native, random_tokens
from test_kernels_experts import Case
from torch import Tensor

from localr1.errors import KernelError
from localr1.kernels.gpu_driver import HostFunction
from localr1.kernels.host_mixtures import HostMixtures, HostResult, Way
from localr1.kernels.native import NativeKernels
from localr1.kernels.native_experts import NativeExperts

CASE = Case(8, 4, 64, 96, 1)
CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@dataclass
class Layer:
    """A layer's experts and what a card exchanges with the host. asked: the layers that Python was
    asked for."""

    kernels: NativeKernels
    asked: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.packed = CASE.packed(generator)
        self.bank = self.kernels.prepare_experts(self.packed, CASE.experts)
        self.table = self.bank.table.clone()
        self.bank = NativeExperts(self.bank.layout, self.table, CASE.hidden, self.bank)
        self.on_card = np.zeros(CASE.experts, np.bool_)
        self.x = random_tokens(1, CASE.hidden, generator)
        self.chosen = torch.tensor([[6, 0, 3, 5]], dtype=torch.int32)
        self.sentinels = Sentinels()
        self.outputs = self.sentinels.around(torch.zeros(1, CASE.per_token, CASE.hidden))
        self.mixtures: HostMixtures = self.kernels.host_mixtures(self.asked.append)

    def function(self, number: int = 7) -> HostFunction:
        return self.mixtures.function(
            number, self.bank, self.on_card, self.x, self.chosen, self.outputs
        )

    def expected(self, *here: int) -> Tensor:
        """Outputs with those of these experts."""
        found = torch.zeros_like(self.outputs)
        kept = self.chosen.to(torch.int64)
        kept = kept.where(torch.isin(kept, torch.tensor(here)), -1)
        self.kernels.expert_outputs(self.x, kept, self.bank, found)
        return found

    def call(self, function: HostFunction, way: Way = Way.NATIVE) -> list[HostResult]:
        self.outputs.zero_()
        self.mixtures.go(way)
        CALL(function.address)(function.argument)
        self.sentinels.check("outputs")
        return self.mixtures.take()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 3])
def test_what_lies_in_ram_and_on_no_card_is_computed(isa: str, threads: int) -> None:
    layer = Layer(native(isa, threads))
    function = layer.function()
    (result,) = layer.call(function)
    assert_same_bits(layer.outputs, layer.expected(6, 0, 3, 5), "all")
    assert result.layer == 7
    assert result.chosen.tolist() == [6, 0, 3, 5]
    assert 0.0 < result.seconds <= result.ago < 60.0
    # Tables and values are those of when it is called.
    layer.on_card[[0, 5]] = True
    layer.table[[1, 0, 5]] = 0
    layer.chosen[0, 2] = 2
    (result,) = layer.call(function)
    assert_same_bits(layer.outputs, layer.expected(6, 2), "two")
    assert result.chosen.tolist() == [6, 0, 2, 5]
    layer.on_card[:] = True
    (result,) = layer.call(function)
    assert_same_bits(layer.outputs, torch.zeros_like(layer.outputs), "none")
    assert result.seconds == 0.0
    assert layer.asked == []


def test_what_it_cannot_do_is_left_to_python() -> None:
    """The whole layer."""
    layer = Layer(native(ISAS[0], 1))
    function = layer.function()
    layer.table[3] = 0
    assert layer.call(function) == []
    assert layer.asked == [7]
    layer.on_card[3] = True
    assert len(layer.call(function)) == 1
    assert layer.call(function, Way.PYTHON) == []
    assert layer.asked == [7, 7]
    assert layer.call(function, Way.NOTHING) == []
    assert_same_bits(layer.outputs, torch.zeros_like(layer.outputs), "nothing")
    for wrong in (8, -1):
        layer.chosen[0, 0] = wrong
        assert layer.call(function) == []
    assert layer.asked == [7, 7, 7, 7]


def test_layers_are_told_of_in_the_order_of_work() -> None:
    layer = Layer(native(ISAS[0], 1))
    functions = [layer.function(number) for number in (2, 0, 1)]
    layer.mixtures.go(Way.NATIVE)
    for function in functions:
        CALL(function.address)(function.argument)
    assert [result.layer for result in layer.mixtures.take()] == [2, 0, 1]
    assert layer.mixtures.take() == []


def test_sizes_that_do_not_fit_are_refused() -> None:
    layer = Layer(native(ISAS[0], 1))
    with pytest.raises(KernelError, match=r"outputs.*\[1, 4, 64\]"):
        layer.mixtures.function(
            0, layer.bank, layer.on_card, layer.x, layer.chosen, layer.outputs[:, :3].contiguous()
        )
    for isa in ISAS:
        other = native(isa, 1)
        if other.rows_per_block != layer.kernels.rows_per_block:
            with pytest.raises(KernelError, match="rows per block"):
                other.host_mixtures(layer.asked.append).function(
                    0, layer.bank, layer.on_card, layer.x, layer.chosen, layer.outputs
                )
