"""Packed matrices of a checkpoint in compressed-tensors' format `pack-quantized`.

Of module X: X.weight_packed int32 [out, ceil(in*bits/32)], X.weight_scale [out, in/group],
X.weight_shape int64 [2], and, when asymmetric, X.weight_zero_point int32 [ceil(out*bits/32),
in/group], packed along out. A stored code is the signed value + 2**(bits-1), little end first. What
a module's codes mean is said by `quantization_config` in config.json; whatever changes the
mathematics there and is not honoured here is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from localr1.checkpoint.api import Checkpoint
from localr1.checkpoint.name_patterns import matches
from localr1.checkpoint.paths import quoted
from localr1.checkpoint.strict_json import expect, optional, required
from localr1.errors import ConfigError, NumericsError, TensorError, UnsupportedError
from localr1.kernels.api import PackedWeight
from localr1.qtypes import QuantScheme

FORMAT = "pack-quantized"
MAX_PATTERNS = 200
SCALE_DTYPES = ("BF16", "F16", "F32")
_WHERE = "config.json: quantization_config"
_PATTERN_MARK = "re:"

_WEIGHT_KEYS = frozenset({"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"})
_HARMLESS_WEIGHT_KEYS = frozenset(
    # How the values were found or are stored, not what they mean.
    {"observer", "observer_kwargs", "scale_dtype", "zp_dtype", "block_structure"}
)
_ORDERS_KEPT = (None, "weight", "static")
"""Activation orders that leave the columns where they are."""
_GROUP_KEYS = frozenset({"targets", "weights", "input_activations", "output_activations", "format"})
_MUST_BE_EMPTY = ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config")


@dataclass(frozen=True)
class _Names:
    """Modules by whole name (or name of a class) and by pattern."""

    whole: frozenset[str]
    patterns: tuple[str, ...]

    def match_pattern(self, prefix: str) -> bool:
        return any(matches(pattern, prefix) for pattern in self.patterns)


@dataclass(frozen=True)
class _Group:
    targets: _Names
    scheme: QuantScheme


@dataclass(frozen=True)
class QuantizationConfig:
    """The part of a `quantization_config` that says what codes mean."""

    groups: tuple[_Group, ...]
    ignored: _Names

    def scheme_for(self, prefix: str) -> QuantScheme | None:
        """The scheme of module `prefix`, None when it is ignored or no target names it.

        As in compressed-tensors a target that is the whole name goes before a pattern, a pattern
        before the name of a class; among equals the first in the file.
        """
        module_class = "Embedding" if prefix.endswith("embed_tokens") else "Linear"
        if {prefix, module_class} & self.ignored.whole or self.ignored.match_pattern(prefix):
            return None
        for group in self.groups:
            if prefix in group.targets.whole:
                return group.scheme
        for group in self.groups:
            if group.targets.match_pattern(prefix):
                return group.scheme
        for group in self.groups:
            if module_class in group.targets.whole:
                return group.scheme
        return None


class PackedReader:
    """The packed matrices of one checkpoint, whose quantization_config is parsed once: there may be
    tens of thousands of them.

    Raises FormatError, ConfigError and UnsupportedError for a quantization_config that is malformed
    or not honoured.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        document = checkpoint.config.get("quantization_config")
        self._config = None if document is None else parse_quantization_config(document)

    def read(self, prefix: str) -> PackedWeight | None:
        """The packed matrix of module `prefix` ("model.layers.0.mlp.up_proj"); None when its weight
        is stored unpacked, or not at all.

        Raises TensorError for parts missing or of wrong shape or dtype, NumericsError for scales
        that are not finite, UnsupportedError for parts that are not honoured.
        """
        names = self._checkpoint.tensors
        packed_name = f"{prefix}.weight_packed"
        if packed_name not in names:
            for part in ("weight_scale", "weight_shape", "weight_zero_point"):
                if f"{prefix}.{part}" in names:
                    raise TensorError(f"tensor {packed_name} is missing, {part} is there")
            return None
        for part in ("weight", "weight_g_idx"):
            if f"{prefix}.{part}" in names:
                raise UnsupportedError(f"tensor {prefix}.{part} beside weight_packed")
        scheme = None if self._config is None else self._config.scheme_for(prefix)
        if scheme is None:
            raise TensorError(
                f"tensor {packed_name}",
                expected="a group in quantization_config that targets it",
                found="none" if self._config else "no quantization_config in config.json",
            )
        return _read(self._checkpoint, prefix, scheme)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """int32 [rows, words] -> int8 [rows, count]: signed values, the first `count` of each row.

    bits: 4 or 8. On a little-endian machine the bytes of a word are in the order of their codes,
    and of two 4-bit codes in a byte the first is the low one.
    """
    # Flat first: a row of one word may carry strides that forbid the view.
    stored = packed.reshape(-1).view(torch.uint8).view(packed.shape[0], -1)
    if bits == 4:
        stored = torch.stack((stored & 15, stored >> 4), dim=-1).flatten(1)
    # Subtracting 2**(bits-1) modulo 256 gives the signed value's byte.
    return (stored[:, :count] - (1 << (bits - 1))).contiguous().view(torch.int8)


def _read(checkpoint: Checkpoint, prefix: str, scheme: QuantScheme) -> PackedWeight:
    rows, columns = _shape(checkpoint, f"{prefix}.weight_shape")
    if columns % scheme.group_size:
        raise TensorError(
            f"tensor {prefix}.weight_shape",
            expected=f"columns that divide by the group of {scheme.group_size}",
            found=f"{columns:,}",
        )
    groups = columns // scheme.group_size
    packed = _part(
        checkpoint, f"{prefix}.weight_packed", ("I32",), (rows, scheme.packed_words(columns))
    )
    scale_name = f"{prefix}.weight_scale"
    scale = _part(checkpoint, scale_name, SCALE_DTYPES, (rows, groups))
    if not bool(torch.isfinite(scale).all()):
        raise NumericsError(
            f"tensor {scale_name}",
            expected="finite scales",
            found="NaN or Inf",
            fix="The file is damaged; download or quantize the model again.",
        )
    zero_name = f"{prefix}.weight_zero_point"
    zero_point = None
    if not scheme.symmetric:
        stored = _part(checkpoint, zero_name, ("I32",), (-(-rows * scheme.bits // 32), groups))
        zero_point = unpack_codes(stored.T, scheme.bits, rows).T.contiguous()
    elif zero_name in checkpoint.tensors:
        raise TensorError(f"tensor {zero_name}", expected="none, as the scheme is symmetric")
    return PackedWeight(packed, scale, zero_point, scheme, rows, columns)


def _part(
    checkpoint: Checkpoint, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]
) -> Tensor:
    info = checkpoint.tensors.get(name)
    if info is None:
        raise TensorError(f"tensor {name} is missing", expected=f"{dtypes[0]} {list(shape)}")
    if info.dtype not in dtypes or info.shape != shape:
        raise TensorError(
            f"tensor {name}",
            expected=f"{' or '.join(dtypes)} {list(shape)}",
            found=f"{info.dtype} {list(info.shape)}",
        )
    return checkpoint.read(name)


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    rows, columns = (int(size) for size in _part(checkpoint, name, ("I64", "I32"), (2,)).tolist())
    if not (0 < rows < 1 << 31 and 0 < columns < 1 << 31):
        raise TensorError(
            f"tensor {name}", expected="two sizes above 0", found=f"{rows}, {columns}"
        )
    return rows, columns


def parse_quantization_config(document: object) -> QuantizationConfig:
    """Validate `quantization_config`. Raises FormatError, ConfigError, UnsupportedError."""
    values = expect(document, dict, _WHERE)
    method = required(values, "quant_method", str, _WHERE)
    if method != "compressed-tensors":
        raise UnsupportedError(
            f"{_WHERE}: quant_method", expected="compressed-tensors", found=quoted(method)
        )
    for key in _MUST_BE_EMPTY:
        if values.get(key):
            raise UnsupportedError(f"{_WHERE}: {key} is not honoured", found=quoted(values[key]))
    status = optional(values, "quantization_status", str, _WHERE)
    if status not in (None, "compressed"):
        raise UnsupportedError(
            f"{_WHERE}: quantization_status", expected="compressed", found=quoted(status)
        )
    groups = required(values, "config_groups", dict, _WHERE)
    if not groups:
        raise ConfigError(f"{_WHERE}: config_groups is empty", expected="at least one group")
    stored = optional(values, "format", str, _WHERE)
    config = QuantizationConfig(
        groups=tuple(
            _group(group, f"{_WHERE}: {quoted(name)}", stored) for name, group in groups.items()
        ),
        ignored=_names(optional(values, "ignore", list, _WHERE) or [], f"{_WHERE}: ignore"),
    )
    num_patterns = sum(
        len(names.patterns) for names in (config.ignored, *(g.targets for g in config.groups))
    )
    if num_patterns > MAX_PATTERNS:
        raise UnsupportedError(
            f"{_WHERE}: patterns", expected=f"at most {MAX_PATTERNS:,}", found=f"{num_patterns:,}"
        )
    return config


def _group(value: object, where: str, default_format: str | None) -> _Group:
    fields = expect(value, dict, where)
    _only(fields, _GROUP_KEYS, where)
    for key in ("input_activations", "output_activations"):
        if fields.get(key) is not None:
            raise UnsupportedError(f"{where}: {key} is not honoured", found=quoted(fields[key]))
    stored = optional(fields, "format", str, where) or default_format
    if stored != FORMAT:
        raise UnsupportedError(f"{where}: format", expected=FORMAT, found=quoted(stored))
    targets = _names(required(fields, "targets", list, where), f"{where}: targets")
    weights = required(fields, "weights", dict, where)
    return _Group(targets, _scheme(weights, f"{where}: weights"))


def _scheme(weights: Mapping[str, Any], where: str) -> QuantScheme:
    _only(weights, _WEIGHT_KEYS | _HARMLESS_WEIGHT_KEYS | {"actorder"}, where)
    for key, honoured in (("type", "int"), ("strategy", "group"), ("dynamic", False)):
        value = weights.get(key, "int" if key == "type" else False if key == "dynamic" else None)
        if value != honoured:
            raise UnsupportedError(f"{where}: {key}", expected=honoured, found=quoted(value))
    if weights.get("actorder") not in _ORDERS_KEPT:
        raise UnsupportedError(
            f"{where}: actorder",
            expected="none, weight or static",
            found=quoted(weights["actorder"]),
        )
    symmetric = optional(weights, "symmetric", bool, where)
    return QuantScheme(
        required(weights, "num_bits", int, where),
        required(weights, "group_size", int, where),
        symmetric is not False,
    )


def _only(fields: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    for key in fields:
        if key not in known:
            raise UnsupportedError(f"{where}: {quoted(key)} is not honoured")


def _names(values: list[Any], where: str) -> _Names:
    names = [expect(value, str, where) for value in values]
    return _Names(
        frozenset(name for name in names if not name.startswith(_PATTERN_MARK)),
        tuple(name.removeprefix(_PATTERN_MARK) for name in names if name.startswith(_PATTERN_MARK)),
    )
