"""Every fault of a checkpoint of bitsandbytes, refused before the library sees a byte of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bnb_parts import MODULE, NAME, STATE, matrix, parts_4bit, parts_int8, write
from checkpoint_files import refused
from torch import Tensor

from localr1.checkpoint.reader import open_checkpoint
from localr1.errors import FormatError, LocalR1Error, NumericsError, TensorError, UnsupportedError

Spoil = Callable[[dict[str, Tensor]], Any]


def put(part: str, value: Tensor) -> Spoil:
    return lambda parts: parts.update({f"{NAME}{part}": value})


def drop(part: str) -> Spoil:
    return lambda parts: parts.pop(f"{NAME}{part}")


def state(**changes: Any) -> Spoil:
    """The JSON with fields changed; None removes."""

    def change(parts: dict[str, Tensor]) -> None:
        fields = {**json.loads(bytes(parts[STATE].numpy())), **changes}
        kept = {key: value for key, value in fields.items() if value is not None}
        put_state(json.dumps(kept).encode())(parts)

    return change


def put_state(data: bytes) -> Spoil:
    return lambda parts: parts.update({STATE: torch.tensor(list(data), dtype=torch.uint8)})


def rename_state(parts: dict[str, Tensor]) -> None:
    parts[STATE.replace("nf4", "int2")] = parts.pop(STATE)


def double_state(parts: dict[str, Tensor]) -> None:
    parts[STATE.replace("nf4", "fp4")] = parts[STATE].clone()
    state(quant_type="fp4")(parts)


ON_OPENING: dict[str, tuple[Spoil, type[LocalR1Error], str]] = {
    "no codes": (drop(""), TensorError, "no such tensor"),
    "codes cut": (put("", torch.zeros(4607, 1, dtype=torch.uint8)), TensorError, "4,608 bytes"),
    "codes too long": (put("", torch.zeros(4609, 1, dtype=torch.uint8)), TensorError, "[4609, 1]"),
    "codes of int64": (put("", torch.zeros(576, 1, dtype=torch.int64)), TensorError, "found I64"),
    "no absmax": (drop(".absmax"), TensorError, "no such tensor"),
    "absmax cut": (put(".absmax", torch.zeros(143, dtype=torch.uint8)), TensorError, "U8 [144]"),
    "absmax too long": (put(".absmax", torch.zeros(145, dtype=torch.uint8)), TensorError, "[145]"),
    "absmax of F32": (put(".absmax", torch.ones(144)), TensorError, "found F32"),
    "no quant_map": (drop(".quant_map"), TensorError, "no such tensor"),
    "short quant_map": (put(".quant_map", torch.ones(15)), TensorError, "F32 [16]"),
    "quant_map of F16": (put(".quant_map", torch.ones(16).half()), TensorError, "found F16"),
    "no nested_absmax": (drop(".nested_absmax"), TensorError, "no such tensor"),
    "nested_absmax empty": (put(".nested_absmax", torch.ones(0)), TensorError, "F32 [1]"),
    "no nested_quant_map": (drop(".nested_quant_map"), TensorError, "no such tensor"),
    "short nested map": (put(".nested_quant_map", torch.ones(255)), TensorError, "F32 [256]"),
    "nested without an offset": (
        state(nested_offset=None, nested_dtype=None, nested_blocksize=None),
        TensorError,
        "expected F32 [144]",
    ),
    "no state": (
        lambda parts: parts.pop(STATE),
        TensorError,
        "no quant_state and no codes",
    ),
    "two states": (double_state, LocalR1Error, ""),
    "state of another name": (rename_state, UnsupportedError, "nf4 or fp4"),
    "state not JSON": (put_state(b"{'a': 1}"), FormatError, "not valid JSON"),
    "state not UTF-8": (put_state(b"\xff{}"), FormatError, "UTF-8"),
    "state empty": (put_state(b""), FormatError, "not valid JSON"),
    "state a list": (put_state(b"[]"), FormatError, "a JSON object"),
    "key twice": (put_state(b'{"blocksize": 64, "blocksize": 64}'), FormatError, "appears twice"),
    "state too long": (put_state(b" " * 5000), TensorError, "4,096 bytes"),
    "state NaN": (put_state(b'{"nested_offset": NaN}'), FormatError, "a finite number"),
    "state of F32": (
        lambda parts: parts.update({STATE: torch.ones(4)}),
        TensorError,
        "bytes of JSON",
    ),
    "wrong type in it": (state(quant_type="fp4"), UnsupportedError, "quant_type: expected nf4"),
    "block 0": (state(blocksize=0), UnsupportedError, "blocksize"),
    "block -64": (state(blocksize=-64), UnsupportedError, "blocksize"),
    "block 65": (state(blocksize=65), UnsupportedError, "found 65"),
    "another block": (state(blocksize=128), TensorError, "U8 [72]"),
    "block true": (state(blocksize=True), FormatError, "an integer"),
    "block of a string": (state(blocksize="64"), FormatError, "an integer"),
    "no block": (state(blocksize=None), FormatError, "blocksize is missing"),
    "no shape": (state(shape=None), FormatError, "shape is missing"),
    "another shape": (state(shape=[96, 97]), TensorError, "4,656 bytes of codes for [96, 97]"),
    "huge shape": (state(shape=[1 << 62, 4]), FormatError, "rows and columns"),
    "negative shape": (state(shape=[-96, -96]), FormatError, "rows and columns"),
    "float shape": (state(shape=[96.0, 96]), FormatError, "rows and columns"),
    "true shape": (state(shape=[True, 9216]), FormatError, "rows and columns"),
    "flat shape": (state(shape=[9216]), FormatError, "rows and columns"),
    "float64": (state(dtype="float64"), UnsupportedError, "dtype"),
    "nested float16": (state(nested_dtype="float16"), UnsupportedError, "nested_dtype"),
    "nested block 0": (state(nested_blocksize=0), UnsupportedError, "nested_blocksize"),
    "nested block 64": (state(nested_blocksize=64), TensorError, "F32 [3]"),
    "offset 1e300": (state(nested_offset=1e300), FormatError, "a float32"),
    "offset of a string": (state(nested_offset="0"), FormatError, "a number"),
    "unknown key": (state(rotation=1), UnsupportedError, "'rotation'"),
    "lone absmax": (
        lambda parts: parts.update({"x.weight.absmax": torch.ones(3)}),
        TensorError,
        "no quant_state",
    ),
    "lone SCB": (lambda parts: parts.update({"x.SCB": torch.ones(3)}), TensorError, "'x.SCB'"),
    "lone bytes": (
        lambda parts: parts.update({"x.weight": torch.zeros(3, dtype=torch.uint8)}),
        TensorError,
        "'x.weight'",
    ),
}


@pytest.mark.parametrize("name", ON_OPENING)
def test_parts_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    spoil, error, said = ON_OPENING[name]
    parts = parts_4bit(matrix(96, 96))
    spoil(parts)
    write(tmp_path, parts)
    with refused(tmp_path, error, said):
        open_checkpoint(tmp_path)


NAN, INF = float("nan"), float("inf")
ON_READING: dict[str, tuple[bool, Spoil, type[LocalR1Error], str]] = {
    "another quant_map": (True, put(".quant_map", torch.linspace(-1, 1, 16)),
                          UnsupportedError, "the numbers of nf4"),
    "NaN in quant_map": (True, put(".quant_map", torch.full((16,), NAN)), UnsupportedError, "nf4"),
    "NaN scale": (False, put(".absmax", torch.full((144,), NAN)), NumericsError, "none negative"),
    "negative scale": (False, put(".absmax", -torch.ones(144)), NumericsError, "none negative"),
    "NaN outer scale": (True, put(".nested_absmax", torch.full((1,), NAN)), NumericsError,
                        "nested_absmax"),
    "negative outer scale": (True, put(".nested_absmax", -torch.ones(1)), NumericsError,
                             "nested_absmax"),
    "NaN in the nested map": (True, put(".nested_quant_map", torch.full((256,), NAN)),
                              NumericsError, "from -1 to 1"),
    "large nested map": (True, put(".nested_quant_map", torch.full((256,), 2.0)), NumericsError,
                         "from -1 to 1"),
    "infinite values": (True, lambda parts: (state(nested_offset=3e38)(parts),
                                             put(".nested_absmax", torch.tensor([3e38]))(parts)),
                        NumericsError, "NaN or infinity"),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_READING)
def test_bad_numbers_are_refused(name: str, tmp_path: Path) -> None:
    nested, spoil, error, said = ON_READING[name]
    parts = parts_4bit(matrix(96, 96), nested=nested)
    spoil(parts)
    write(tmp_path, parts)
    with open_checkpoint(tmp_path) as checkpoint, refused(tmp_path, error, said):
        checkpoint.read(NAME)


def put_beside(part: str, value: Tensor) -> Spoil:
    return lambda parts: parts.update({f"{MODULE}.{part}": value})


INT8_FAULTS: dict[str, tuple[Spoil, type[LocalR1Error], str]] = {
    "no scales": (lambda parts: parts.pop(f"{MODULE}.SCB"), TensorError, "no such tensor"),
    "scales cut": (put_beside("SCB", torch.ones(15)), TensorError, "F32 [16]"),
    "scales of columns": (put_beside("SCB", torch.ones(24)), TensorError, "found F32 [24]"),
    "scales of F16": (put_beside("SCB", torch.ones(16).half()), TensorError, "found F16"),
    "NaN scale": (put_beside("SCB", torch.full((16,), NAN)), NumericsError, "none negative"),
    "infinite scale": (put_beside("SCB", torch.full((16,), INF)), NumericsError, "none negative"),
    "negative scale": (put_beside("SCB", -torch.ones(16)), NumericsError, "none negative"),
    "tiled": (put_beside("weight_format", torch.tensor(3).byte()), UnsupportedError, "found 3"),
    "layout of rank 1": (put_beside("weight_format", torch.zeros(1).byte()), TensorError, "U8 []"),
    "int8 vector": (put("", torch.zeros(16, dtype=torch.int8)), TensorError, "found shape [16]"),
    "int8 bias": (
        put_beside("bias", torch.zeros(1, 16, dtype=torch.int8)),
        TensorError,
        "a matrix X.weight",
    ),
}


@pytest.mark.parametrize("name", INT8_FAULTS)
def test_8_bit_parts_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    spoil, error, said = INT8_FAULTS[name]
    parts = parts_int8(matrix(16, 24))
    spoil(parts)
    write(tmp_path, parts)
    with refused(tmp_path, error, said), open_checkpoint(tmp_path) as checkpoint:
        checkpoint.read(NAME)


def test_an_unknown_field_is_named(tmp_path: Path) -> None:
    write(tmp_path, parts_4bit(matrix(64, 64)), bnb_4bit_rotation="hadamard")
    with refused(tmp_path, UnsupportedError, "bnb_4bit_rotation"):
        open_checkpoint(tmp_path)
    write(tmp_path, parts_4bit(matrix(64, 64)), quant_method=["bitsandbytes"])
    with open_checkpoint(tmp_path) as checkpoint:
        assert NAME in checkpoint.tensors  # Bytes as they lie: no method is stated.
