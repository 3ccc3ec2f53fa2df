"""Threads that share out whole pieces of work, each on its own, so that sums never depend on their
number."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread_an_operation() -> Iterator[int]:
    """Yields torch's number of threads and makes it 1 meanwhile. Whole chunks go to threads, which
    then meet once a matrix: met at every small operation they gain nothing, and on a busy machine
    each waits for the other (measured: 20 times slower)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
