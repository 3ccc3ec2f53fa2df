"""Rounds of the grouped expert kernels on a card: activations go there, outputs come back."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from localr1.errors import MemoryLimitError
from localr1.experts.card_memory import HostMemory
from localr1.kernels import gpu_launch
from localr1.kernels.gpu_driver import Driver
from localr1.kernels.gpu_layout import ExpertLayout
from localr1.qtypes import ACTIVATION_GROUP

MOST_PAIRS: Final = 256
"""Of a token and an expert, in one round of launches: what the buffers on the card are made for."""


@dataclass(frozen=True)
class _Buffers:
    """On the card, of MOST_PAIRS pairs or as many tokens. Of activations: codes, scales, sums."""

    x: int
    chosen: int
    inputs: tuple[int, int, int]
    gated: tuple[int, int, int]
    outputs: int


class CardRounds:
    """hidden, inner: the largest of all layers. num_experts: of a layer. All memory is taken when
    this is made, which raises MemoryLimitError, and given back by `free`. Used by one thread."""

    def __init__(self, driver: Driver, hidden: int, inner: int, num_experts: int) -> None:
        self._driver = driver
        self._stream = driver.stream()
        self._allocated: list[int] = []
        self._host = HostMemory(driver)
        try:
            self._buffers = _Buffers(
                x=self.allocate(4 * MOST_PAIRS * hidden),
                chosen=self.allocate(4 * MOST_PAIRS),
                inputs=self._allocate_activations(hidden),
                gated=self._allocate_activations(inner),
                outputs=self.allocate(4 * MOST_PAIRS * hidden),
            )
            self.passing_table = self.allocate(8 * num_experts)
        except MemoryLimitError:
            self.free()
            raise
        for name, values in (("x", hidden), ("chosen", 1), ("outputs", hidden)):
            self._host.allocate(name, 4 * MOST_PAIRS * values)

    def allocate(self, nbytes: int) -> int:
        """Memory of the card that is freed with the rest."""
        address = self._driver.allocate(nbytes)
        self._allocated.append(address)
        return address

    def free(self) -> None:
        while self._allocated:
            self._driver.free(self._allocated.pop())
        self._host.free()

    def run(self, layout: ExpertLayout, table: int, x: Tensor, chosen: Tensor) -> Tensor:
        """Outputs [T, k, hidden] of the experts that the table has, in memory that the next call
        uses again; of others what was there before. At most MOST_PAIRS pairs."""
        driver, stream, on_card = self._driver, self._stream, self._buffers
        tokens, per_token = chosen.shape
        pairs, hidden = chosen.numel(), int(layout.down.rows)
        assert pairs <= MOST_PAIRS
        host_x = self._host.tensor("x", torch.float32, tokens, hidden)
        host_chosen = self._host.tensor("chosen", torch.int32, tokens, per_token)
        result = self._host.tensor("outputs", torch.float32, tokens, per_token, hidden)
        host_x.copy_(x)
        host_chosen.copy_(chosen)
        driver.copy_in(on_card.x, host_x.data_ptr(), host_x.nbytes, stream)
        driver.copy_in(on_card.chosen, host_chosen.data_ptr(), host_chosen.nbytes, stream)
        groups = tokens * hidden // ACTIVATION_GROUP
        inputs, gated = map(_pointers, (on_card.inputs, on_card.gated))
        where = _pointers((table, on_card.chosen))
        driver.launch(
            gpu_launch.quantize_activations(groups),
            (*_pointers((on_card.x,)), ctypes.c_int64(groups), *inputs),
            stream,
        )
        driver.launch(
            gpu_launch.gate_up(layout, pairs),
            (layout, *where, ctypes.c_int32(per_token), *inputs, *gated),
            stream,
        )
        driver.launch(
            gpu_launch.down(layout, pairs),
            (layout, *where, *gated, *_pointers((on_card.outputs,))),
            stream,
        )
        driver.copy_out(result.data_ptr(), on_card.outputs, result.nbytes, stream)
        driver.synchronize(stream)
        return result

    def copy_table(self, table: Tensor, target: int) -> None:
        """Before what is launched next; the tensor may go at once."""
        self._driver.copy_in(target, table.data_ptr(), table.nbytes, self._stream)
        self._driver.synchronize(self._stream)

    def _allocate_activations(self, columns: int) -> tuple[int, int, int]:
        groups = columns // ACTIVATION_GROUP
        codes = self.allocate(MOST_PAIRS * columns)
        return (
            codes,
            self.allocate(4 * MOST_PAIRS * groups),
            self.allocate(4 * MOST_PAIRS * groups),
        )


def _pointers(addresses: Sequence[int]) -> list[Any]:
    return [ctypes.c_void_p(address) for address in addresses]
