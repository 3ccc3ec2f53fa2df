"""Every method by the name it has on the command line and in localr1.json."""

from localr1.errors import UsageError
from localr1.quant.methods.base import Method
from localr1.quant.methods.rtn import RoundToNearest
from localr1.quant.methods.zero_points import RoundWithZeroPoints

METHODS: dict[str, Method] = {"rtn": RoundToNearest()}
WITH_ZERO_POINTS: dict[str, Method] = {"rtn": RoundWithZeroPoints()}
"""Those for asymmetric schemes."""


def method_named(name: str, *, symmetric: bool = True) -> Method:
    """Raises UsageError for a name that there is no method of for such schemes."""
    methods = METHODS if symmetric else WITH_ZERO_POINTS
    if name not in methods:
        kind = "quantization method" if symmetric else "quantization method with zero points"
        raise UsageError(kind, expected=" or ".join(methods), found=repr(name))
    return methods[name]
