"""The memory of a graphics card that experts lie in, and the host's that copies go through."""

import contextlib
import ctypes
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from localr1.errors import MemoryLimitError
from localr1.kernels.gpu_driver import Driver


class CardSlots:
    """Slots of one expert each, in plain allocations. slot_bytes: a multiple of 16, so that the
    widest loads of the kernels are aligned in every slot. chunk_bytes: of an allocation, or a slot
    where that is larger: what can be given back."""

    def __init__(self, driver: Driver, slot_bytes: int, chunk_bytes: int) -> None:
        assert slot_bytes % 16 == 0
        self.slot_bytes = slot_bytes
        self.size = 0
        self._driver = driver
        self._per_chunk = max(1, chunk_bytes // slot_bytes)
        self._chunks: list[tuple[int, int]] = []
        """(address, slots)."""

    def resize(self, num_slots: int) -> int:
        """Make so many, or as many as there is memory for; returns how many. Memory is given back
        in whole allocations."""
        while self._chunks and self._capacity - self._chunks[-1][1] >= num_slots:
            self._driver.free(self._chunks.pop()[0])
        with contextlib.suppress(MemoryLimitError):
            while self._capacity < num_slots:
                slots = min(self._per_chunk, num_slots - self._capacity)
                self._chunks.append((self._driver.allocate(slots * self.slot_bytes), slots))
        self.size = min(num_slots, self._capacity)
        return self.size

    def address(self, slot: int) -> int:
        assert 0 <= slot < self.size
        for start, slots in self._chunks:
            if slot < slots:
                return start + slot * self.slot_bytes
            slot -= slots
        raise AssertionError("a slot lies in a chunk")

    @property
    def _capacity(self) -> int:
        return sum(slots for _, slots in self._chunks)


class HostMemory:
    """Named buffers of the host, pinned where the system allows it: a copy out of pageable memory
    makes the driver copy twice."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._pinned: dict[str, int] = {}
        self._pageable: dict[str, Tensor] = {}

    def allocate(self, name: str, nbytes: int) -> None:
        address = self._driver.allocate_pinned(nbytes)
        if address is None:
            self._pageable[name] = torch.empty(nbytes, dtype=torch.uint8)
        else:
            self._pinned[name] = address

    @property
    def is_all_pinned(self) -> bool:
        return not self._pageable

    def is_pinned(self, name: str) -> bool:
        return name in self._pinned

    def tensor(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """The beginning of a buffer; of no use after `free`."""
        nbytes = math.prod(shape) * dtype.itemsize
        if name in self._pageable:
            return self._pageable[name][:nbytes].view(dtype).view(shape)
        raw = (ctypes.c_uint8 * nbytes).from_address(self._pinned[name])
        return torch.frombuffer(raw, dtype=dtype).view(shape)

    def free(self) -> None:
        self._pageable.clear()
        while self._pinned:
            self._driver.free_pinned(self._pinned.popitem()[1])


class Staging:
    """Copies of pageable memory by way of pinned memory, so that neither side waits for the other:
    one half of it is filled, or emptied, while the other is on its way. Where the system gives
    none, the driver copies straight. half_bytes: of each half. Used by one thread at a time."""

    def __init__(self, driver: Driver, half_bytes: int) -> None:
        self._driver = driver
        self._half_bytes = half_bytes
        self._done = [driver.event() for _ in range(2)]
        self._address = driver.allocate_pinned(2 * half_bytes)

    def copy_in(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """From RAM to the card; returns when it is there."""
        driver = self._driver
        if self._address is None:
            driver.copy_in(target, source, nbytes, stream)
        else:
            for index, (offset, size) in enumerate(self._pieces(nbytes)):
                half = index % 2
                if index >= 2:
                    driver.wait(self._done[half])
                staging = self._address + half * self._half_bytes
                ctypes.memmove(staging, source + offset, size)
                driver.copy_in(target + offset, staging, size, stream)
                driver.record(self._done[half], stream)
        driver.synchronize(stream)

    def copy_out(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """From the card to RAM: a piece comes while the one before is put in place."""
        driver = self._driver
        if self._address is None:
            driver.copy_out(target, source, nbytes, stream)
            driver.synchronize(stream)
            return
        before: tuple[int, int, int] | None = None
        for index, (offset, size) in enumerate(self._pieces(nbytes)):
            half = index % 2
            staging = self._address + half * self._half_bytes
            driver.copy_out(staging, source + offset, size, stream)
            driver.record(self._done[half], stream)
            if before is not None:
                driver.wait(self._done[1 - half])
                ctypes.memmove(*before)
            before = target + offset, staging, size
        driver.synchronize(stream)
        assert before is not None
        ctypes.memmove(*before)

    def free(self) -> None:
        if self._address is not None:
            self._driver.free_pinned(self._address)
            self._address = None

    def _pieces(self, nbytes: int) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of what goes through one half at a time."""
        for offset in range(0, nbytes, self._half_bytes):
            yield offset, min(self._half_bytes, nbytes - offset)
