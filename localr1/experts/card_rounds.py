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
from localr1.kernels.gpu_launch import EXPERT_TILE
from localr1.kernels.gpu_layout import ExpertLayout
from localr1.kernels.gpu_pairs import PairOrder, most_positions, order_pairs
from localr1.qtypes import ACTIVATION_GROUP

MOST_PAIRS: Final = 1024
"""Of a token and an expert, in one round of launches: what the buffers on the card are made for."""
TILE_PAIRS: Final = 4
"""From so many pairs of an expert on, on average, they are computed in tiles, which read it once
for 32 of its pairs, else each by itself. The bits are the same. Not measured yet: a guess."""


@dataclass(frozen=True)
class _Buffers:
    """On the card, of MOST_PAIRS pairs or as many tokens. Of activations: codes, scales, sums; of
    those in tiles `turned` has scales and sums of the inputs. order, experts: `PairOrder`'s."""

    x: int
    chosen: int
    order: int
    experts: int
    inputs: tuple[int, int, int]
    turned: tuple[int, int]
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
        in_tiles = most_positions(MOST_PAIRS, min(num_experts, MOST_PAIRS // TILE_PAIRS))
        tiles = in_tiles // EXPERT_TILE
        turned = 4 * in_tiles * hidden // ACTIVATION_GROUP
        try:
            self._buffers = _Buffers(
                x=self.allocate(4 * MOST_PAIRS * hidden),
                chosen=self.allocate(4 * MOST_PAIRS),
                order=self.allocate(4 * in_tiles),
                experts=self.allocate(4 * tiles),
                inputs=self._allocate_activations(MOST_PAIRS, hidden),
                turned=(self.allocate(turned), self.allocate(turned)),
                gated=self._allocate_activations(in_tiles, inner),
                outputs=self.allocate(4 * MOST_PAIRS * hidden),
            )
            self.passing_table = self.allocate(8 * num_experts)
        except MemoryLimitError:
            self.free()
            raise
        for name, values in (("x", hidden), ("chosen", 1), ("outputs", hidden)):
            self._host.allocate(name, 4 * MOST_PAIRS * values)
        self._host.allocate("order", 4 * in_tiles)
        self._host.allocate("experts", 4 * tiles)

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
        uses again; of others what was there before. chosen: int64 [T, k], negative for none; at
        most MOST_PAIRS pairs."""
        driver, stream, on_card = self._driver, self._stream, self._buffers
        tokens, per_token = chosen.shape
        hidden = int(layout.down.rows)
        assert chosen.numel() <= MOST_PAIRS
        self._copy_in("x", on_card.x, x)
        groups = tokens * hidden // ACTIVATION_GROUP
        driver.launch(
            gpu_launch.quantize_activations(groups),
            (*_pointers((on_card.x,)), ctypes.c_int64(groups), *_pointers(on_card.inputs)),
            stream,
        )
        if _fill_tiles(chosen):
            self._run_tiles(layout, table, order_pairs(chosen), per_token)
        else:
            self._copy_in("chosen", on_card.chosen, chosen.int())
            self._run_pairs(layout, table, chosen.numel(), per_token)
        result = self._host.tensor("outputs", torch.float32, tokens, per_token, hidden)
        driver.copy_out(result.data_ptr(), on_card.outputs, result.nbytes, stream)
        driver.synchronize(stream)
        return result

    def _run_pairs(self, layout: ExpertLayout, table: int, pairs: int, per_token: int) -> None:
        driver, stream, on_card = self._driver, self._stream, self._buffers
        inputs, gated = map(_pointers, (on_card.inputs, on_card.gated))
        where = _pointers((table, on_card.chosen))
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

    def _run_tiles(
        self, layout: ExpertLayout, table: int, pairs: PairOrder, per_token: int
    ) -> None:
        driver, stream, on_card = self._driver, self._stream, self._buffers
        self._copy_in("order", on_card.order, pairs.order)
        self._copy_in("experts", on_card.experts, pairs.experts)
        positions, groups = len(pairs.order), int(layout.gate.columns) // ACTIVATION_GROUP
        stride, each = ctypes.c_int64(positions), ctypes.c_int32(per_token)
        codes, *scales = _pointers(on_card.inputs)
        order, *turned = _pointers((on_card.order, *on_card.turned))
        driver.launch(
            gpu_launch.by_group(groups, positions),
            (
                *scales, ctypes.c_int32(groups), order, each, ctypes.c_int32(positions), stride,
                *turned,
            ),
            stream,
        )  # fmt: skip
        where = _pointers((table, on_card.order, on_card.experts))
        gated = _pointers(on_card.gated)
        driver.launch(
            gpu_launch.gate_up_tiles(layout, pairs.num_tiles),
            (layout, *where, each, codes, *turned, stride, *gated),
            stream,
        )
        driver.launch(
            gpu_launch.down_tiles(layout, pairs.num_tiles),
            (layout, *where, *gated, stride, *_pointers((on_card.outputs,))),
            stream,
        )

    def _copy_in(self, name: str, target: int, value: Tensor) -> None:
        """By way of the host's buffer of this name."""
        host = self._host.tensor(name, value.dtype, *value.shape)
        host.copy_(value)
        self._driver.copy_in(target, host.data_ptr(), host.nbytes, self._stream)

    def copy_table(self, table: Tensor, target: int) -> None:
        """Before what is launched next; the tensor may go at once."""
        self._driver.copy_in(target, table.data_ptr(), table.nbytes, self._stream)
        self._driver.synchronize(self._stream)

    def _allocate_activations(self, count: int, columns: int) -> tuple[int, int, int]:
        groups = columns // ACTIVATION_GROUP
        return (
            self.allocate(count * columns),
            self.allocate(4 * count * groups),
            self.allocate(4 * count * groups),
        )


def _fill_tiles(chosen: Tensor) -> bool:
    pairs_of_expert = torch.bincount(chosen[chosen >= 0])
    num_experts = int(pairs_of_expert.count_nonzero())
    return int(pairs_of_expert.sum()) >= TILE_PAIRS * num_experts > 0


def _pointers(addresses: Sequence[int]) -> list[Any]:
    return [ctypes.c_void_p(address) for address in addresses]
