"""Every method by the name it has on the command line and in localr1.json."""

from localr1.errors import UsageError
from localr1.quant.methods.base import CalibratedMethod, Method
from localr1.quant.methods.gptq import Gptq
from localr1.quant.methods.imatrix import ImportanceMatrix
from localr1.quant.methods.rtn import RoundToNearest

METHODS: dict[str, Method | CalibratedMethod] = {
    method.name: method for method in (RoundToNearest(), ImportanceMatrix(), Gptq())
}


def method_named(name: str) -> Method | CalibratedMethod:
    """Raises UsageError for a name that is not in METHODS."""
    if name not in METHODS:
        raise UsageError("quantization method", expected=" or ".join(METHODS), found=repr(name))
    return METHODS[name]
