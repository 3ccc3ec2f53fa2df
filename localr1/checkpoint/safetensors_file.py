"""One safetensors file: an 8-byte length, a JSON header, then the tensors' bytes without gaps.

The format is documented at https://huggingface.co/docs/safetensors. The header is validated here,
more strictly than the library does (which accepts duplicate keys), and tensors are read by
position.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localr1.checkpoint.api import TensorInfo
from localr1.checkpoint.files import RandomAccessFile
from localr1.checkpoint.paths import quoted
from localr1.checkpoint.strict_json import collection_paused, expect, parse_object, required
from localr1.errors import (
    CheckpointError,
    FormatError,
    TensorError,
    TruncatedError,
    UnsupportedError,
)

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 200_000
MAX_VALUES = 9 * MAX_TENSORS
"""Of the header's JSON: three brackets and six commas for a tensor of rank 4."""
MAX_RANK = 8
MAX_NAME_LENGTH = 1024
LENGTH_BYTES = 8

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
_KNOWN_ELSEWHERE = frozenset({"F4", "F6_E2M3", "F6_E3M2", "C64"})
_BAD_NAME = re.compile(r"[\x00-\x1f\x7f/\\]")


@dataclass(frozen=True)
class _Entry:
    info: TensorInfo
    begin: int  # From the start of the file.


class SafetensorsFile:
    """A validated file. Raises FormatError, TruncatedError, TensorError, UnsupportedError.

    size: of the whole file, when `path` need only be its beginning, the header at least: no tensor
    can be read then before `attach`. None: the file is at `path`, whole, and stays open.

    tensors: name -> TensorInfo, in file order of their bytes. metadata: the file's own strings.
    header_sha256: of all bytes before the first tensor's.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        self.path = path
        self._file: RandomAccessFile | None = RandomAccessFile(path)
        try:
            self.size = self._file.size if size is None else size
            header, raw = _read_header(self._file, self.size)
            self.header_sha256 = hashlib.sha256(raw).hexdigest()
            self._header_bytes = len(raw)
            self.metadata = _metadata(header.pop("__metadata__", None), str(path))
            with collection_paused():
                self._entries = _validate(header, len(raw), self.size, str(path))
        except BaseException:
            self.close()
            raise
        self.tensors: dict[str, TensorInfo] = {
            name: entry.info for name, entry in self._entries.items()
        }
        if size is not None:
            self.close()

    def attach(self, path: Path) -> None:
        """The whole file lies at `path`. Raises FormatError when it is not the one whose header was
        read, NotFoundError and the like when it cannot be opened."""
        self.close()
        file = RandomAccessFile(path)
        try:
            if file.size != self.size:
                raise FormatError(
                    f"{path}: size",
                    expected=f"{self.size:,} bytes, as was said before it was there",
                    found=f"{file.size:,}",
                    fix="Download or copy it again.",
                )
            found = hashlib.sha256(file.read(0, self._header_bytes)).hexdigest()
            if found != self.header_sha256:
                raise FormatError(
                    f"{path}: header",
                    expected="the one that was read before the file was whole",
                    found="another",
                    fix="Download or copy it again.",
                )
        except BaseException:
            file.close()
            raise
        self.path, self._file = path, file

    def read(self, name: str) -> Tensor:
        """The tensor in its stored dtype, in memory of its own."""
        info = self._entry(name).info
        return self._read_bytes(name, 0, info.nbytes).reshape(info.shape)

    def read_rows(self, name: str, begin: int, end: int) -> Tensor:
        """The rows begin..end-1 of a tensor that has some; of a number itself."""
        info = self._entry(name).info
        if not info.shape:
            return self.read(name)
        row_nbytes = info.nbytes // info.shape[0]
        rows = self._read_bytes(name, begin * row_nbytes, (end - begin) * row_nbytes)
        return rows.reshape(end - begin, *info.shape[1:])

    def _read_bytes(self, name: str, begin: int, nbytes: int) -> Tensor:
        """Of the tensor's bytes, as values of its dtype."""
        entry = self._entry(name)
        if self._file is None:
            raise CheckpointError(
                f"{self.path}: tensor {quoted(name)}",
                expected="the whole file",
                found="its header alone",
                fix="Download the whole model first.",
            )
        data = self._file.read_tensor(entry.begin + begin, nbytes)
        if entry.info.dtype == "BOOL" and bool((data > 1).any()):
            raise FormatError(
                f"{self.path}: tensor {quoted(name)}", expected="bytes 0 or 1 for BOOL"
            )
        return data.view(DTYPES[entry.info.dtype])

    def location(self, name: str) -> tuple[int, int]:
        """(offset in the file, bytes) of the tensor."""
        entry = self._entry(name)
        return entry.begin, entry.info.nbytes

    def close(self) -> None:
        """`attach` may open it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise TensorError(f"{self.path}: there is no tensor {quoted(name)}")
        return entry


def _read_header(file: RandomAccessFile, size: int) -> tuple[dict[str, Any], bytes]:
    """(the parsed header, all bytes before the first data byte). size: of the whole file."""
    shown = str(file.path)
    if size < LENGTH_BYTES:
        raise TruncatedError(
            f"{shown}: too short for a safetensors file",
            expected=f"at least {LENGTH_BYTES} bytes",
            found=f"{size}",
        )
    start = file.read(0, LENGTH_BYTES)
    length = int.from_bytes(start, "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise FormatError(
            f"{shown}: header length",
            expected=f"2 to {MAX_HEADER_BYTES:,} bytes",
            found=f"{length:,}",
            fix="This is not a safetensors file, or it is damaged.",
        )
    if LENGTH_BYTES + length > size:
        raise TruncatedError(
            f"{shown}: the file ends inside its header",
            expected=f"at least {LENGTH_BYTES + length:,} bytes",
            found=f"{size:,}",
            fix="Download or copy it again.",
        )
    header = file.read(LENGTH_BYTES, length)
    if header[:1] != b"{":
        raise FormatError(f"{shown}: header", expected="'{' first", found=quoted(header[:1]))
    document = parse_object(
        header, f"{shown}: header", max_values=MAX_VALUES, max_objects=MAX_TENSORS + 2
    )
    return document, start + header


def _metadata(value: object, shown: str) -> dict[str, str]:
    if value is None:
        return {}
    values = expect(value, dict, f"{shown}: __metadata__")
    return {key: expect(text, str, f"{shown}: __metadata__") for key, text in values.items()}


def _validate(header: dict[str, Any], data_start: int, size: int, shown: str) -> dict[str, _Entry]:
    """Check every entry, then that together they cover the data exactly once. size: of the file."""
    entries = [_entry(name, value, data_start, shown) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.info.nbytes))
    end = data_start
    for entry in entries:
        if entry.begin != end:
            what = "overlaps another" if entry.begin < end else "leaves a hole before it"
            raise FormatError(
                f"{shown}: tensor {quoted(entry.info.name)} {what}",
                expected=f"data offset {end - data_start:,}",
                found=f"{entry.begin - data_start:,}",
            )
        end += entry.info.nbytes
    if end > size:
        raise TruncatedError(
            f"{shown}: the file ends early",
            expected=f"{end:,} bytes",
            found=f"{size:,}",
            fix="Download or copy it again.",
        )
    if end < size:
        raise FormatError(
            f"{shown}: bytes after the last tensor",
            expected=f"{end:,} bytes",
            found=f"{size:,}",
        )
    return {entry.info.name: entry for entry in entries}


def _entry(name: str, value: object, data_start: int, file_shown: str) -> _Entry:
    shown = f"{file_shown}: tensor {quoted(name)}"
    if not 0 < len(name) <= MAX_NAME_LENGTH or _BAD_NAME.search(name):
        raise FormatError(
            f"{shown}: name",
            expected=f"1 to {MAX_NAME_LENGTH} characters, no control character and no / or \\",
        )
    fields = expect(value, dict, shown)
    if fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(
            shown, expected="dtype, shape and data_offsets", found=quoted(", ".join(sorted(fields)))
        )
    dtype_name = required(fields, "dtype", str, shown)
    dtype = DTYPES.get(dtype_name)
    if dtype is None:
        error = UnsupportedError if dtype_name in _KNOWN_ELSEWHERE else FormatError
        raise error(
            f"{shown}: dtype", expected=f"one of {', '.join(DTYPES)}", found=quoted(dtype_name)
        )
    shape = _naturals(fields, "shape", shown)
    if len(shape) > MAX_RANK:
        raise FormatError(f"{shown}: rank", expected=f"at most {MAX_RANK}", found=f"{len(shape):,}")
    offsets = _naturals(fields, "data_offsets", shown)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(
            f"{shown}: data_offsets", expected="[begin, end], in order", found=quoted(list(offsets))
        )
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != offsets[1] - offsets[0]:
        raise FormatError(
            f"{shown}: data_offsets",
            expected=f"{nbytes:,} bytes for {dtype_name} {list(shape)}",
            found=f"{offsets[1] - offsets[0]:,}",
        )
    return _Entry(TensorInfo(name, dtype_name, shape, nbytes), data_start + offsets[0])


def _naturals(fields: Mapping[str, Any], key: str, shown: str) -> tuple[int, ...]:
    values = required(fields, key, list, shown)
    for value in values:
        if type(value) is not int or value < 0:
            raise FormatError(
                f"{shown}: {key}", expected="integers of at least 0", found=quoted(value)
            )
    return tuple(values)
