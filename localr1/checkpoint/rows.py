"""A tensor in pieces of rows, so that none need be in memory whole."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from localr1.kernels.block_scaled import BlockScaledRows

Rows = Tensor | BlockScaledRows
"""Some rows of a tensor (along its first dimension) or all: as numbers, or FP8 with its scales."""


def row_ranges(shape: Sequence[int], row_nbytes: int, max_nbytes: int) -> Iterator[tuple[int, int]]:
    """(first row, the one behind the last) of pieces of at most max_nbytes, one row at least; one
    piece of a tensor without rows. A number without a shape counts as a row."""
    rows = shape[0] if shape else 1
    step = max(1, max_nbytes // max(1, row_nbytes))
    for begin in range(0, max(1, rows), step):
        yield begin, min(rows, begin + step)


def pieces_by(
    read: Callable[[int, int], Rows], shape: Sequence[int], nbytes: int, max_nbytes: int
) -> Iterator[Rows]:
    """What `read` returns of each range. nbytes: of the whole, as `read` returns it."""
    rows = shape[0] if shape else 1
    for begin, end in row_ranges(shape, nbytes // max(1, rows), max_nbytes):
        yield read(begin, end)
