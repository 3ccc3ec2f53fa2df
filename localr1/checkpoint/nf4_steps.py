"""NF4 matrices of bitsandbytes as integers, so that they run under the arithmetic contract.

The 16 numbers that NF4's codes mean are no multiples of one another. In steps of 1/124.114 each is
within 0.0037 of a whole number of steps (NF4_STEPS), so a matrix is one of 8-bit integers whose
scale is that of its block over 124.114, and the kernels compute with it as with any other. Of all
numbers of steps up to 127 this one leaves the least error: relative to Gaussian weights a squared
one of 2.3e-5 beside the 8.5e-3 of NF4 itself (127 steps: 3.7e-5), which makes it 8.47e-3 in place
of 8.46e-3.

In memory a weight takes 8 bits, and its scale 32 for each block.
"""

from typing import Any

import torch
from torch import Tensor

from localr1.checkpoint.api import Checkpoint, TensorInfo
from localr1.checkpoint.bnb import BnbCheckpoint
from localr1.checkpoint.dequantized import QUANTIZATION, DequantizedCheckpoint
from localr1.checkpoint.stored import StoredCheckpoint
from localr1.qtypes import SUPPORTED_GROUPS, QuantScheme

NF4_STEPS = (-124, -86, -65, -49, -35, -23, -11, 0, 10, 20, 31, 42, 55, 70, 90, 124)
STEPS_OF_ONE = 124.11384722404028
"""The least-squares number of steps that 1 is, over the codes of Gaussian weights."""

_PACKED, _SCALE, _SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"


class SteppedCheckpoint(DequantizedCheckpoint):
    """The Checkpoint over one of bitsandbytes that presents each NF4 matrix whose blocks are
    of its rows as a packed one (packed.py), 8 bits in groups of the block's size. Others are as
    there. Closes with it."""

    def __init__(self, inner: BnbCheckpoint) -> None:
        super().__init__(inner)
        self._bnb = inner
        groups: dict[int, list[str]] = {}
        for name, info in inner.tensors.items():
            block = inner.nf4_block(name)
            fits = block in SUPPORTED_GROUPS and info.shape[-1] % block == 0
            if block is None or not fits or not name.endswith(".weight"):
                self._tensors[name] = info
                continue
            module = name.removesuffix(".weight")
            rows, columns = info.shape
            groups.setdefault(block, []).append(module)
            for suffix, dtype, shape, nbytes in (
                (_PACKED, "I32", (rows, columns // 4), rows * columns),
                (_SCALE, "F32", (rows, columns // block), 4 * rows * columns // block),
                (_SHAPE, "I64", (2,), 16),
            ):
                self._tensors[module + suffix] = TensorInfo(module + suffix, dtype, shape, nbytes)
        if groups:
            self._config[QUANTIZATION] = _quantization_config(groups)

    def read(self, name: str) -> Tensor:
        module, suffix = _split(name)
        if not suffix or name not in self._tensors:
            return self._bnb.read(name)
        shape = self._bnb.tensors[f"{module}.weight"].shape
        if suffix == _SHAPE:
            return torch.tensor(shape, dtype=torch.int64)
        codes, scales = self._bnb.nf4_parts(f"{module}.weight")
        if suffix == _SCALE:
            return (scales / STEPS_OF_ONE).view(shape[0], -1)
        table = torch.tensor(NF4_STEPS) - QuantScheme(8, SUPPORTED_GROUPS[0]).code_min
        return table.to(torch.uint8)[codes.long()].view(torch.int32)

    def stored_names(self, name: str) -> tuple[str, ...]:
        module, suffix = _split(name)
        return self._bnb.stored_names(f"{module}.weight" if suffix else name)


def runnable(checkpoint: StoredCheckpoint) -> Checkpoint:
    """The checkpoint as it is run: NF4 matrices of bitsandbytes as integers, all else as it is."""
    return SteppedCheckpoint(checkpoint) if isinstance(checkpoint, BnbCheckpoint) else checkpoint


def _split(name: str) -> tuple[str, str]:
    """Module and suffix of a part of a packed matrix; "" for the suffix of what is none."""
    for suffix in (_PACKED, _SCALE, _SHAPE):
        if name.endswith(suffix):
            return name.removesuffix(suffix), suffix
    return name, ""


def _quantization_config(groups: dict[int, list[str]]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            f"group_{block}": {
                "targets": modules,
                "weights": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": block,
                },
            }
            for block, modules in groups.items()
        },
    }
