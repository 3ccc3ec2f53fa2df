"""Round to nearest where the square of a column's error counts as its inputs are large.

The squared error in the output W x of rounding W is, its diagonal part alone, the sum of
E[x_j^2] (W - Q)_ij^2: the first term of GPTQ's quadratic form (Frantar et al. 2022, "GPTQ",
section 3.1), and what llama.cpp's importance matrix holds.
"""

import torch
from torch import Tensor

from localr1.kernels.block_scaled import BlockScaledRows
from localr1.kernels.quantize import PackedRows
from localr1.qtypes import QuantScheme
from localr1.quant.methods.base import Inputs, QuantizedTensor
from localr1.quant.methods.rtn import RoundToNearest
from localr1.quant.methods.zero_points import RoundWithZeroPoints


class ImportanceMatrix:
    """`CalibratedMethod` and `CalibratedRowMethod`: the search of `rtn`, weighted."""

    name = "imatrix"
    needs_hessian = False

    def quantize_for(
        self,
        inputs: Inputs,
        weight: Tensor,
        scheme: QuantScheme,
        scale_dtype: torch.dtype,
        name: str,
    ) -> QuantizedTensor:
        return rounding(scheme).quantize(weight, scheme, scale_dtype, name, inputs.importance)

    def quantize_rows_for(
        self,
        inputs: Inputs,
        rows: Tensor | BlockScaledRows,
        scheme: QuantScheme,
        scale_dtype: torch.dtype,
        name: str,
    ) -> PackedRows:
        return RoundToNearest().quantize_rows(rows, scheme, scale_dtype, name, inputs.importance)


def rounding(scheme: QuantScheme) -> RoundToNearest | RoundWithZeroPoints:
    """The search for schemes of this kind that can be weighted."""
    return RoundToNearest() if scheme.symmetric else RoundWithZeroPoints()
