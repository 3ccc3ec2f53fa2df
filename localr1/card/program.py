"""A fixed list of work for a card, noted once and given to it as often as needed."""

import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from localr1.errors import LocalR1Error
from localr1.kernels.gpu_driver import Driver, HostFunction
from localr1.kernels.gpu_launch import Launch


def pointer(address: int) -> ctypes.c_void_p:
    """0 for a null pointer."""
    return ctypes.c_void_p(address)


@dataclass(frozen=True)
class Streams:
    """Of a card: `main`, and `side` for what the host does meanwhile; and the events by which they
    wait for each other."""

    main: Any
    side: Any
    forked: Any
    copied: Any
    joined: Any

    @staticmethod
    def of(driver: Driver) -> "Streams":
        return Streams(
            driver.stream(), driver.stream(), driver.event(), driver.event(), driver.event()
        )


class Program:
    """What is the same at every run: kernels, addresses, sizes. What changes from run to run is
    read from the card's memory, so that a run can be captured in a graph.

    captured: whether it is, at the second run (the first one loads what the driver has not loaded
    yet, which a capture must not do). A graph costs the host one call where the list costs one a
    kernel. Only for a program whose copies are out of and into pinned memory.
    """

    def __init__(self, driver: Driver, streams: Streams, *, captured: bool) -> None:
        self._driver = driver
        self.streams = streams
        self._captured = captured
        self._work: list[Callable[[], None]] = []
        self._graph: Any = None
        self._runs = 0

    def __len__(self) -> int:
        return len(self._work)

    def launch(self, launch: Launch, *arguments: Any) -> None:
        """arguments: ctypes values, in the kernel's order."""
        self._note(self._driver.launch, launch, arguments, self.streams.main)

    def copy_in(self, target: int, source: int, nbytes: int, *, side: bool = False) -> None:
        self._note(self._driver.copy_in, target, source, nbytes, self._stream(side))

    def copy_out(self, target: int, source: int, nbytes: int, *, side: bool = False) -> None:
        self._note(self._driver.copy_out, target, source, nbytes, self._stream(side))

    def call_host(self, function: HostFunction) -> None:
        """On the side stream."""
        self._note(self._driver.call_host, function, self.streams.side)

    def fork(self) -> None:
        """The side stream goes on behind what the main one has been given."""
        self._note(self._driver.record, self.streams.forked, self.streams.main)
        self._note(self._driver.wait_for, self.streams.forked, self.streams.side)

    def mark_copied(self) -> None:
        """Of the side stream, for `wait_for_copies`."""
        self._note(self._driver.record, self.streams.copied, self.streams.side)

    def wait_for_copies(self) -> None:
        self._note(self._driver.wait_for, self.streams.copied, self.streams.main)

    def join(self) -> None:
        """The main stream goes on behind what the side one has been given."""
        self._note(self._driver.record, self.streams.joined, self.streams.side)
        self._note(self._driver.wait_for, self.streams.joined, self.streams.main)

    def run(self) -> None:
        """Give it to the card, without waiting for it."""
        self._runs += 1
        main = self.streams.main
        if self._captured and self._runs == 2:
            self._graph = self._capture()
        if self._graph is None:
            self._issue()
        else:
            self._driver.launch_graph(self._graph, main)

    def _note(self, function: Callable[..., None], *arguments: Any) -> None:
        self._work.append(partial(function, *arguments))

    def _stream(self, side: bool) -> Any:
        return self.streams.side if side else self.streams.main

    def _capture(self) -> Any:
        main = self.streams.main
        self._driver.begin_capture(main)
        try:
            self._issue()
        except BaseException:
            # A stream that is captured does nothing, not even for those who wait for it.
            with contextlib.suppress(LocalR1Error):
                self._driver.end_capture(main)
            raise
        return self._driver.end_capture(main)

    def _issue(self) -> None:
        for work in self._work:
            work()
