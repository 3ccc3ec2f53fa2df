"""A fixed list of work for one stream of a card, noted once and given to it as often as needed."""

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

from localr1.kernels.gpu_driver import Driver
from localr1.kernels.gpu_launch import Launch


def pointer(address: int) -> ctypes.c_void_p:
    """0 for a null pointer."""
    return ctypes.c_void_p(address)


class Program:
    """What is the same at every run: kernels, addresses, sizes. What changes from run to run is
    read from the card's memory, so that a run can be captured in a graph.

    captured: whether it is, at the second run (the first one loads what the driver has not loaded
    yet, which a capture must not do). A graph costs the host one call where the list costs one a
    kernel. Only for a program whose copies are out of and into pinned memory.
    """

    def __init__(self, driver: Driver, stream: Any, *, captured: bool) -> None:
        self._driver, self._stream = driver, stream
        self._captured = captured
        self._work: list[Callable[[], None]] = []
        self._graph: Any = None
        self._runs = 0

    def __len__(self) -> int:
        return len(self._work)

    def launch(self, launch: Launch, *arguments: Any) -> None:
        """arguments: ctypes values, in the kernel's order."""
        self._work.append(partial(self._driver.launch, launch, arguments, self._stream))

    def copy_in(self, target: int, source: int, nbytes: int) -> None:
        self._work.append(partial(self._driver.copy_in, target, source, nbytes, self._stream))

    def copy_out(self, target: int, source: int, nbytes: int) -> None:
        self._work.append(partial(self._driver.copy_out, target, source, nbytes, self._stream))

    def run(self) -> None:
        """Give it to the stream, without waiting for it."""
        self._runs += 1
        if self._captured and self._runs == 2:
            self._driver.begin_capture(self._stream)
            self._issue()
            self._graph = self._driver.end_capture(self._stream)
        if self._graph is None:
            self._issue()
        else:
            self._driver.launch_graph(self._graph, self._stream)

    def _issue(self) -> None:
        for work in self._work:
            work()
