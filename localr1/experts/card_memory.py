"""The memory of a graphics card that experts lie in, and the host's that copies go through."""

import contextlib
import ctypes
import math

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
