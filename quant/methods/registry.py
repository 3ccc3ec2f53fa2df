"""Every method by the name it has on the command line and in localr1.json."""

from localr1.errors import UsageError
from localr1.quant.methods.base import Method
from localr1.quant.methods.rtn import RoundToNearest

METHODS: dict[str, Method] = {"rtn": RoundToNearest()}


def method_named(name: str) -> Method:
    """Raises UsageError for a name that is not in METHODS."""
    if name not in METHODS:
        raise UsageError("quantization method", expected=" or ".join(METHODS), found=repr(name))
    return METHODS[name]
