"""NF4 matrices of bitsandbytes with their codes as they are, so that they run under the arithmetic
contract.

The 16 numbers that NF4's codes mean are no multiples of one another. In steps of 1/STEPS_OF_ONE
each is close to a whole number (qtypes.NF4_STEPS), so the kernels look the number of steps up and
compute with it as with any other integer; the scale is that of the block over STEPS_OF_ONE.

In memory a weight takes 4 bits, and its scale 32 for each block.
"""

import torch
from torch import Tensor

from localr1.checkpoint.api import Checkpoint, TensorInfo
from localr1.checkpoint.bnb import BnbCheckpoint
from localr1.checkpoint.dequantized import DequantizedCheckpoint
from localr1.qtypes import STEPS_OF_ONE, SUPPORTED_GROUPS, Codes, QuantScheme

_PACKED, _SCALE, _SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"


class Nf4Checkpoint(DequantizedCheckpoint):
    """The Checkpoint over one of bitsandbytes that presents each NF4 matrix whose blocks are
    of its rows as a packed one (packed.py) in groups of the block's size. Others are as there.
    Closes with it."""

    def __init__(self, inner: BnbCheckpoint) -> None:
        super().__init__(inner)
        self._bnb = inner
        self._schemes: dict[str, QuantScheme] = {}
        for name, info in inner.tensors.items():
            block = inner.nf4_block(name)
            fits = block in SUPPORTED_GROUPS and info.shape[-1] % block == 0
            if block is None or not fits or not name.endswith(".weight"):
                self._tensors[name] = info
                continue
            module = name.removesuffix(".weight")
            rows, columns = info.shape
            scheme = QuantScheme(4, block, codes=Codes.NF4)
            self._schemes[module] = scheme
            words, groups = scheme.packed_words(columns), columns // block
            for suffix, dtype, shape, nbytes in (
                (_PACKED, "I32", (rows, words), 4 * rows * words),
                (_SCALE, "F32", (rows, groups), 4 * rows * groups),
                (_SHAPE, "I64", (2,), 16),
            ):
                self._tensors[module + suffix] = TensorInfo(module + suffix, dtype, shape, nbytes)

    def scheme_for(self, prefix: str) -> QuantScheme | None:
        """Of module `prefix`, None where it is not presented packed."""
        return self._schemes.get(prefix)

    def read(self, name: str) -> Tensor:
        module, suffix = self._split(name)
        if not suffix:
            return self._bnb.read(name)
        rows, columns = shape = self._bnb.tensors[f"{module}.weight"].shape
        if suffix == _SHAPE:
            return torch.tensor(shape, dtype=torch.int64)
        if suffix == _SCALE:
            scales = self._bnb.nf4_scales(f"{module}.weight")
            return (scales / STEPS_OF_ONE).view(rows, -1)
        pairs = self._bnb.nf4_pairs(f"{module}.weight")
        changed_over = pairs << 4
        changed_over |= pairs >> 4
        return changed_over.view(torch.int32).view(rows, columns // 8)

    def stored_names(self, name: str) -> tuple[str, ...]:
        module, suffix = self._split(name)
        return self._bnb.stored_names(f"{module}.weight" if suffix else name)

    def _split(self, name: str) -> tuple[str, str]:
        """Module and suffix of a part of a matrix presented packed; "" for the suffix of what is
        none."""
        for suffix in (_PACKED, _SCALE, _SHAPE):
            if name.endswith(suffix) and name.removesuffix(suffix) in self._schemes:
                return name.removesuffix(suffix), suffix
        return name, ""


def runnable(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as it is run: NF4 matrices of bitsandbytes packed, all else as it is."""
    return Nf4Checkpoint(checkpoint) if isinstance(checkpoint, BnbCheckpoint) else checkpoint
