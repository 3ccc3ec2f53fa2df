"""The seam between a recipe and the way codes and scales are chosen."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

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
