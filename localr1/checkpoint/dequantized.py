"""What checkpoints have in common whose matrices are stored as codes and read as the numbers these
stand for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from localr1.checkpoint.api import Checkpoint, TensorInfo, TokenizerFiles
from localr1.checkpoint.index import ShardSet
from localr1.checkpoint.paths import quoted
from localr1.checkpoint.stored import StoredCheckpoint
from localr1.checkpoint.strict_json import expect
from localr1.errors import NumericsError, UnsupportedError

QUANTIZATION = "quantization_config"

FP8_TYPE, NF4_TYPE, FP4_TYPE, INT8_TYPE = "F8_E4M3_BLOCK", "NF4_BLOCK", "FP4_BLOCK", "I8_ROW"
DEQUANTIZED_TYPES = frozenset({FP8_TYPE, NF4_TYPE, FP4_TYPE, INT8_TYPE})
"""What `tensors` calls a matrix of codes with its scales, so that nobody takes codes for values.
`read` returns such a matrix as float32."""


class DequantizedCheckpoint:
    """The part of a StoredCheckpoint (stored.py) over another, `inner`, that passes on what is the
    same.

    A kind of quantization fills `_tensors` and adds `read` and `stored_names`. `config` has no
    quantization_config any more: whoever reads through this sees plain floats.
    """

    def __init__(self, inner: StoredCheckpoint) -> None:
        self._inner = inner
        self._config = {key: value for key, value in inner.config.items() if key != QUANTIZATION}
        self._tensors: dict[str, TensorInfo] = {}

    @property
    def path(self) -> Path:
        return self._inner.path

    @property
    def format(self) -> str:
        return self._inner.format

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @property
    def generation_config(self) -> Mapping[str, Any]:
        return self._inner.generation_config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def shards(self) -> ShardSet | None:
        return self._inner.shards

    def tokenizer_files(self) -> TokenizerFiles:
        return self._inner.tokenizer_files()

    def close(self) -> None:
        self._inner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def method_of(config: Mapping[str, Any]) -> str:
    """`quant_method` of config.json's quantization_config, "" without one."""
    quantization = config.get(QUANTIZATION)
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    return method if isinstance(method, str) else ""


def read_quantization(inner: Checkpoint, known: frozenset[str], kind: str) -> dict[str, Any]:
    """quantization_config, whose fields must be among `known` or switched off."""
    shown = f"{inner.path}/config.json: {QUANTIZATION}"
    fields: dict[str, Any] = expect(inner.config.get(QUANTIZATION), dict, shown)
    for name, value in fields.items():
        if name not in known and value not in (None, False, [], {}):
            raise UnsupportedError(
                f"{shown}: unknown field {quoted(name)}",
                expected=f"a field that {kind} is known to have",
                found=quoted(value),
            )
    return fields


def check_scales(scales: Tensor, name: str) -> None:
    """Raise NumericsError unless all are finite and none is negative."""
    if not (scales.isfinite() & (scales >= 0)).all():
        raise NumericsError(
            f"tensor {quoted(name)}",
            expected="finite scales, none negative",
            found="others",
            fix="The checkpoint is damaged; download it again.",
        )


def check_values(weight: Tensor, name: str) -> None:
    """Raise NumericsError unless all are finite."""
    if not weight.isfinite().all():
        raise NumericsError(
            f"tensor {quoted(name)}",
            expected="finite numbers",
            found="NaN or infinity",
            fix="The checkpoint is damaged; download it again.",
        )
