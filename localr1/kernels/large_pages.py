"""Memory in large pages for float matrices that every token reads. Of small ones the processor
translates an address every 4 KiB, and its prefetchers stop there.

Packed matrices have such memory from the native module (cuda/cpu/memory.h).
"""

import contextlib
import mmap
from typing import Final

import torch
from torch import Tensor

LARGE_PAGE: Final = 2 << 20
CHUNK: Final = 32 << 20
ALIGNMENT: Final = 64
ADVICE: Final[int | None] = getattr(mmap, "MADV_HUGEPAGE", None)
"""Linux has it; elsewhere memory is what it is."""


class LargePages:
    """Tensors side by side in large chunks; a chunk goes with the last tensor in it. Used by one
    thread."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def copy_of(self, tensor: Tensor) -> Tensor:
        """The same values, contiguous. Raises what allocating raises."""
        if ADVICE is None:
            return tensor.clone(memory_format=torch.contiguous_format)
        nbytes = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if self._used + nbytes > len(self._chunk):
            self._chunk, self._used = _chunk(max(nbytes, CHUNK), ADVICE), 0
        place = self._chunk[self._used : self._used + tensor.nbytes]
        self._used += nbytes
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _chunk(nbytes: int, advice: int) -> Tensor:
    """uint8 [nbytes or a little more], from a large page's beginning to one's end."""
    nbytes = -(-nbytes // LARGE_PAGE) * LARGE_PAGE
    memory = mmap.mmap(-1, nbytes + LARGE_PAGE)
    with contextlib.suppress(OSError):  # Advice only: a system may have no such pages.
        memory.madvise(advice)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % LARGE_PAGE
    return whole[begin : begin + nbytes]
