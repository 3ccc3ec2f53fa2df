"""Weights to packed codes and scales on the native kernel.

What is computed is quant/methods/rtn.py, which is also the reference: the same bytes on every
instruction set and with any number of threads (tests/test_kernels_quantize.py).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from localr1.errors import KernelError
from localr1.kernels.block_scaled import BlockScaledRows
from localr1.kernels.native_weight import SCALE_TYPES, _native, address
from localr1.qtypes import QuantScheme

# The numbers of WeightType in cuda/cpu/quantize_weights.h.
WEIGHT_TYPES = {
    torch.bfloat16: 0,
    torch.float16: 1,
    torch.float32: 2,
    torch.float8_e4m3fn: 3,
}
MAX_THREADS_KEPT = 2


@dataclass(frozen=True)
class PackedRows:
    """packed: int32 [rows, in*bits/32], scale: bfloat16 or float16 [rows, in/group], as on disk
    (pack-quantized). error, energy: float64 [rows], sums of (weight - read back)^2 and of weight^2.
    """

    packed: Tensor
    scale: Tensor
    error: Tensor
    energy: Tensor


def quantize_rows(
    rows: Tensor | BlockScaledRows,
    scheme: QuantScheme,
    scale_dtype: torch.dtype,
    positions: Tensor,
    weights: Tensor | None = None,
    *,
    threads: int = 1,
    isa: str = "",
) -> PackedRows:
    """rows: bfloat16, float16 or float32 [rows, in], or FP8 with its scales; `in` divides by the
    group. positions: float32 [n], where the candidates put a group's largest weight, in codes.
    weights: float32 [in], what the square of a column's error counts, positive; None: all the same.
    isa: of `native.available_isas`, "" for the best. Releases the GIL.

    A row that is not finite has an energy that is not finite, and any codes. Raises KernelError.
    """
    values = rows.codes if isinstance(rows, BlockScaledRows) else rows
    _check(values, scheme, scale_dtype, positions, weights)
    count, columns = values.shape
    blocks, held = (0, 0, 1, 1, 1), None
    if isinstance(rows, BlockScaledRows):
        held = rows.scales.contiguous()
        expected = -(-(rows.first_row + count) // rows.block[0])
        if held.dtype != torch.float32 or held.dim() != 2 or held.shape[0] < expected:
            raise KernelError(
                "scales of FP8 rows",
                expected=f"float32, at least {expected} rows of blocks",
                found=f"{held.dtype} {list(held.shape)}",
            )
        blocks = (held.data_ptr(), rows.first_row, *rows.block, held.shape[1])
    packed = torch.empty(count, scheme.packed_words(columns), dtype=torch.int32)
    scale = torch.empty(count, columns // scheme.group_size, dtype=scale_dtype)
    error, energy = (torch.empty(count, dtype=torch.float64) for _ in range(2))
    values = values.contiguous()
    try:
        _quantizer(isa, threads).quantize(
            values.data_ptr(),
            WEIGHT_TYPES[values.dtype],
            count,
            columns,
            blocks,
            (scheme.bits, scheme.group_size, SCALE_TYPES[scale_dtype]),
            (positions.data_ptr(), len(positions)),
            address(weights),
            (packed.data_ptr(), scale.data_ptr(), error.data_ptr(), energy.data_ptr()),
        )
    except _native.RefusedError as error_found:
        raise KernelError(f"quantize_rows: {error_found}") from None
    return PackedRows(packed, scale, error, energy)


@lru_cache(maxsize=MAX_THREADS_KEPT)
def _quantizer(isa: str, threads: int) -> _native.Quantizer:
    """Its threads sleep between calls."""
    return _native.Quantizer(isa, threads)


def _check(
    values: Tensor,
    scheme: QuantScheme,
    scale_dtype: torch.dtype,
    positions: Tensor,
    weights: Tensor | None,
) -> None:
    if values.dim() != 2 or values.dtype not in WEIGHT_TYPES or not scheme.symmetric:
        raise KernelError(
            "quantize_rows",
            expected="rows of BF16, F16, F32 or FP8 and a symmetric scheme",
            found=f"{values.dtype} {list(values.shape)}, {scheme.name}",
        )
    if scale_dtype not in (torch.bfloat16, torch.float16):
        raise KernelError("type of scales", expected="bfloat16 or float16", found=f"{scale_dtype}")
    if positions.dtype != torch.float32 or positions.dim() != 1 or not positions.is_contiguous():
        raise KernelError(
            "positions", expected="contiguous float32 [n]", found=f"{positions.dtype}"
        )
    if weights is None:
        return
    columns = values.shape[1]
    if weights.dtype != torch.float32 or weights.shape != (columns,) or not weights.is_contiguous():
        raise KernelError(
            "weights of the columns",
            expected=f"contiguous float32 [{columns}]",
            found=f"{weights.dtype} {list(weights.shape)}",
        )
