"""Every method by the name it has on the command line and in localr1.json."""

from localr1.errors import UsageError
from localr1.quant.methods.base import CalibratedMethod, Method
from localr1.quant.methods.gptq import Gptq
from localr1.quant.methods.imatrix import ImportanceMatrix
from localr1.quant.methods.rtn import RoundToNearest
from localr1.quant.methods.zero_points import RoundWithZeroPoints

METHODS: dict[str, Method | CalibratedMethod] = {
    method.name: method for method in (RoundToNearest(), ImportanceMatrix(), Gptq())
}
WITH_ZERO_POINTS: dict[str, Method | CalibratedMethod] = {
    method.name: method for method in (RoundWithZeroPoints(), ImportanceMatrix(), Gptq())
}
"""Those for asymmetric schemes."""


def method_named(name: str, *, symmetric: bool = True) -> Method | CalibratedMethod:
    """Raises UsageError for a name that there is no method of for such schemes."""
    methods = METHODS if symmetric else WITH_ZERO_POINTS
    if name not in methods:
        kind = "quantization method" if symmetric else "quantization method with zero points"
        raise UsageError(kind, expected=" or ".join(methods), found=repr(name))
    return methods[name]
