"""The tier of experts in RAM, above their files: slots in an arena, and threads that read into it.

An expert comes in when a pass needs it, or before, when it is likely to. Reading, checking and
reordering into the kernels' layout happen in the reading threads; which slot holds what is decided
and changed in the thread of the engine alone, so there are no locks.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from localr1.experts.residency import Promotion, Residency
from localr1.experts.usage import ExpertUsage, Span
from localr1.kernels.native_experts import SlotArena


class ExpertFiles(Protocol):
    """Where experts are read from."""

    def read(self, layer: int, expert: int, arena: SlotArena, slot: int) -> int:
        """Read an expert into a slot; returns the bytes read. Called by several threads at once.
        Raises CheckpointError (truncated, changed, unreadable, a wrong checksum), NumericsError."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class _Read:
    """future: of a file, (bytes, Span); of a copy from the device, its seconds, a float."""

    future: "Future[Any]"
    slot: int
    ahead: bool = False  # Of the router's asking.
    promotion: Promotion | None = None  # Where the slot is reserved, not held.


class RamTier:
    """tables: int64 [num_experts] of each layer, the address of every expert held, 0 for one that
    is not. residency: whose slots these are. num_threads: that read."""

    def __init__(
        self,
        arena: SlotArena,
        residency: Residency,
        tables: Sequence[Tensor],
        files: ExpertFiles,
        usage: ExpertUsage,
        num_threads: int,
    ) -> None:
        self.arena = arena
        self.residency = residency
        self.spans: list[Span] | None = None
        self._tables = tables
        # The same memory: a number of numpy's takes a tenth of the time of one of torch's.
        self._addresses = [table.numpy() for table in tables]
        self._files = files
        self._usage = usage
        self._threads = ThreadPoolExecutor(num_threads, "localr1-read")
        self._num_threads = num_threads
        self._reads: dict[tuple[int, int], _Read] = {}
        self._read_ahead: set[tuple[int, int]] = set()
        self._num_pinned = 0

    @property
    def is_complete(self) -> bool:
        """Whether every expert is held, so that no pass needs a file."""
        size = self.residency.num_layers * self.residency.num_experts
        return self.residency.num_resident == size and not self._reads

    @property
    def num_reading(self) -> int:
        return len(self._reads)

    @property
    def room(self) -> int:
        """Slots that can be asked for: neither pinned nor being read into."""
        return self.residency.num_slots - self._num_pinned - len(self._reads)

    def holds(self, layer: int, expert: int) -> bool:
        return self.address(layer, expert) != 0

    def address(self, layer: int, expert: int) -> int:
        """0 for one that is not held."""
        address: int = self._addresses[layer].item(expert)
        return address

    def pin(self, layer: int, expert: int) -> None:
        """A held expert stays until `unpin`."""
        self.residency.pin(layer, expert)
        self._num_pinned += 1

    def unpin(self, layer: int, expert: int) -> None:
        self.residency.unpin(layer, expert)
        self._num_pinned -= 1

    @contextmanager
    def pinned(self, layer: int, experts: Sequence[int]) -> Iterator[None]:
        """Held experts of a layer stay until the end."""
        for expert in experts:
            self.pin(layer, expert)
        try:
            yield
        finally:
            for expert in experts:
                self.unpin(layer, expert)

    def is_reading(self, layer: int, expert: int) -> bool:
        return (layer, expert) in self._reads

    def receive(
        self, layer: int, expert: int, score: float, copy: Callable[[int], "Future[float]"]
    ) -> bool:
        """Begin to take over an expert from the device that this tier does not hold, if it is not
        being read, and there is room or something worth less than `score`. copy: is given the
        address to copy to. Returns whether it was begun."""
        if self.is_reading(layer, expert) or not self.residency.has_room_for(layer, score):
            return False
        slot = self._take_slot(layer, expert)
        self._reads[layer, expert] = _Read(copy(self.arena.address(slot)), slot)
        return True

    def request(self, layer: int, expert: int, *, ahead: bool = False) -> None:
        """Begin to read an expert that is neither held nor being read. There must be room."""
        slot = self._take_slot(layer, expert)
        future = self._threads.submit(self._read, layer, expert, slot)
        self._reads[layer, expert] = _Read(future, slot, ahead=ahead)
        if ahead:
            self._usage.prefetched += 1

    def collect(self, wanted: Iterable[int], layer: int, *, block: bool) -> list[int]:
        """Take what has been read into the tables. Returns those of `wanted`, experts of one layer,
        that arrived; block: wait until at least one of them did. An error of one of them is raised,
        one of another is forgotten: who needs it reads it again."""
        pending = {(layer, expert) for expert in wanted} & self._reads.keys()
        if block and pending and not any(self._reads[key].future.done() for key in pending):
            begin = time.perf_counter()
            wait([self._reads[key].future for key in pending], return_when=FIRST_COMPLETED)
            self._usage.disk_seconds += time.perf_counter() - begin
        done = [key for key, read in self._reads.items() if read.future.done()]
        arrived = [key for key in done if self._take(key, needed=key in pending)]
        return [key[1] for key in arrived if key in pending]

    def was_read_ahead(self, layer: int, expert: int) -> bool:
        """Whether this use of a held expert is the first since it was read ahead. Asked once a
        use."""
        if (layer, expert) in self._read_ahead:
            self._read_ahead.remove((layer, expert))
            return True
        return False

    def is_read_ahead(self, layer: int, expert: int) -> bool:
        """Whether an expert is being read because it was expected to be needed."""
        read = self._reads.get((layer, expert))
        return read is not None and read.ahead

    def make_room_for(self, keys: Sequence[int]) -> None:
        """Drop what is worth least for those of `keys` that are absent. Nothing may be pinned."""
        self.drain()
        for key in self.residency.make_room_for(keys):
            self._forget(key)

    def fill(self, keys: Sequence[int] | None = None) -> Iterator[int]:
        """Read experts into all free slots, these or the best first, many at once; yields bytes as
        they arrive. Raises what reading raises."""
        residency = self.residency
        for promotion in residency.warm_start() if keys is None else residency.reserve(keys):
            while len(self._reads) >= 2 * self._num_threads:
                yield self.wait_for_any(needed=True)
            layer, expert, slot = promotion.layer, promotion.expert, promotion.slot
            future = self._threads.submit(self._read, layer, expert, slot)
            self._reads[layer, expert] = _Read(future, slot, promotion=promotion)
        while self._reads:
            yield self.wait_for_any(needed=True)

    def drop(self, layer: int, expert: int) -> None:
        """Free the slot of an expert that is held and not pinned."""
        self.residency.remove(layer, expert)
        self._forget(self.residency.key(layer, expert))

    def shrink(self, num_slots: int) -> None:
        """Keep so many slots. What is being read is waited for first; nothing may be pinned in a
        slot beyond."""
        self.drain()
        for key in self.residency.shrink(num_slots):
            self._forget(key)
        self.arena.resize(num_slots)

    def drain(self) -> None:
        """Wait for all reads. Errors of reads that nobody waits for are nobody's."""
        while self._reads:
            self.wait_for_any()

    def wait_for_any(self, *, needed: bool = False) -> int:
        """Wait for some of the reads; returns the bytes that arrived. needed: raise an error."""
        before = self._usage.disk_bytes
        wait([read.future for read in self._reads.values()], return_when=FIRST_COMPLETED)
        for key in [key for key, read in self._reads.items() if read.future.done()]:
            self._take(key, needed=needed)
        return self._usage.disk_bytes - before

    def stop(self) -> None:
        """End the threads. What is being read is waited for; what waits is not read."""
        self._threads.shutdown(cancel_futures=True)

    def _take_slot(self, layer: int, expert: int) -> int:
        slot, evicted = self.residency.demand(layer, expert)
        if evicted is not None:
            self._forget(evicted)
        self.residency.pin(layer, expert)
        return slot

    def _take(self, key: tuple[int, int], *, needed: bool) -> bool:
        """A read that is over: its expert is held from now on, or its slot is free again."""
        read = self._reads.pop(key)
        error = read.future.exception()
        self._settle(key, read, arrived=error is None)
        if error is not None:
            if needed or not isinstance(error, Exception):
                raise error
            return False
        result = read.future.result()
        if isinstance(result, float):
            self._usage.demotions += 1
            self._usage.link_bytes += self.arena.slot_bytes
        else:
            nbytes, span = result
            self._usage.disk_bytes += nbytes
            if self.spans is not None:
                self.spans.append(span)
        self._tables[key[0]][key[1]] = self.arena.address(read.slot)
        if read.ahead and not needed:  # Else its use was counted while it was awaited.
            self._read_ahead.add(key)
        return True

    def _settle(self, key: tuple[int, int], read: _Read, *, arrived: bool) -> None:
        if read.promotion is None:
            self.residency.unpin(*key)
            if not arrived:
                self.residency.remove(*key)
        elif arrived:
            self.residency.complete(read.promotion)
        else:
            self.residency.cancel(read.promotion)

    def _forget(self, key: int) -> None:
        layer, expert = divmod(key, self.residency.num_experts)
        self._tables[layer][expert] = 0
        self._read_ahead.discard((layer, expert))

    def _read(self, layer: int, expert: int, slot: int) -> tuple[int, Span]:
        begin = time.perf_counter()
        nbytes = self._files.read(layer, expert, self.arena, slot)
        return nbytes, Span("read", begin, time.perf_counter(), layer, expert)
