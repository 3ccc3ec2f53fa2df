"""Checkpoints quantized by bitsandbytes, read as the numbers they stand for.

4 bits (Dettmers et al. 2023, "QLoRA", section 3; types NF4 and FP4), of a matrix X.weight:
    X.weight                 the codes, two to a byte, the first in the high half, row after row
    X.weight.absmax          a scale per block of values: float32, or uint8 if quantized itself
    X.weight.quant_map       the 16 numbers that codes mean
    X.weight.nested_absmax, X.weight.nested_quant_map         where scales are quantized
    X.weight.quant_state.bitsandbytes__nf4 (or fp4)     JSON: sizes of blocks, shape, offset
value = quant_map[code] * scale, scale = nested_quant_map[absmax] * nested_absmax + nested_offset.

8 bits (Dettmers et al. 2022, "LLM.int8()"): X.weight int8, X.SCB float32, a scale per row;
value = code * scale / 127. X.weight_format is 0, for rows as they are.

Everything the library's native code would trust is checked before it sees a byte.
"""

import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from localr1.checkpoint.api import TensorInfo
from localr1.checkpoint.dequantized import (
    FP4_TYPE,
    INT8_TYPE,
    NF4_TYPE,
    DequantizedCheckpoint,
    check_scales,
    check_values,
    read_quantization,
)
from localr1.checkpoint.paths import quoted
from localr1.checkpoint.rows import Rows
from localr1.checkpoint.stored import StoredCheckpoint
from localr1.checkpoint.strict_json import parse_object, required
from localr1.errors import FormatError, NumericsError, TensorError, UnsupportedError

METHOD = "bitsandbytes"
"""`quant_method` in config.json."""
KNOWN_FIELDS = frozenset({
    "quant_method", "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit",
    "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight",
    "llm_int8_skip_modules", "llm_int8_threshold",
})  # fmt: skip
"""Fields that speak of what the tensors themselves say, and of how the library multiplies."""

STATE_MARK = ".quant_state.bitsandbytes__"
LISTED_AS = {"nf4": NF4_TYPE, "fp4": FP4_TYPE}
PARTS_4BIT = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
STATE_KEYS = frozenset({"quant_type", "blocksize", "dtype", "shape"})
NESTED_KEYS = frozenset({"nested_blocksize", "nested_dtype", "nested_offset"})
MAX_STATE_BYTES = 4096
MAX_VALUES = 1 << 40
CODE_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SCALE_BLOCKS = CODE_BLOCKS[1:]
STORAGE_TYPES = ("U8", "BF16", "F16", "F32")
"""The type codes are labelled with (`bnb_4bit_quant_storage`); their bytes are the same."""
VALUE_TYPES = ("float32", "float16", "bfloat16")
MAP_TOLERANCE = 1e-5
"""Largest difference of a stored quant_map from the library's, which it computes with whatever the
file says. float32 roundings in its making are 1e-7; maps that are meant to differ do so by 1e-2."""

SCB, WEIGHT_FORMAT = "SCB", "weight_format"


@dataclass(frozen=True)
class _State:
    """What a quant_state says, checked. offset: None unless scales are quantized themselves."""

    quant_type: str
    block: int
    shape: tuple[int, int]
    scale_block: int
    offset: float | None

    @property
    def num_values(self) -> int:
        return self.shape[0] * self.shape[1]


class BnbCheckpoint(DequantizedCheckpoint):
    """A Checkpoint (api.py) over one with bitsandbytes matrices: each is listed once, with its true
    shape, and `read` dequantizes it to float32 through the library. Opening reads the quant_state
    of each matrix and nothing else.

    Raises TensorError for parts that are missing, left over, or of another shape or type than the
    rest implies, FormatError for a malformed quant_state, UnsupportedError for the rest.
    """

    def __init__(self, inner: StoredCheckpoint) -> None:
        super().__init__(inner)
        read_quantization(inner, KNOWN_FIELDS, METHOD)
        self._states: dict[str, _State] = {}
        self._row_scaled: set[str] = set()
        hidden: set[str] = set()
        for name, info in inner.tensors.items():
            weight, mark, quant_type = name.partition(STATE_MARK)
            if mark:
                hidden |= self._add_4bit(weight, quant_type, name)
            elif info.dtype == "I8":
                hidden |= self._add_int8(info)
        for name, info in inner.tensors.items():
            if name in hidden:
                continue
            self._check_plain(name, info)
            self._tensors[name] = self._listed(info)

    def read(self, name: str) -> Tensor:
        """As `Checkpoint.read`; also raises NumericsError for scales that are not finite."""
        if name not in self._tensors:
            raise TensorError(f"{self.path}: there is no tensor {quoted(name)}")
        if name in self._states:
            weight = self._read_4bit(name, self._states[name])
        elif name in self._row_scaled:
            weight = self._read_int8(name)
        else:
            return self._inner.read(name)
        check_values(weight, name)
        return weight

    def pieces(self, name: str, max_nbytes: int) -> Iterator[Rows]:
        if name in self._states or name in self._row_scaled or name not in self._tensors:
            yield self.read(name)  # Blocks of codes do not end with the rows.
        else:
            yield from self._inner.pieces(name, max_nbytes)

    def stored_names(self, name: str) -> tuple[str, ...]:
        """The quant_state, which is read when the checkpoint is opened, is not among them."""
        if name in self._states:
            parts = [name + part for part in PARTS_4BIT]
        elif name in self._row_scaled:
            parts = [_beside(name, part) for part in (SCB, WEIGHT_FORMAT)]
        else:
            parts = []
        return (name, *(part for part in parts if part in self._inner.tensors))

    def nf4_block(self, name: str) -> int | None:
        """How many values in a row share a scale; None for what is not NF4."""
        state = self._states.get(name)
        return state.block if state is not None and state.quant_type == "nf4" else None

    def nf4_pairs(self, name: str) -> Tensor:
        """The codes of an NF4 matrix [out, in] as they are stored: uint8 [out * in / 2], the first
        of each two in the upper half. Raises as `read`."""
        self._check_map(name, self._states[name])
        return self._inner.read(name).reshape(-1).view(torch.uint8)

    def nf4_scales(self, name: str) -> Tensor:
        """Those of an NF4 matrix [out, in], float32 [out * in / block, rounded up]. Raises as
        `read`."""
        return self._read_scales(name, self._states[name])

    def _listed(self, info: TensorInfo) -> TensorInfo:
        if state := self._states.get(info.name):
            parts = (self._inner.tensors.get(info.name + part) for part in PARTS_4BIT)
            nbytes = info.nbytes + sum(part.nbytes for part in parts if part)
            return TensorInfo(info.name, LISTED_AS[state.quant_type], state.shape, nbytes)
        if info.name in self._row_scaled:
            nbytes = info.nbytes + self._inner.tensors[_beside(info.name, SCB)].nbytes
            return TensorInfo(info.name, INT8_TYPE, info.shape, nbytes)
        return info

    def _check_plain(self, name: str, info: TensorInfo) -> None:
        """Raise TensorError for a tensor that belongs to a quantized matrix that is not there."""
        is_part = name.endswith((*PARTS_4BIT, f".{SCB}", f".{WEIGHT_FORMAT}"))
        if name in self._states or name in self._row_scaled or not (is_part or info.dtype == "U8"):
            return
        raise TensorError(
            f"tensor {quoted(name)}",
            expected="a part of a matrix quantized by bitsandbytes",
            found="no quant_state and no codes that it could belong to",
            fix="The checkpoint is incomplete; download it again.",
        )

    def _add_4bit(self, weight: str, quant_type: str, state_name: str) -> set[str]:
        """Check one matrix against its quant_state; returns the names that are part of it."""
        if weight in self._states:
            raise TensorError(f"tensor {quoted(weight)} has two quant_states")
        state = self._read_state(quant_type, state_name)
        codes = self._inner.tensors.get(weight)
        num_bytes = -(-state.num_values // 2)
        if codes is None or codes.dtype not in STORAGE_TYPES or codes.nbytes != num_bytes:
            raise TensorError(
                f"tensor {quoted(weight)}",
                expected=f"{num_bytes:,} bytes of codes for {list(state.shape)}",
                found=f"{codes.dtype} {list(codes.shape)}" if codes else "no such tensor",
            )
        blocks = -(-state.num_values // state.block)
        is_nested = state.offset is not None
        expected = {
            ".absmax": ("U8" if is_nested else "F32", (blocks,)),
            ".quant_map": ("F32", (16,)),
        }
        if is_nested:
            expected[".nested_absmax"] = ("F32", (-(-blocks // state.scale_block),))
            expected[".nested_quant_map"] = ("F32", (256,))
        for part in PARTS_4BIT:
            if part in expected:
                self._check_part(weight + part, *expected[part])
            elif weight + part in self._inner.tensors:
                raise TensorError(
                    f"tensor {quoted(weight + part)}",
                    expected="none, as quant_state says nothing of quantized scales",
                )
        self._states[weight] = state
        return {state_name, *(weight + part for part in expected)}

    def _add_int8(self, info: TensorInfo) -> set[str]:
        if len(info.shape) != 2 or not info.name.endswith(".weight"):
            raise TensorError(
                f"tensor {quoted(info.name)}",
                expected="no int8 but in a matrix X.weight",
                found=f"shape {list(info.shape)}",
            )
        scales, layout = _beside(info.name, SCB), _beside(info.name, WEIGHT_FORMAT)
        self._check_part(scales, "F32", info.shape[:1])
        self._row_scaled.add(info.name)
        if layout not in self._inner.tensors:
            return {scales}
        self._check_part(layout, "U8", ())
        return {scales, layout}

    def _check_part(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        info = self._inner.tensors.get(name)
        if info is None or info.dtype != dtype or info.shape != shape:
            raise TensorError(
                f"tensor {quoted(name)}",
                expected=f"{dtype} {list(shape)}",
                found=f"{info.dtype} {list(info.shape)}" if info else "no such tensor",
                fix="The checkpoint is incomplete or damaged; download it again.",
            )

    def _read_state(self, quant_type: str, name: str) -> _State:
        shown = f"tensor {quoted(name)}"
        if quant_type not in LISTED_AS:
            raise UnsupportedError(shown, expected="nf4 or fp4", found=quoted(quant_type))
        info = self._inner.tensors[name]
        if info.dtype != "U8" or len(info.shape) != 1 or info.nbytes > MAX_STATE_BYTES:
            raise TensorError(
                shown,
                expected=f"at most {MAX_STATE_BYTES:,} bytes of JSON",
                found=f"{info.dtype} {list(info.shape)}",
            )
        return _parse_state(bytes(self._inner.read(name).numpy()), quant_type, shown)

    def _check_map(self, name: str, state: _State) -> Tensor:
        """The library's numbers, of which the stored ones must be."""
        code_map = self._inner.read(name + ".quant_map")
        known: Tensor = bitsandbytes_functional().get_4bit_type(state.quant_type, device="cpu")
        if not torch.allclose(code_map, known, rtol=0.0, atol=MAP_TOLERANCE):
            raise UnsupportedError(
                f"tensor {quoted(name + '.quant_map')}",
                expected=f"the numbers of {state.quant_type}",
                found="others",
            )
        return known

    def _read_4bit(self, name: str, state: _State) -> Tensor:
        library = bitsandbytes_functional()
        known = self._check_map(name, state)
        # As one row: on AVX-512 the library (0.50) misreads scales of rows that are not a multiple
        # of the block. An odd value at the end has an unused half byte beside it.
        row = torch.Size((1, state.num_values + state.num_values % 2))
        quant_state = library.QuantState(
            absmax=self._read_scales(name, state),
            shape=row,
            code=known,
            blocksize=state.block,
            quant_type=state.quant_type,
            dtype=torch.float32,
        )
        codes = self._inner.read(name).reshape(-1).view(torch.uint8)
        with torch.compiler.set_stance("force_eager"):  # Its fallbacks would start a compiler.
            values: Tensor = library.dequantize_4bit(codes, quant_state)
        return values.reshape(-1)[: state.num_values].reshape(state.shape)

    def _read_scales(self, name: str, state: _State) -> Tensor:
        """float32 [blocks]."""
        absmax = self._inner.read(name + ".absmax")
        if state.offset is None:
            check_scales(absmax, name + ".absmax")
            return absmax
        library = bitsandbytes_functional()
        outer = self._inner.read(name + ".nested_absmax")
        check_scales(outer, name + ".nested_absmax")
        code_map = self._inner.read(name + ".nested_quant_map")
        if not (code_map.abs() <= 1.0).all():
            raise NumericsError(
                f"tensor {quoted(name + '.nested_quant_map')}",
                expected="numbers from -1 to 1",
                found="others",
                fix="The checkpoint is damaged; download it again.",
            )
        with torch.compiler.set_stance("force_eager"):
            scales: Tensor = library.dequantize_blockwise(
                absmax, absmax=outer, code=code_map, blocksize=state.scale_block
            )
        return scales + state.offset

    def _read_int8(self, name: str) -> Tensor:
        library = bitsandbytes_functional()
        layout = _beside(name, WEIGHT_FORMAT)
        if layout in self._inner.tensors and (found := int(self._inner.read(layout).item())):
            raise UnsupportedError(
                f"tensor {quoted(layout)}", expected="0, rows as they are", found=found
            )
        scales = self._inner.read(_beside(name, SCB))
        check_scales(scales, _beside(name, SCB))
        with torch.compiler.set_stance("force_eager"):
            weight: Tensor = library.int8_vectorwise_dequant(self._inner.read(name), scales)
        return weight


@cache
def bitsandbytes_functional() -> ModuleType:
    """The library's module, imported at the first need.

    While it is imported the library (0.50) would download a kernel from the Hugging Face Hub and
    load it, where the package `kernels` is installed and the CPU has AVX-512 BF16: it is hidden
    from it, and so is the warning that follows. What is called here does not use that kernel.
    """
    logger = logging.getLogger("bitsandbytes")
    level, hidden = logger.level, sys.modules.get("kernels")
    sys.modules["kernels"] = cast(ModuleType, None)  # Importing it then raises ImportError.
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if hidden is not None:
            sys.modules["kernels"] = hidden
    return cast(ModuleType, bitsandbytes.functional)


def _beside(weight: str, part: str) -> str:
    """X.SCB for X.weight."""
    return weight.removesuffix("weight") + part


def _parse_state(data: bytes, quant_type: str, shown: str) -> _State:
    values = parse_object(data, shown, max_bytes=MAX_STATE_BYTES)
    is_nested = "nested_offset" in values
    for key in values:
        if key not in STATE_KEYS and not (is_nested and key in NESTED_KEYS):
            raise UnsupportedError(f"{shown}: {quoted(key)} is not honoured")
    _one_of(values, "quant_type", (quant_type,), shown)
    _one_of(values, "dtype", VALUE_TYPES, shown)
    scale_block, offset = 0, None
    if is_nested:
        _one_of(values, "nested_dtype", ("float32",), shown)
        scale_block = _one_of(values, "nested_blocksize", SCALE_BLOCKS, shown)
        offset = required(values, "nested_offset", float, shown)
        if not abs(offset) <= torch.finfo(torch.float32).max:
            raise FormatError(f"{shown}: nested_offset", expected="a float32", found=quoted(offset))
    shape = required(values, "shape", list, shown)
    is_matrix = len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)
    if not is_matrix or math.prod(shape) > MAX_VALUES:
        raise FormatError(
            f"{shown}: shape",
            expected=f"rows and columns, at most {MAX_VALUES:,} values",
            found=quoted(shape),
        )
    block = _one_of(values, "blocksize", CODE_BLOCKS, shown)
    return _State(quant_type, block, (shape[0], shape[1]), scale_block, offset)


def _one_of(values: dict[str, Any], key: str, allowed: tuple[Any, ...], shown: str) -> Any:
    value = required(values, key, type(allowed[0]), shown)
    if value not in allowed:
        raise UnsupportedError(
            f"{shown}: {key}", expected=" or ".join(map(str, allowed)), found=quoted(value)
        )
    return value
