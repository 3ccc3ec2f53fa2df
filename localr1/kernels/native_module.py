"""The C++ module, or one sentence about its absence. Never imports torch."""

from localr1.errors import KernelError

try:
    from localr1.kernels import _native as _native
except ImportError as error:
    raise KernelError(
        "the native module localr1.kernels._native cannot be loaded",
        found=str(error),
        fix="Install the package again with a C++ compiler at hand: pip install .",
    ) from error
