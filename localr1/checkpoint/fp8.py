"""FP8 checkpoints as DeepSeek-V3, R1 and Kimi-K2 are released (DeepSeek-AI 2024, "DeepSeek-V3",
section 3.3), read as the numbers they stand for.

A quantized matrix is `X.weight` (E4M3) with `X.weight_scale_inv`, one scale per block of 128 x 128;
blocks at the lower and right edge are partial. weight = code * scale of its block.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from localr1.checkpoint.api import Checkpoint, TensorInfo
from localr1.checkpoint.dequantized import (
    FP8_TYPE,
    QUANTIZATION,
    DequantizedCheckpoint,
    check_scales,
    check_values,
    read_quantization,
)
from localr1.checkpoint.paths import quoted
from localr1.checkpoint.rows import Rows
from localr1.checkpoint.stored import StoredCheckpoint
from localr1.checkpoint.strict_json import optional
from localr1.errors import TensorError, UnsupportedError
from localr1.kernels.block_scaled import BlockScaledRows

METHOD = "fp8"
"""`quant_method` in config.json."""
SCALE_SUFFIX = "_scale_inv"
CODE_TYPE = "F8_E4M3"
SCALE_TYPES = ("F32", "BF16")
MAX_BLOCK = 1 << 20
HARMLESS = frozenset({"quant_method", "fmt", "activation_scheme", "weight_block_size", "scale_fmt",
                      "modules_to_not_convert", "ignored_layers"})  # fmt: skip
"""Fields that are read below, that name matrices without scales (which the tensors themselves say),
or, `scale_fmt`, that speak of how scales were rounded before they were stored."""


class Fp8Checkpoint(DequantizedCheckpoint):
    """A Checkpoint (api.py) over one with FP8 matrices: `read` dequantizes one to float32, exactly;
    scales are not listed, and `config` has no quantization_config any more. Nothing is read before
    it is asked for.

    Raises UnsupportedError for another kind of FP8 and TensorError for codes without scales, scales
    without codes, and scales of the wrong shape or type.
    """

    def __init__(self, inner: StoredCheckpoint) -> None:
        super().__init__(inner)
        self._block = _block_size(inner)
        self._tensors = {
            name: self._info(info)
            for name, info in inner.tensors.items()
            if not name.endswith(SCALE_SUFFIX)
        }
        for name in inner.tensors:
            weight = name.removesuffix(SCALE_SUFFIX)
            if weight != name and getattr(self._tensors.get(weight), "dtype", "") != FP8_TYPE:
                raise TensorError(
                    f"tensor {quoted(name)}",
                    expected=f"{quoted(weight)} of type {CODE_TYPE} beside it",
                    found="another type" if weight in self._tensors else "no such tensor",
                )

    def read(self, name: str) -> Tensor:
        """As `Checkpoint.read`; also raises NumericsError for scales that are negative or not
        finite, and for codes that are not numbers."""
        info = self._tensors.get(name)
        if info is None or info.dtype != FP8_TYPE:
            if info is None and name.endswith(SCALE_SUFFIX):
                raise TensorError(f"{self.path}: there is no tensor {quoted(name)}")
            return self._inner.read(name)
        codes = self._inner.read(name)
        weight = dequantize(BlockScaledRows(codes, self._scales(name), self._block))
        check_values(weight, name)
        return weight

    def pieces(self, name: str, max_nbytes: int) -> Iterator[Rows]:
        info = self._tensors.get(name)
        if info is None or info.dtype != FP8_TYPE:
            if info is None:
                raise TensorError(f"{self.path}: there is no tensor {quoted(name)}")
            yield from self._inner.pieces(name, max_nbytes)
            return
        scales = self._scales(name)
        first = 0
        for codes in self._inner.pieces(name, max_nbytes):
            assert isinstance(codes, Tensor)
            yield BlockScaledRows(codes, scales, self._block, first)
            first += len(codes)

    def _scales(self, name: str) -> Tensor:
        scales = self._inner.read(name + SCALE_SUFFIX).float()
        check_scales(scales, name + SCALE_SUFFIX)
        return scales

    def stored_names(self, name: str) -> tuple[str, ...]:
        info = self._tensors.get(name)
        is_code = info is not None and info.dtype == FP8_TYPE
        return (name, name + SCALE_SUFFIX) if is_code else (name,)

    def _info(self, info: TensorInfo) -> TensorInfo:
        """A matrix of codes with its scales as one tensor; any other as it is."""
        if info.dtype != CODE_TYPE:
            return info
        scales = self._inner.tensors.get(info.name + SCALE_SUFFIX)
        if scales is None or len(info.shape) != 2:
            raise TensorError(
                f"tensor {quoted(info.name)}",
                expected=f"a matrix with {quoted(info.name + SCALE_SUFFIX)} beside it",
                found=f"shape {list(info.shape)}" if scales else "no scales",
                fix="The checkpoint is incomplete, or its FP8 is of another kind.",
            )
        pairs = zip(info.shape, self._block, strict=True)
        blocks = tuple(-(-size // block) for size, block in pairs)
        if scales.shape != blocks or scales.dtype not in SCALE_TYPES:
            raise TensorError(
                f"tensor {quoted(scales.name)}",
                expected=f"{' or '.join(SCALE_TYPES)} {list(blocks)}, one scale per block of "
                f"{self._block[0]} x {self._block[1]} of {list(info.shape)}",
                found=f"{scales.dtype} {list(scales.shape)}",
                fix="config.json and the weights do not belong together.",
            )
        return TensorInfo(info.name, FP8_TYPE, info.shape, info.nbytes + scales.nbytes)


def dequantize(rows: BlockScaledRows) -> Tensor:
    """float32 [rows, in]. One product a value, and no copy but the result."""
    block_rows, block_columns = rows.block
    weight = rows.codes.to(torch.float32)
    count, columns = weight.shape
    first = rows.first_row // block_rows
    last = -(-(rows.first_row + count) // block_rows)
    for index in range(first, last):
        begin, end = (max(0, n * block_rows - rows.first_row) for n in (index, index + 1))
        weight[begin:end] *= rows.scales[index].repeat_interleave(block_columns)[:columns]
    return weight


def _block_size(inner: Checkpoint) -> tuple[int, int]:
    shown = f"{inner.path}/config.json: {QUANTIZATION}"
    quantization = read_quantization(inner, HARMLESS, "block-wise FP8")
    for name, honoured in (("fmt", "e4m3"), ("activation_scheme", "dynamic")):
        if quantization.get(name) not in (None, honoured):
            raise UnsupportedError(
                f"{shown}: {name}", expected=honoured, found=quoted(quantization[name])
            )
    sizes = optional(quantization, "weight_block_size", list, shown)
    if sizes is None:
        raise UnsupportedError(
            f"{shown}: weight_block_size",
            expected="two sizes, as [128, 128]",
            found="none: one scale for a whole matrix or row",
            fix="Start from the BF16 release of the model.",
        )
    if len(sizes) != 2 or any(type(s) is not int or not 1 <= s <= MAX_BLOCK for s in sizes):
        raise UnsupportedError(
            f"{shown}: weight_block_size", expected="two sizes, as [128, 128]", found=quoted(sizes)
        )
    return sizes[0], sizes[1]
