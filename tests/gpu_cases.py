"""What the tests of the GPU kernels share: blocked matrices, and a run on each GPU there is."""

import ctypes
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from gpu_model import SEEDS, Changes, Memory, ModelError, ModelGpu, skip_where_there_is_no_model
from torch import Tensor

from localr1.kernels.api import PackedWeight
from localr1.kernels.gpu_launch import Launch
from localr1.kernels.gpu_layout import MatrixLayout
from localr1.kernels.native_weight import SCALE_TYPES
from localr1.qtypes import NF4_STEPS, Codes

ROWS_PER_BLOCK = (16, 8)
"""As AVX-512 and the other instruction sets lay row blocks out."""


class Gpu(Protocol):
    """A model or a card. What `upload` returns stands for memory of it."""

    def upload(self, name: str, value: Tensor) -> Any: ...
    def download(self, buffer: Any, like: Tensor) -> Tensor: ...
    def address(self, buffer: Any) -> int: ...
    def launch(
        self, launch: Launch, *arguments: object, rows: int = 16, changes: Changes = ()
    ) -> None:
        """rows: of a row block. changes: planted errors, on the model only. Raises an error for
        whatever a kernel must not do, so far as this GPU can tell."""
        ...


Gpus = Callable[[], Iterator[Gpu]]


def models() -> Iterator[ModelGpu]:
    """The model in several orders of warps and lanes, buffers against either forbidden page."""
    skip_where_there_is_no_model()
    for seed in SEEDS:
        yield ModelGpu(Memory(at_end=seed % 2 == 0), seed)


def what_showed(run: Callable[[ModelGpu], Tensor], expected: Tensor) -> list[str]:
    """A planted error, in each of the model's orders that did: the model's own message, or a wrong
    result."""
    shown = []
    for gpu in models():
        try:
            found = run(gpu)
        except ModelError as error:
            shown.append(str(error))
        else:
            if not torch.equal(found, expected):
                shown.append("wrong result")
    return shown


def i32(value: int) -> ctypes.c_int32:
    return ctypes.c_int32(value)


def i64(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def f32(value: float) -> ctypes.c_float:
    return ctypes.c_float(value)


def layout_of(packed: PackedWeight, rows: int) -> MatrixLayout:
    return MatrixLayout.of(
        packed.out_features,
        packed.in_features,
        rows,
        packed.scheme,
        SCALE_TYPES[packed.scale.dtype],
    )


def blocked(packed: PackedWeight, rows: int) -> Tensor:
    """The bytes of a matrix in row blocks of `rows` rows, as cuda/blocks.h defines them."""
    bits, columns = packed.scheme.bits, packed.in_features
    blocks = -(-packed.out_features // rows)
    padding = (0, 0, 0, blocks * rows - packed.out_features)
    stored = packed.packed.contiguous().view(torch.uint8)
    codes = torch.stack((stored & 15, stored >> 4), dim=-1).flatten(1) if bits == 4 else stored
    zero = NF4_STEPS.index(0) if packed.scheme.codes is Codes.NF4 else 1 << (bits - 1)
    codes = torch.nn.functional.pad(codes, padding, value=zero)
    # [block, row, group, chunk, 4 columns] -> [block, group, chunk, row, 4 columns]
    chunks = codes.view(blocks, rows, columns // 32, 8, 4).permute(0, 2, 3, 1, 4)
    if bits == 4:
        chunks = chunks[:, :, 0::2] | (chunks[:, :, 1::2] << 4)
    parts = [chunks.reshape(blocks, -1)]
    for values in (packed.scale, packed.zero_point):
        if values is not None:
            padded = torch.nn.functional.pad(values, padding).view(blocks, rows, -1)
            parts.append(padded.transpose(1, 2).reshape(blocks, -1).view(torch.uint8))
    row_blocks = torch.cat(parts, dim=1)
    return torch.nn.functional.pad(row_blocks, (0, -row_blocks.shape[1] % 64)).flatten()


def group_sums(q: Tensor) -> Tensor:
    """int32 [T, K/32]: the sums of quantized activations, which zero points need."""
    return q.view(q.shape[0], -1, 32).sum(dim=2, dtype=torch.int32)
