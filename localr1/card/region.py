"""Parts of the card's memory that lie side by side in one allocation."""

from collections.abc import Callable, Sequence
from typing import Final

from torch import Tensor

ALIGNMENT: Final = 256
"""Of every part: more than the widest load of a kernel needs, and what a card's memory is read in
at once."""

Copy = Callable[[int, int, int], None]
"""(target on the card, source in RAM, bytes)."""


class Region:
    """Hands out parts of an allocation one after another, and fills them. base: its address; copy:
    how bytes get there. With neither nothing is copied, and `nbytes` says how much the same calls
    will take."""

    def __init__(self, base: int = 0, copy: Copy | None = None) -> None:
        self._base, self._copy = base, copy
        self.nbytes = 0

    def reserve(self, nbytes: int) -> int:
        """The address of so many bytes, whatever is in them."""
        address = self._base + self.nbytes
        self.nbytes += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return address

    def copied(self, source: int, nbytes: int) -> int:
        """The address of a copy of what lies in RAM."""
        return self.joined([(source, nbytes)])

    def joined(self, pieces: Sequence[tuple[int, int]]) -> int:
        """The address of copies of what lies in RAM, one right behind another: (source, bytes)."""
        start = address = self.reserve(sum(nbytes for _, nbytes in pieces))
        for source, nbytes in pieces:
            if self._copy is not None:
                self._copy(address, source, nbytes)
            address += nbytes
        return start

    def tensor(self, value: Tensor | None) -> int:
        """The address of a copy of a contiguous tensor, 0 for None."""
        if value is None:
            return 0
        assert value.is_contiguous()
        return self.copied(value.data_ptr(), value.nbytes)


def bytes_of(build: Callable[[Region], object]) -> int:
    """How much `build` takes of the region it is given."""
    region = Region()
    build(region)
    return region.nbytes
