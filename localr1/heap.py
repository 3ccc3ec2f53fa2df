"""How the C library keeps freed memory, while weights are read and after. Never imports torch.

glibc serves what is larger than a threshold from pages of its own, which go back to the system when
they are freed, and the rest from one heap. By itself it raises the threshold to the size of what is
freed, up to 32 MiB. Reading a model frees a stored matrix after each one that is kept: the next
falls into the hole, or not, and a tenth of the weights again may be lost in holes, from run to run
another amount.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# mallopt(3): parameters, and the values that glibc's own rule ends at.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
WHILE_READING = 1 << 20
"""Small enough for matrices, large enough that the maps of a model stay far below the system's
limit of 65,530."""
AFTERWARDS = 32 << 20
"""Temporaries of a pass are used again without asking the system for fresh, zeroed pages."""


@contextmanager
def own_pages() -> Iterator[None]:
    """Inside, large blocks take pages of their own. Does nothing but with glibc."""
    mallopt = _mallopt()
    if mallopt is None:
        yield
        return
    mallopt(MMAP_THRESHOLD, WHILE_READING)
    try:
        yield
    finally:
        mallopt(MMAP_THRESHOLD, AFTERWARDS)
        mallopt(TRIM_THRESHOLD, 2 * AFTERWARDS)


def _mallopt() -> Callable[[int, int], int] | None:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl has a mallopt that does nothing.
        return None
    function: Callable[[int, int], int] = library.mallopt
    return function
