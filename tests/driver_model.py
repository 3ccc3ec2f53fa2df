"""A `Driver` without a card: the kernels run on the CPU through tests/cuda_model, copies and
launches wait in their stream until somebody synchronizes, and anything may be made to fail.

Nothing is done before it must be, so that a copy out of memory that was used again meanwhile, or a
result that is looked at too early, shows; or else everything is done at once, so that what is
written over too early shows.
"""

import contextlib
import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_model import Buffer, Memory, ModelError, ModelGpu

from localr1.errors import DeviceError, MemoryLimitError
from localr1.kernels.gpu_driver import HostFunction
from localr1.kernels.gpu_launch import Launch

LARGE = 1 << 40
HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Machine:
    """What cards of one machine share: one thing is done at a time, whichever card does it.
    current: of each thread, the card it entered last."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.free = threading.Condition(self.lock)
        self.streams: list[Stream] = []
        self.memories: list[Memory] = []
        self.current = threading.local()


@dataclass(eq=False)
class Stream:
    """Work that was given and is not yet done. done, given: how much of it, ever. noted: while it
    is captured. free: told when no thread is at its work any more; the machine's lock."""

    free: threading.Condition
    waiting: list[Callable[[], object]] = field(default_factory=list)
    done: int = 0
    noted: "list[Callable[[], object]] | None" = None
    thread: int | None = None

    @property
    def given(self) -> int:
        return self.done + (self.thread is not None) + len(self.waiting)

    def run(self, until: int) -> None:
        """One thread at a time, as work is done in order: what calls the host lets others in."""
        me = threading.get_ident()
        while self.done < until:
            assert self.thread != me, "a stream's own work waits for it"
            if self.thread is not None:
                self.free.wait()
                continue
            work = self.waiting.pop(0)
            self.thread = me
            try:
                work()
            finally:
                self.done += 1
                self.thread = None
                self.free.notify_all()


@dataclass(eq=False)
class Event:
    """noted: of the capture that it was recorded in."""

    stream: Stream | None = None
    until: int = 0
    noted: "list[Callable[[], object]] | None" = None


@dataclass
class Failure:
    """The n-th call of a kind fails, counted from 1 and from now on; a card that is lost fails
    all that follow."""

    kind: str
    at: int
    error: Exception
    lost: bool = False


class ModelDriver:
    """total: bytes of the card. pinned: whether there is pinned memory. others: bytes that other
    programs have taken. eager: work is done when it is given. others_first: before a stream that is
    waited for goes on, all others do as far as they may. machine: of several cards, which cannot
    reach each other's memory; each call must come from a thread that entered this one last.
    on_call: told of every call."""

    def __init__(
        self,
        rows: int = 16,
        seed: int = 0,
        *,
        total: int = LARGE,
        pinned: bool = True,
        eager: bool = False,
        others_first: bool = False,
        machine: Machine | None = None,
        name: str = "model",
    ) -> None:
        self.name = name
        self.memory = Memory(at_end=seed % 2 == 0)
        self.others = 0
        self.calls: dict[str, int] = {}
        self.launched: list[str] = []
        self.copied_out = 0
        """Bytes of the last copy to the host."""
        self.closed = 0
        self.on_call: Callable[[str], object] = lambda kind: None
        self._gpu = ModelGpu(self.memory, seed)
        self._rows, self._total, self._pinned = rows, total, pinned
        self._eager, self._others_first = eager, others_first
        self._machine = machine or Machine()
        self._machine.memories.append(self.memory)
        self._host: dict[int, Any] = {}
        self._host_functions: list[HostFunction] = []
        self._joined: list[Stream] = []
        self._failure: Failure | None = None
        self._is_lost = False
        self._lock = self._machine.lock

    def arm(self, kind: str, at: int, error: Exception, *, lost: bool = False) -> None:
        with self._lock:
            self.calls = {}
            self._failure = Failure(kind, at, error, lost)

    def enter(self) -> None:
        self._machine.current.card = self
        self._count("enter")

    def free_memory(self) -> int:
        self._count("free_memory")
        return max(0, self._total - self.taken - self.others)

    @property
    def taken(self) -> int:
        return sum(buffer.nbytes for buffer in self.memory.buffers)

    @property
    def is_idle(self) -> bool:
        """Whether no card of the machine has work left."""
        return not any(stream.waiting for stream in self._machine.streams)

    @property
    def num_pinned(self) -> int:
        return len(self._host)

    def allocate(self, nbytes: int) -> int:
        with self._lock:
            self._count("allocate")
            if self.taken + self.others + nbytes > self._total:
                raise MemoryLimitError(f"{self.name}: allocate", found="no free memory on the card")
            fill = torch.full((nbytes,), 0x7F, dtype=torch.uint8)
            return self.memory.upload(f"allocation {len(self.memory.buffers)}", fill).address

    def free(self, address: int) -> None:
        with self._lock:
            self._count("free")
            self.memory.buffers.remove(self._buffer(address))

    def allocate_pinned(self, nbytes: int) -> int | None:
        self._count("allocate_pinned")
        if not self._pinned:
            return None
        memory = (ctypes.c_uint8 * nbytes)()
        ctypes.memset(memory, 0x7F, nbytes)
        self._host[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def free_pinned(self, address: int) -> None:
        del self._host[address]

    def stream(self) -> Stream:
        self._count("stream")
        self._machine.streams.append(Stream(self._machine.free))
        return self._machine.streams[-1]

    def event(self) -> Event:
        self._count("event")
        return Event()

    def copy_in(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        self._check_range(target, nbytes)
        self._give("copy_in", stream, lambda: ctypes.memmove(target, source, nbytes))

    def copy_out(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        self._check_range(source, nbytes)

        def copy() -> None:
            self.copied_out = nbytes
            ctypes.memmove(target, source, nbytes)

        self._give("copy_out", stream, copy)

    def launch(self, launch: Launch, arguments: Sequence[Any], stream: Stream) -> None:
        # As the driver does: arguments are read now.
        values = [type(argument).from_buffer_copy(argument) for argument in arguments]

        def run() -> None:
            self.launched.append(launch.kernel)
            others = [each for each in self._machine.memories if each is not self.memory]
            try:
                with contextlib.ExitStack() as stack:
                    for memory in others:
                        stack.enter_context(memory.forbidden())
                    self._gpu.launch(launch, *values, rows=self._rows)
            except ModelError as error:
                raise DeviceError(f"{self.name}: {launch.kernel}", found=str(error)) from None

        self._give("launch", stream, run)

    def record(self, event: Event, stream: Stream) -> None:
        self._count("record")
        event.stream, event.until, event.noted = stream, stream.given, stream.noted

    def wait_for(self, event: Event, stream: Stream) -> None:
        """In a capture the order of the calls is one of those that a graph may take."""
        with self._lock:
            if event.noted is not None:
                self._count("wait_for")
                assert stream.noted in (None, event.noted)
                stream.noted = event.noted
                self._joined.append(stream)
                return
            awaited, until = event.stream, event.until
            assert awaited is not None
            self._give("wait_for", stream, lambda: awaited.run(until))

    def call_host(self, function: HostFunction, stream: Stream) -> None:
        self._host_functions.append(function)

        def call() -> None:
            # Other threads may use the card meanwhile, as the function may wait for them.
            self._lock.release()
            try:
                HOST_FUNCTION(function.address)(function.argument)
            finally:
                self._lock.acquire()

        self._give("call_host", stream, call)

    def wait(self, event: Event) -> None:
        with self._lock:
            self._count("wait")
            if event.stream is not None:
                event.stream.run(event.until)

    def synchronize(self, stream: Stream) -> None:
        with self._lock:
            self._count("synchronize")
            assert stream.noted is None, "a stream that is captured does nothing"
            for other in self._machine.streams if self._others_first else ():
                if other is not stream and other.thread is None:
                    other.run(other.given)
            stream.run(stream.given)

    def begin_capture(self, stream: Stream) -> None:
        self._count("begin_capture")
        assert stream.noted is None
        stream.noted = []

    def end_capture(self, stream: Stream) -> "list[Callable[[], object]]":
        """Also where it fails, as CUDA does."""
        noted = stream.noted
        assert noted is not None
        for each in (stream, *self._joined):
            each.noted = None
        self._joined.clear()
        self._count("end_capture")
        return noted

    def launch_graph(self, graph: "list[Callable[[], object]]", stream: Stream) -> None:
        with self._lock:
            self._count("launch_graph")
            stream.waiting += graph
            if self._eager:
                stream.run(stream.given)

    def close(self) -> None:
        self.closed += 1

    def _give(self, kind: str, stream: Stream, work: Callable[[], object]) -> None:
        with self._lock:
            self._count(kind)
            if stream.noted is not None:
                stream.noted.append(work)
                return
            stream.waiting.append(work)
            if self._eager:
                stream.run(stream.given)

    def _count(self, kind: str) -> None:
        with self._lock:
            entered = getattr(self._machine.current, "card", None)
            assert entered is self, f"{kind}: the thread did not enter {self.name}"
            self.calls[kind] = self.calls.get(kind, 0) + 1
            self.on_call(kind)
            failure = self._failure
            if self._is_lost and failure is not None:
                raise failure.error
            if failure is not None and kind == failure.kind and self.calls[kind] == failure.at:
                self._is_lost = failure.lost
                raise failure.error

    def _buffer(self, address: int) -> Buffer:
        return next(each for each in self.memory.buffers if each.address == address)

    def _check_range(self, address: int, nbytes: int) -> None:
        """A copy stays within one allocation."""
        with self._lock:
            assert any(
                each.address <= address and address + nbytes <= each.address + each.nbytes
                for each in self.memory.buffers
            ), self.memory.describe(address)
