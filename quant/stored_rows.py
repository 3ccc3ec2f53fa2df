"""The numbers of a stored matrix, read a few rows at a time: what is asked of a matrix never takes
its size in memory, where its format has its rows one after another (stored.py)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from localr1.checkpoint.fp8 import dequantize
from localr1.checkpoint.rows import Rows
from localr1.checkpoint.stored import CheckpointInPieces
from localr1.kernels.block_scaled import BlockScaledRows

PIECE_BYTES = 8 << 20
"""Of the source's rows that are read at once. FP8 becomes four times as many."""


def float_pieces(checkpoint: CheckpointInPieces, name: str) -> Iterator[Tensor]:
    """The rows of the tensor that `read` returns, in order. Raises what reading raises."""
    for rows in checkpoint.pieces(name, PIECE_BYTES):
        yield numbers(rows)


def numbers(rows: Rows) -> Tensor:
    return dequantize(rows) if isinstance(rows, BlockScaledRows) else rows


def rows_at(pieces: Iterator[Tensor], places: Tensor) -> Tensor:
    """float32 [n, columns], of the matrix in `pieces`. places: int64 [n], in any order, each below
    its number of rows. Reads no further than the last of them."""
    order = places.argsort(stable=True)
    ordered = places[order]
    result, first, done = torch.empty(0), 0, 0
    for rows in pieces:
        if not done:
            result = torch.empty(len(places), rows.shape[1])
        end = int(torch.searchsorted(ordered, first + len(rows)))
        result[order[done:end]] = rows[ordered[done:end] - first].to(torch.float32)
        first, done = first + len(rows), end
        if done == len(places):
            break
    assert done == len(places), "a matrix has its rows"
    return result
