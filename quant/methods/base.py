"""The seam between a recipe and the way codes and scales are chosen."""

import math
from collections.abc import Callable
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
    """One matrix as integers: weight = (codes - zero_point) * scale of their group.

    codes: int8 [out, in], in the scheme's signed range. scale: SCALE_DTYPES [out, in/group],
    finite, never zero, either sign. relative_error: of the sum of squares of what the weights lose,
    with the scale as stored, to that of the weights; 0 for a matrix of zeros. zero_point: int8
    [out, in/group] in the signed range, None (zeros) for a symmetric scheme.
    """

    codes: Tensor
    scale: Tensor
    relative_error: float
    zero_point: Tensor | None = None


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


@dataclass(frozen=True)
class Inputs:
    """What a text says of the inputs x of one matrix, as it is quantized (scaled, if it is).

    importance: float32 [in], positive, 1 in the mean: in proportion to E[x_j^2]. hessian: gives
    E[x x^T], float64 [in, in], which the caller may overwrite; None where no method asked for it.
    """

    importance: Tensor
    hessian: Callable[[], Tensor] | None = None


@runtime_checkable
class CalibratedMethod(Protocol):
    """A method that chooses by what a text brings to the matrix. Stateless, as a `Method`.

    needs_hessian: whether it asks for more than the importance of columns.
    """

    name: str
    needs_hessian: bool

    def quantize_for(
        self,
        inputs: Inputs,
        weight: Tensor,
        scheme: QuantScheme,
        scale_dtype: torch.dtype,
        name: str,
    ) -> QuantizedTensor:
        """As `Method.quantize`, for such inputs."""
        ...


@runtime_checkable
class CalibratedRowMethod(Protocol):
    """A `CalibratedMethod` whose symmetric schemes are those of a `RowMethod`."""

    def quantize_rows_for(
        self,
        inputs: Inputs,
        rows: Tensor | BlockScaledRows,
        scheme: QuantScheme,
        scale_dtype: torch.dtype,
        name: str,
    ) -> PackedRows:
        """As `RowMethod.quantize_rows`, for such inputs."""
        ...


def relative_error(error: Tensor, energy: Tensor) -> float:
    """Sums of squares of a matrix's rows, float64: the first's over the second's. Exactly rounded
    sums, the same in whatever pieces the rows came."""
    of_weights = math.fsum(energy.tolist())
    return math.fsum(error.tolist()) / of_weights if of_weights else 0.0
