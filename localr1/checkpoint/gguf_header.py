"""The header of a GGUF file, bounded and validated before anything else sees it.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Versions 2 and 3,
little-endian. Every count and length is checked against a bound and against the file before memory
is spent on it.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from localr1.checkpoint.files import RandomAccessFile
from localr1.checkpoint.gguf_metadata import Metadata
from localr1.checkpoint.paths import quoted
from localr1.errors import FormatError, TruncatedError, UnsupportedError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 32 << 20
MAX_KEYS = 65_536
MAX_TENSORS = 200_000
MAX_KEY_BYTES = 1024
MAX_NAME_BYTES = 255
MAX_STRINGS = 2_000_000
MAX_DIMENSIONS = 4
MAX_ELEMENTS = 1 << 48
MAX_ALIGNMENT = 1 << 20
DEFAULT_ALIGNMENT = 32
FIRST_READ = 1 << 20

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}
"""Value type of the format -> code of `struct`: uint8, int8, uint16, ..., bool, uint64, int64,
float64."""

_STRUCTS = {code: struct.Struct("<" + code) for code in _SCALARS.values()}
_LENGTH = _STRUCTS["Q"]


@dataclass(frozen=True)
class GgufTensor:
    """name: as in the file. shape: row-major (the file's dimensions reversed). type_id: ggml's
    type. begin: offset from the start of the file. part: number of the file, of a model in several
    (gguf_split.py)."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    type_name: str
    begin: int
    nbytes: int
    part: int = 0


@dataclass(frozen=True)
class GgufHeader:
    """expected_size: bytes that the file must have for all its tensors to be there."""

    version: int
    metadata: Metadata
    tensors: dict[str, GgufTensor]
    expected_size: int


def read_header(file: RandomAccessFile, *, allow_truncated: bool = False) -> GgufHeader:
    """Parse and validate. allow_truncated: accept a file that ends inside its tensors.

    Raises FormatError, TruncatedError, UnsupportedError.
    """
    cursor = _Cursor(file)
    version, num_tensors, num_keys = _read_preamble(cursor)
    metadata = Metadata(str(file.path), dict(_read_keys(cursor, num_keys)))
    alignment = _alignment(metadata)
    infos = [_read_tensor_info(cursor) for _ in range(num_tensors)]
    data_start = _align(cursor.position, alignment)
    tensors, end = _lay_out(infos, data_start, alignment, cursor.shown)
    if file.size < end and not allow_truncated:
        raise TruncatedError(
            f"{cursor.shown}: the file ends early",
            expected=f"{end:,} bytes",
            found=f"{file.size:,}",
            fix="Download or copy it again.",
        )
    if file.size > _align(end, alignment):
        raise FormatError(
            f"{cursor.shown}: bytes after the last tensor",
            expected=f"{end:,} bytes",
            found=f"{file.size:,}",
        )
    return GgufHeader(version, metadata, tensors, end)


def read_description(file: RandomAccessFile) -> Metadata:
    """The keys before the tokenizer's, which are nearly all of a header: what the model is, not
    its vocabulary or tensors. Raises as `read_header`."""
    cursor = _Cursor(file)
    _, _, num_keys = _read_preamble(cursor)
    keys = takewhile(
        lambda pair: not pair[0].startswith("tokenizer."), _read_keys(cursor, num_keys)
    )
    return Metadata(str(file.path), dict(keys))


class _Cursor:
    """The header's bytes, read in growing pieces, and the place reached in them."""

    def __init__(self, file: RandomAccessFile) -> None:
        self.file = file
        self.shown = str(file.path)
        self.data = bytearray()
        self.position = 0
        self.num_strings = 0

    def need(self, count: int, what: str) -> None:
        """Have `count` more bytes in memory, or say what was cut."""
        end = self.position + count
        if end <= len(self.data):
            return
        if end > self.file.size:
            raise TruncatedError(
                f"{self.shown}: the file ends inside its header ({what})",
                expected=f"at least {end:,} bytes",
                found=f"{self.file.size:,}",
                fix="Download or copy it again; if it is complete, it is damaged.",
            )
        if end > MAX_HEADER_BYTES:
            raise FormatError(
                f"{self.shown}: header too large ({what})",
                expected=f"at most {MAX_HEADER_BYTES:,} bytes",
                found=f"at least {end:,}",
            )
        target = min(self.file.size, max(end, 2 * len(self.data), FIRST_READ))
        self.data += self.file.read(len(self.data), target - len(self.data))

    def take(self, code: str, what: str) -> Any:
        packer = _STRUCTS[code]
        self.need(packer.size, what)
        (value,) = packer.unpack_from(self.data, self.position)
        self.position += packer.size
        return value

    def string(self, what: str, max_bytes: int = MAX_HEADER_BYTES) -> str:
        length = self.take("Q", what)
        if length > max_bytes:
            raise FormatError(
                f"{self.shown}: {what}: string too long",
                expected=f"at most {max_bytes:,} bytes",
                found=f"{length:,}",
            )
        self.need(length, what)
        begin = self.position
        self.position += length
        return self._decode(begin, length, what)

    def strings(self, count: int, what: str) -> list[str]:
        """An array of strings: some 300,000 in a real file, hence the local names."""
        self.num_strings += count
        if self.num_strings > MAX_STRINGS:
            raise FormatError(
                f"{self.shown}: {what}: too many strings",
                expected=f"at most {MAX_STRINGS:,}",
                found=f"{self.num_strings:,}",
            )
        self.need(count * _LENGTH.size, what)
        unpack = _LENGTH.unpack_from
        result = []
        for _ in range(count):
            if self.position + _LENGTH.size > len(self.data):
                self.need(_LENGTH.size, what)
            (length,) = unpack(self.data, self.position)
            self.position += _LENGTH.size
            if self.position + length > len(self.data):
                self.need(length, what)
            result.append(self._decode(self.position, length, what))
            self.position += length
        return result

    def array(self, code: str, count: int, what: str) -> "np.ndarray[Any, np.dtype[Any]]":
        nbytes = count * _STRUCTS[code].size
        self.need(nbytes, what)
        begin = self.position
        self.position += nbytes
        # A copy: a view would forbid the buffer to grow.
        return np.frombuffer(bytes(self.data[begin : begin + nbytes]), dtype="<" + code)

    def _decode(self, begin: int, length: int, what: str) -> str:
        try:
            return self.data[begin : begin + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(
                f"{self.shown}: {what}: is not UTF-8",
                found=f"a bad byte at {begin + error.start:,}",
            ) from error


def _read_preamble(cursor: _Cursor) -> tuple[int, int, int]:
    """(version, number of tensors, number of keys)."""
    cursor.need(len(MAGIC), "magic")
    magic = bytes(cursor.data[: len(MAGIC)])
    if magic != MAGIC:
        raise FormatError(
            f"{cursor.shown}: is not a GGUF file", expected=quoted(MAGIC), found=quoted(magic)
        )
    cursor.position = len(MAGIC)
    version = cursor.take("I", "version")
    if version not in VERSIONS:
        big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        raise UnsupportedError(
            f"{cursor.shown}: GGUF version",
            expected="2 or 3, little-endian",
            found="a big-endian file" if big_endian else f"{version}",
        )
    num_tensors = cursor.take("Q", "tensor count")
    num_keys = cursor.take("Q", "key count")
    for what, count, limit in (
        ("tensors", num_tensors, MAX_TENSORS),
        ("metadata keys", num_keys, MAX_KEYS),
    ):
        if count > limit:
            raise FormatError(
                f"{cursor.shown}: too many {what}",
                expected=f"at most {limit:,}",
                found=f"{count:,}",
            )
    return version, num_tensors, num_keys


def _read_keys(cursor: _Cursor, count: int) -> Iterator[tuple[str, Any]]:
    seen: set[str] = set()
    for number in range(count):
        key = cursor.string(f"metadata key {number}", MAX_KEY_BYTES)
        if key in seen:
            raise FormatError(f"{cursor.shown}: the metadata key {quoted(key)} appears twice")
        seen.add(key)
        yield key, _read_value(cursor, quoted(key))


def _read_value(cursor: _Cursor, what: str) -> Any:
    type_id = cursor.take("I", what)
    if type_id == _STRING:
        return cursor.string(what)
    if type_id == _ARRAY:
        return _read_array(cursor, what)
    value = cursor.take(_scalar_code(cursor, type_id, what), what)
    if type_id != _BOOL:
        return value
    if value > 1:
        raise FormatError(f"{cursor.shown}: {what}", expected="0 or 1 for a bool", found=value)
    return bool(value)


def _read_array(cursor: _Cursor, what: str) -> Any:
    item_type = cursor.take("I", what)
    count = cursor.take("Q", what)
    if item_type == _STRING:
        if count > MAX_STRINGS:
            raise FormatError(
                f"{cursor.shown}: {what}: too many strings",
                expected=f"at most {MAX_STRINGS:,}",
                found=f"{count:,}",
            )
        return cursor.strings(count, what)
    if item_type == _ARRAY:
        raise UnsupportedError(f"{cursor.shown}: {what}", found="an array of arrays")
    values = cursor.array(_scalar_code(cursor, item_type, what), count, what)
    if item_type == _BOOL:
        if bool((values > 1).any()):
            raise FormatError(f"{cursor.shown}: {what}", expected="0 or 1 for a bool")
        return values.astype(np.bool_)
    return values


def _scalar_code(cursor: _Cursor, type_id: int, what: str) -> str:
    if type_id not in _SCALARS:
        raise FormatError(
            f"{cursor.shown}: {what}: value type", expected="0 to 12", found=f"{type_id:,}"
        )
    return _SCALARS[type_id]


def _alignment(metadata: Metadata) -> int:
    value = metadata.integer("general.alignment", DEFAULT_ALIGNMENT)
    if not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise FormatError(
            f"{metadata.shown}: general.alignment",
            expected=f"a power of two from 8 to {MAX_ALIGNMENT:,}",
            found=f"{value:,}",
        )
    return value


@dataclass(frozen=True)
class _TensorInfo:
    name: str
    dimensions: tuple[int, ...]
    type_id: int
    offset: int


def _read_tensor_info(cursor: _Cursor) -> _TensorInfo:
    name = cursor.string("tensor name", MAX_NAME_BYTES)
    what = f"tensor {quoted(name)}"
    num_dimensions = cursor.take("I", what)
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise FormatError(
            f"{cursor.shown}: {what}: dimensions",
            expected=f"1 to {MAX_DIMENSIONS}",
            found=f"{num_dimensions:,}",
        )
    dimensions = tuple(cursor.take("Q", what) for _ in range(num_dimensions))
    if 0 in dimensions or math.prod(dimensions) > MAX_ELEMENTS:
        raise FormatError(
            f"{cursor.shown}: {what}: shape",
            expected=f"1 to {MAX_ELEMENTS:,} values",
            found=quoted(list(dimensions)),
        )
    type_id = cursor.take("I", what)
    return _TensorInfo(name, dimensions, type_id, cursor.take("Q", what))


def _lay_out(
    infos: list[_TensorInfo], data_start: int, alignment: int, shown: str
) -> tuple[dict[str, GgufTensor], int]:
    """Hold every offset to what the format prescribes: each tensor at the next aligned place after
    the one before it. Returns the tensors and the offset after the last."""
    tensors: dict[str, GgufTensor] = {}
    end = 0
    for info in infos:
        what = f"{shown}: tensor {quoted(info.name)}"
        if info.name in tensors:
            raise FormatError(f"{what} appears twice")
        type_name, block_values, block_bytes = _block(info.type_id, what)
        if info.dimensions[0] % block_values:
            raise FormatError(
                f"{what}: row length",
                expected=f"a multiple of {block_values} for {type_name}",
                found=f"{info.dimensions[0]:,}",
            )
        nbytes = math.prod(info.dimensions) // block_values * block_bytes
        expected = _align(end, alignment)
        if info.offset != expected:
            wrong = "overlaps the one before it" if info.offset < end else "is out of place"
            raise FormatError(
                f"{what} {wrong}", expected=f"data offset {expected:,}", found=f"{info.offset:,}"
            )
        end = info.offset + nbytes
        shape = tuple(reversed(info.dimensions))
        tensors[info.name] = GgufTensor(
            info.name, shape, info.type_id, type_name, data_start + info.offset, nbytes
        )
    return tensors, data_start + end


def _block(type_id: int, what: str) -> tuple[str, int, int]:
    """(name, values a block, bytes a block) of a ggml type."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        quantization = GGMLQuantizationType(type_id)
        values, nbytes = GGML_QUANT_SIZES[quantization]
    except (ValueError, KeyError):
        raise UnsupportedError(
            f"{what}: tensor type",
            expected="a type of the gguf library",
            found=f"number {type_id:,}",
        ) from None
    return quantization.name, values, nbytes


def _align(offset: int, alignment: int) -> int:
    return (offset + alignment - 1) // alignment * alignment
