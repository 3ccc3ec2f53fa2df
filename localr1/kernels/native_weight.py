"""Matrices of the native kernels, and what of a tensor the C++ module is told."""

from dataclasses import dataclass

import torch
from torch import Tensor

from localr1.errors import KernelError
from localr1.kernels.api import PackedWeight, Weight
from localr1.kernels.native_module import _native as _native
from localr1.qtypes import QuantScheme

# The numbers of ScaleType in cuda/blocks.h.
SCALE_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


@dataclass(frozen=True)
class NativeWeight:
    """A matrix in the blocked layout of cuda/blocks.h, in memory of its own."""

    matrix: _native.Matrix
    out_features: int
    in_features: int
    scheme: QuantScheme

    @property
    def nbytes(self) -> int:
        return int(self.matrix.nbytes)


def address(value: Tensor | None) -> int:
    return 0 if value is None else value.data_ptr()


def matrix(weight: Weight) -> _native.Matrix:
    """Raises KernelError for a weight of other kernels."""
    if not isinstance(weight, NativeWeight):
        raise KernelError(
            "weight", expected="one prepared by these kernels", found=type(weight).__name__
        )
    return weight.matrix


class Pinned:
    """A packed matrix whose tensors are contiguous and stay where they are while this lives."""

    def __init__(self, weight: PackedWeight) -> None:
        zero = weight.zero_point
        self._packed = weight.packed.contiguous()
        self._scale = weight.scale.contiguous()
        self._zero = None if zero is None else zero.contiguous()

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Of codes, scales and zero points (0 for none)."""
        return self._packed.data_ptr(), self._scale.data_ptr(), address(self._zero)
