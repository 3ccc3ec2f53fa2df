"""Packed matrices of a checkpoint in compressed-tensors' format `pack-quantized`.

Of module X: X.weight_packed int32 [out, ceil(in*bits/32)], X.weight_scale [out, in/group],
X.weight_shape int64 [2], and, when asymmetric, X.weight_zero_point int32 [ceil(out*bits/32),
in/group], packed along out. Strategy "channel" has one scale and one zero point a row, [out, 1].
A stored code is the signed value + 2**(bits-1), little end first and without gaps: code i of a row
begins at bit i*bits, and one of 5 or 6 bits may lie in two words. What a module's codes mean is
said by `quantization_config` in config.json (quantization_config.py). NF4 matrices of bitsandbytes
come in the same parts (nf4.py).

Kernels of a GPU compute with 4 and with 8 bits. For these, codes of 5 and 6 become the same values
in 8 when they are read, which changes no result: sums are exact in them (docs/arithmetic.md).
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from localr1.checkpoint.api import Checkpoint, TensorInfo
from localr1.checkpoint.nf4 import Nf4Checkpoint
from localr1.checkpoint.quantization_config import (
    START_FROM_FLOATS,
    ChannelScheme,
    QuantizationConfig,
    parse_quantization_config,
)
from localr1.errors import NumericsError, TensorError, UnsupportedError
from localr1.kernels.api import PackedWeight
from localr1.kernels.codes import unpack_codes, widened
from localr1.qtypes import SUPPORTED_BITS, SUPPORTED_GROUPS, QuantScheme

SCALE_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class PackedLayout:
    """How a packed matrix is stored. scheme: on disk, with groups also where a row has one scale.
    by_row: whether it has. zero_point: None when symmetric."""

    prefix: str
    scheme: QuantScheme
    by_row: bool
    out_features: int
    in_features: int
    packed: TensorInfo
    scale: TensorInfo
    zero_point: TensorInfo | None


class PackedReader:
    """The packed matrices of one checkpoint, whose quantization_config is parsed once: there may be
    tens of thousands of them. numbers_of_bits: that whoever computes with them knows.

    Raises FormatError, ConfigError and UnsupportedError for a quantization_config that is malformed
    or not honoured.
    """

    def __init__(
        self, checkpoint: Checkpoint, numbers_of_bits: Collection[int] = SUPPORTED_BITS
    ) -> None:
        self._checkpoint = checkpoint
        self._numbers_of_bits = numbers_of_bits
        document = checkpoint.config.get("quantization_config")
        self._config: QuantizationConfig | Nf4Checkpoint | None = None
        if isinstance(checkpoint, Nf4Checkpoint):
            self._config = checkpoint
        elif document is not None:
            self._config = parse_quantization_config(document)

    def scheme(self, prefix: str) -> QuantScheme | ChannelScheme | None:
        """What quantization_config says of module `prefix`, whether it is packed or not; of
        bitsandbytes' the scheme of what is."""
        return None if self._config is None else self._config.scheme_for(prefix)

    def read(self, prefix: str) -> PackedWeight | None:
        """The packed matrix of module `prefix` ("model.layers.0.mlp.up_proj"); None when its weight
        is stored unpacked, or not at all. Its scheme is the layout's, held in bits that are known.

        Raises TensorError for parts missing or of wrong shape or dtype, NumericsError for scales
        that are not finite, UnsupportedError for parts that are not honoured.
        """
        layout = self.layout(prefix)
        return None if layout is None else _read(self._checkpoint, layout, self._numbers_of_bits)

    def layout(self, prefix: str) -> PackedLayout | None:
        """As `read`, but of the tensors only weight_shape is read, 16 bytes: every part is there,
        of the right dtype and shape. Whether the scales are finite is for `read` to say."""
        names = self._checkpoint.tensors
        packed_name = f"{prefix}.weight_packed"
        if packed_name not in names:
            for part in ("weight_scale", "weight_shape", "weight_zero_point"):
                if f"{prefix}.{part}" in names:
                    raise TensorError(f"tensor {packed_name} is missing, {part} is there")
            return None
        for part, meaning in (("weight", "a second form"), ("weight_g_idx", "reordered columns")):
            if f"{prefix}.{part}" in names:
                raise UnsupportedError(
                    f"tensor {prefix}.{part} beside weight_packed",
                    expected="none",
                    found=f"{meaning} of the matrix",
                    fix=START_FROM_FLOATS,
                )
        scheme = self.scheme(prefix)
        if scheme is None:
            raise TensorError(
                f"tensor {packed_name}",
                expected="a group in quantization_config that targets it",
                found="none" if self._config else "no quantization_config in config.json",
            )
        return _layout(self._checkpoint, prefix, scheme)


def _layout(
    checkpoint: Checkpoint, prefix: str, stored: QuantScheme | ChannelScheme
) -> PackedLayout:
    rows, columns = _shape(checkpoint, f"{prefix}.weight_shape")
    by_row = isinstance(stored, ChannelScheme)
    scheme = stored.in_groups(columns) if isinstance(stored, ChannelScheme) else stored
    if scheme is None or columns % scheme.group_size:
        group = min(SUPPORTED_GROUPS) if scheme is None else scheme.group_size
        raise TensorError(
            f"tensor {prefix}.weight_shape",
            expected=f"columns that divide by the group of {group}",
            found=f"{columns:,}",
        )
    groups = 1 if by_row else columns // scheme.group_size
    words = scheme.packed_words(columns)
    packed = _part(checkpoint, f"{prefix}.weight_packed", ("I32",), (rows, words))
    scale = _part(checkpoint, f"{prefix}.weight_scale", SCALE_DTYPES, (rows, groups))
    zero_name = f"{prefix}.weight_zero_point"
    zero_point = None
    if not scheme.symmetric:
        zero_words = -(-rows * scheme.bits // 32)
        zero_point = _part(checkpoint, zero_name, ("I32",), (zero_words, groups))
    elif zero_name in checkpoint.tensors:
        raise TensorError(f"tensor {zero_name}", expected="none, as the scheme is symmetric")
    return PackedLayout(prefix, scheme, by_row, rows, columns, packed, scale, zero_point)


def _read(
    checkpoint: Checkpoint, layout: PackedLayout, numbers_of_bits: Collection[int]
) -> PackedWeight:
    scheme, rows, columns = layout.scheme, layout.out_features, layout.in_features
    held = scheme.held_in(numbers_of_bits)
    packed = widened(checkpoint.read(layout.packed.name), scheme, held)
    scale = checkpoint.read(layout.scale.name)
    if not bool(torch.isfinite(scale).all()):
        raise NumericsError(
            f"tensor {layout.scale.name}",
            expected="finite scales",
            found="NaN or Inf",
            fix="The file is damaged; download or quantize the model again.",
        )
    zero_point = None
    if layout.zero_point is not None:
        words = checkpoint.read(layout.zero_point.name)
        zero_point = unpack_codes(words.T, scheme.bits, rows).T.contiguous()
    if layout.by_row:
        repeats = columns // scheme.group_size
        scale = scale.repeat(1, repeats)
        zero_point = None if zero_point is None else zero_point.repeat(1, repeats)
    return PackedWeight(packed, scale, zero_point, held, rows, columns)


def _part(
    checkpoint: Checkpoint, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]
) -> TensorInfo:
    info = checkpoint.tensors.get(name)
    if info is None:
        raise TensorError(f"tensor {name} is missing", expected=f"{dtypes[0]} {list(shape)}")
    if info.dtype not in dtypes or info.shape != shape:
        raise TensorError(
            f"tensor {name}",
            expected=f"{' or '.join(dtypes)} {list(shape)}",
            found=f"{info.dtype} {list(info.shape)}",
        )
    return info


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    info = _part(checkpoint, name, ("I64", "I32"), (2,))
    rows, columns = (int(size) for size in checkpoint.read(info.name).tolist())
    if not (0 < rows < 1 << 31 and 0 < columns < 1 << 31):
        raise TensorError(
            f"tensor {name}", expected="two sizes above 0", found=f"{rows}, {columns}"
        )
    return rows, columns
