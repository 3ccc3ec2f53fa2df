"""Arguments of the GPU kernels: the structures of cuda/blocks.h, passed by value through ctypes,
and how many blocks a product takes."""

import ctypes
from typing import Final

from localr1.qtypes import ACTIVATION_GROUP, QuantScheme

UNIT_ROWS: Final = 16
"""Rows of a product that one block of a grid computes (cuda/gpu/products.h)."""
UNIT_THREADS: Final = 128
TOKEN_TILES: Final = (8, 4, 2, 1)
"""Tokens of one block of a grid: a kernel for each."""


class MatrixLayout(ctypes.Structure):
    """`MatrixLayout` of cuda/blocks.h, 40 bytes. scale_type: the numbers of its `ScaleType`.

    The kernels know rows_per_block and bits when they are compiled; here they are filled in for the
    same structure on both sides."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("rows_per_block", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("has_zero", ctypes.c_int32),
    )

    @staticmethod
    def of(
        rows: int, columns: int, rows_per_block: int, scheme: QuantScheme, scale_type: int
    ) -> "MatrixLayout":
        assert columns % ACTIVATION_GROUP == 0
        return MatrixLayout(
            rows,
            columns,
            rows_per_block,
            scheme.bits,
            scheme.group_size,
            scale_type,
            not scheme.symmetric,
        )


class ExpertLayout(ctypes.Structure):
    """`ExpertLayout` of cuda/blocks.h, 120 bytes."""

    _fields_ = (("gate", MatrixLayout), ("up", MatrixLayout), ("down", MatrixLayout))


def num_units(rows: int) -> int:
    """Blocks of a grid that `rows` rows of a product take."""
    return -(-rows // UNIT_ROWS)


def token_tile(num_tokens: int) -> int:
    """The kernel for so many tokens: the smallest that takes them at once, else the largest."""
    return next((tile for tile in reversed(TOKEN_TILES) if tile >= num_tokens), TOKEN_TILES[0])
