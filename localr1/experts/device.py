"""What holds hot experts and computes them beside the CPU: a protocol, and a simulated one.

A device has its own memory, in slots of one expert each; a link that copies experts into it; and
compute of its own. All three work in the background. Tables (which expert of which layer lies in
which slot) change only when `place` is called, which the store does between passes.
"""

import ctypes
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from localr1.kernels.native import NativeKernels
from localr1.kernels.native_experts import ExpertForm, NativeExperts, SlotArena

STREAM_SLOTS: Final = 2
"""A double buffer: one is copied into while the other is computed from."""
LEAST_SLEEP: Final = 50e-6
"""Seconds; what a copy owes below this is paid by the next one, as no system sleeps so short."""


@dataclass(frozen=True)
class Streamed:
    """An expert that is copied over the link to be computed once. address: where it lies in RAM."""

    expert: int
    address: int


@dataclass(frozen=True)
class DeviceTimes:
    """Seconds of one call of `compute`: of the experts that lie there, of those that are streamed,
    and, between these, waiting for the link."""

    compute: float
    streamed: float
    link: float


class Device(Protocol):
    """Calls come from one thread. Every Future's error is a LocalR1Error; a DeviceError, which any
    call may raise, says that the device and all it holds are lost."""

    @property
    def name(self) -> str: ...

    @property
    def memory(self) -> int:
        """Bytes there are for experts."""
        ...

    @property
    def num_slots(self) -> int: ...

    def add_layer(self, form: ExpertForm, num_experts: int) -> int:
        """Before `resize`. Returns the layer's number, counted from 0."""
        ...

    def resize(self, num_slots: int) -> int:
        """Make room for so many experts, or as many as there is memory for; returns how many. What
        lay in slots beyond is lost; the tables must not name them any more."""
        ...

    def upload(self, address: int, nbytes: int, slot: int | None) -> "Future[float]":
        """Copy an expert from RAM into a slot that no table names; seconds it took. None: into no
        slot, to measure the link while nothing runs."""
        ...

    def download(self, slot: int, address: int, nbytes: int) -> "Future[float]":
        """Copy the expert in a slot back into RAM; seconds it took. What is asked to be copied into
        the slot later is copied later."""
        ...

    def place(self, layer: int, expert: int, slot: int | None) -> None:
        """The expert lies in this slot from now on; None: nowhere."""
        ...

    def compute(
        self,
        layer: int,
        x: Tensor,
        chosen: Tensor,
        streamed: Sequence[Streamed],
        outputs: Tensor,
    ) -> "Future[DeviceTimes]":
        """`Kernels.expert_outputs` of the experts that lie here and of those that are streamed."""
        ...

    def shortage(self) -> int:
        """Bytes that its memory is short of, because others took some: slots are to give way."""
        ...

    def close(self) -> None:
        """As often as one likes."""
        ...


class SimulatedDevice:
    """Host memory as the device's, copies paced to a bandwidth, the CPU kernels as its compute:
    every path of the store runs, and is tested, on any machine.

    link_bandwidth: bytes a second. latency: seconds of each copy. isa: of the kernels, as the
    CPU's, since RAM and device hold the same blocked bytes.
    """

    def __init__(
        self, memory: int, link_bandwidth: float, latency: float, threads: int, isa: str
    ) -> None:
        self.memory = memory
        self.name = "simulated"
        self._bandwidth, self._latency = link_bandwidth, latency
        self._kernels = NativeKernels(threads=threads, isa=isa)
        self._computing = ThreadPoolExecutor(1, "localr1-device")
        self._copying = ThreadPoolExecutor(1, "localr1-link")
        self._layers: list[NativeExperts] = []
        self._arena: SlotArena | None = None
        self._buffers: SlotArena | None = None
        self._link_free = 0.0  # When the link has carried all it was given, in perf_counter's time.

    @property
    def num_slots(self) -> int:
        return 0 if self._arena is None else self._arena.size

    def add_layer(self, form: ExpertForm, num_experts: int) -> int:
        layout = self._kernels.expert_layout(form)
        table = torch.zeros(num_experts, dtype=torch.int64)
        self._layers.append(NativeExperts(layout, table, form.hidden, self))
        return len(self._layers) - 1

    def resize(self, num_slots: int) -> int:
        if self._arena is None or self._buffers is None:
            slot_bytes = max(int(bank.layout.nbytes) for bank in self._layers)
            self._arena, self._buffers = SlotArena(slot_bytes), SlotArena(slot_bytes)
            if self._buffers.resize(STREAM_SLOTS) < STREAM_SLOTS:
                return 0
        room = self.memory // self._arena.slot_bytes - STREAM_SLOTS
        return self._arena.resize(max(0, min(num_slots, room)))

    def upload(self, address: int, nbytes: int, slot: int | None) -> "Future[float]":
        assert self._arena is not None
        target = self._buffer(0) if slot is None else self._arena.address(slot)
        return self._copying.submit(self._copy, address, target, nbytes)

    def download(self, slot: int, address: int, nbytes: int) -> "Future[float]":
        assert self._arena is not None
        return self._copying.submit(self._copy, self._arena.address(slot), address, nbytes)

    def place(self, layer: int, expert: int, slot: int | None) -> None:
        assert self._arena is not None
        self._layers[layer].table[expert] = 0 if slot is None else self._arena.address(slot)

    def compute(
        self,
        layer: int,
        x: Tensor,
        chosen: Tensor,
        streamed: Sequence[Streamed],
        outputs: Tensor,
    ) -> "Future[DeviceTimes]":
        return self._computing.submit(self._compute, layer, x, chosen, streamed, outputs)

    def shortage(self) -> int:
        return 0

    def close(self) -> None:
        self._computing.shutdown()
        self._copying.shutdown()

    def _compute(
        self,
        layer: int,
        x: Tensor,
        chosen: Tensor,
        streamed: Sequence[Streamed],
        outputs: Tensor,
    ) -> DeviceTimes:
        bank = self._layers[layer]
        nbytes = int(bank.layout.nbytes)
        copies = [
            self._stream(each.address, index, nbytes)
            for index, each in enumerate(streamed[:STREAM_SLOTS])
        ]
        waited = 0.0
        begin = time.perf_counter()
        here = bank.table != 0
        self._kernels.expert_outputs(x, chosen.where(here[chosen.clamp_min(0)], -1), bank, outputs)
        resident = time.perf_counter() - begin
        for index, each in enumerate(streamed):
            asked = time.perf_counter()
            copies[index].result()
            waited += time.perf_counter() - asked
            buffer = self._buffer(index)
            passing_table = torch.zeros_like(bank.table)
            passing_table[each.expert] = buffer
            view = NativeExperts(bank.layout, passing_table, bank.hidden_size, self)
            only = chosen.where(chosen == each.expert, -1)
            self._kernels.expert_outputs(x, only, view, outputs)
            following = index + STREAM_SLOTS
            if following < len(streamed):
                copies.append(self._stream(streamed[following].address, following, nbytes))
        return DeviceTimes(resident, time.perf_counter() - begin - resident - waited, waited)

    def _buffer(self, index: int) -> int:
        assert self._buffers is not None
        return self._buffers.address(index % STREAM_SLOTS)

    def _stream(self, address: int, index: int, nbytes: int) -> "Future[float]":
        return self._copying.submit(self._copy, address, self._buffer(index), nbytes)

    def _copy(self, source: int, target: int, nbytes: int) -> float:
        """As long as a link of this bandwidth takes, or as memory takes, whichever is longer."""
        begin = time.perf_counter()
        ctypes.memmove(target, source, nbytes)
        now = time.perf_counter()
        self._link_free = max(self._link_free, begin) + self._latency + nbytes / self._bandwidth
        if self._link_free - now > LEAST_SLEEP:
            time.sleep(self._link_free - now)
        return time.perf_counter() - begin
