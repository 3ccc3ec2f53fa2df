"""The seam between a recipe and the way codes and scales are chosen."""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from localr1.kernels.block_scaled import BlockScaledRows
from localr1.kernels.quantize import PackedRows
from localr1.qtypes import QuantScheme

SCALE_DTYPES = (torch.bfloat16, torch.float16)
"""What a scale is stored as: the dtype of the model around it."""


@dataclass(frozen=True)
class QuantizedTensor:
    """One matrix as integers: weight = codes * scale of their group.

    codes: int8 [out, in], in the scheme's signed range. scale: SCALE_DTYPES [out, in/group],
    finite, never zero, either sign. relative_error: sum((w - codes*scale)^2) / sum(w^2), with the
    scale as stored; 0 for a matrix of zeros.
    """

    codes: Tensor
    scale: Tensor
    relative_error: float


class Method(Protocol):
    """A method is stateless: the same weight and scheme give the same bytes."""

    name: str

    def quantize(
        self, weight: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype, name: str
    ) -> QuantizedTensor:
        """weight: float32, bfloat16 or float16 [out, in], in divisible by the group; unchanged.
        scale_dtype: one of SCALE_DTYPES. name: the tensor's, for messages.

        Raises NumericsError when the weight holds NaN or Inf, or when no finite scale can hold it.
        """
        ...


@runtime_checkable
class RowMethod(Protocol):
    """A `Method` that treats every row by itself and writes the packed form at once: a matrix then
    goes through it in pieces of rows, and FP8 as it is stored."""

    def quantize_rows(
        self,
        rows: Tensor | BlockScaledRows,
        scheme: QuantScheme,
        scale_dtype: torch.dtype,
        name: str,
    ) -> PackedRows:
        """rows: as `Method.quantize`, or FP8 codes with their scales; some rows of the matrix or
        all. Raises as `Method.quantize`."""
        ...


def relative_error(error: Tensor, energy: Tensor) -> float:
    """Sums of squares of a matrix's rows, float64: the first's over the second's. Exactly rounded
    sums, the same in whatever pieces the rows came."""
    of_weights = math.fsum(energy.tolist())
    return math.fsum(error.tolist()) / of_weights if of_weights else 0.0
