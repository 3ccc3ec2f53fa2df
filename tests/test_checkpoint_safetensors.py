"""One safetensors file: every dtype as the library writes it, every fault of its header refused."""

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import entry, refused, safetensors_bytes
from safetensors.torch import load_file, save_file

from localr1.checkpoint.files import RandomAccessFile
from localr1.checkpoint.safetensors_file import (
    DTYPES,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    SafetensorsFile,
)
from localr1.errors import (
    CheckpointError,
    FormatError,
    LocalR1Error,
    MemoryLimitError,
    TensorError,
    TruncatedError,
    UnsupportedError,
)

SHAPES = [(3, 5), (7,), (), (2, 0, 3), (1, 2, 3, 4)]


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random bytes as values: every bit pattern must come back, NaN too."""
    generator = torch.Generator().manual_seed(seed)
    limit = 2 if dtype == torch.bool else 256
    count = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, limit, (count,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def raw_bytes(tensor: torch.Tensor) -> list[int]:
    values: list[int] = tensor.contiguous().reshape(-1).view(torch.uint8).tolist()
    return values


@pytest.mark.parametrize("dtype_name", DTYPES)
def test_every_dtype_equals_the_library(dtype_name: str, tmp_path: Path) -> None:
    dtype = DTYPES[dtype_name]
    path = tmp_path / "a.safetensors"
    tensors = {f"t{n}": random_tensor(dtype, shape, n) for n, shape in enumerate(SHAPES)}
    save_file(tensors, path, metadata={"format": "pt"})
    loaded = load_file(path)
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "pt"}
    assert file.tensors.keys() == loaded.keys()
    for name, expected in loaded.items():
        found = file.read(name)
        assert found.dtype == expected.dtype == dtype
        assert found.shape == expected.shape == file.tensors[name].shape
        assert found.is_contiguous()
        assert raw_bytes(found) == raw_bytes(expected)
        assert file.tensors[name].dtype == dtype_name
    file.close()


def test_a_read_tensor_belongs_to_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4)}, path)
    file = SafetensorsFile(path)
    file.read("a").zero_()
    assert file.read("a").tolist() == [1, 1, 1, 1]
    file.close()


def test_only_the_bytes_asked_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_file({name: torch.ones(1000) for name in "abc"}, path)
    reads: list[tuple[int, int]] = []
    read_into = RandomAccessFile.read_into

    def watched(self: RandomAccessFile, offset: int, buffer: memoryview) -> None:
        reads.append((offset, len(buffer)))
        read_into(self, offset, buffer)

    monkeypatch.setattr(RandomAccessFile, "read_into", watched)
    file = SafetensorsFile(path)
    header_bytes = path.stat().st_size - 3 * 4000 - 8
    assert reads == [(0, 8), (8, header_bytes)]
    file.read("b")
    assert reads[2:] == [(8 + header_bytes + 4000, 4000)]
    file.close()


GOOD = {"a": entry("F32", [2], 0, 8), "b": entry("I32", [1, 1], 8, 12)}
DATA = bytes(12)


def changed(name: str, **fields: Any) -> bytes:
    header: dict[str, Any] = {**GOOD, name: {**GOOD[name], **fields}}
    return safetensors_bytes(header, DATA)


def header_of(**tensors: Any) -> bytes:
    return safetensors_bytes(tensors, DATA)


BAD_FILES: dict[str, tuple[bytes | Callable[[], bytes], type[LocalR1Error], str]] = {
    "empty": (b"", TruncatedError, "at least 8 bytes"),
    "seven bytes": (b"1234567", TruncatedError, "at least 8 bytes"),
    "length 0": (safetensors_bytes(b"", b"12345678"), FormatError, "header length"),
    "length 1": (safetensors_bytes(GOOD, DATA, length=1), FormatError, "header length"),
    "length 7": (safetensors_bytes(GOOD, DATA, length=7), FormatError, "not valid JSON"),
    "length 2^63": (safetensors_bytes(GOOD, DATA, length=1 << 63), FormatError, "header length"),
    "length over the cap": (
        safetensors_bytes(GOOD, DATA, length=MAX_HEADER_BYTES + 1),
        FormatError,
        "header length",
    ),
    "length beyond the file": (
        safetensors_bytes(GOOD, DATA, length=10_000),
        TruncatedError,
        "inside its header",
    ),
    "length into the data": (
        safetensors_bytes(GOOD, DATA, length=len(json.dumps(GOOD)) + 4),
        FormatError,
        "not valid JSON",
    ),
    "not an object": (safetensors_bytes(b"[]", DATA), FormatError, "'{' first"),
    "a space first": (safetensors_bytes(b" {}", b""), FormatError, "'{' first"),
    "not UTF-8": (safetensors_bytes(b'{"\xff": 1}'), FormatError, "UTF-8"),
    "lone surrogate": (safetensors_bytes(b'{"\\ud800": 1}'), FormatError, "surrogate"),
    "depth 10^5": (safetensors_bytes(b'{"a":' + b"[" * 100_000), FormatError, "deeply"),
    "not JSON": (safetensors_bytes(b"{a}"), FormatError, "not valid JSON"),
    "duplicate key": (
        safetensors_bytes(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"x",
        ),
        FormatError,
        "appears twice",
    ),
    "too many tensors": (
        lambda: safetensors_bytes(
            b"{"
            + b",".join(
                b'"%x":{"dtype":"U8","shape":[],"data_offsets":[0,0]}' % n
                for n in range(MAX_TENSORS + 2)
            )
            + b"}"
        ),
        FormatError,
        "too many objects",
    ),
    "a tensor that is a list": (header_of(a=[]), FormatError, "an object"),
    "no dtype": (header_of(a={"shape": [1], "data_offsets": [0, 4]}), FormatError, "dtype"),
    "another field": (changed("a", more=1), FormatError, "more"),
    "unknown dtype": (changed("a", dtype="F12"), FormatError, "'F12'"),
    "a dtype of other readers": (changed("a", dtype="F4"), UnsupportedError, "'F4'"),
    "dtype of a number": (changed("a", dtype=1), FormatError, "a string"),
    "shape of a string": (changed("a", shape="2"), FormatError, "a list"),
    "negative shape": (changed("a", shape=[-2]), FormatError, "at least 0"),
    "float shape": (changed("a", shape=[2.0]), FormatError, "at least 0"),
    "shape of true": (changed("a", shape=[True, 2]), FormatError, "at least 0"),
    "shape too small": (changed("a", shape=[1]), FormatError, "expected 4 bytes"),
    "2^62 x 4": (changed("a", shape=[1 << 62, 4]), FormatError, "73,786,976,294,838,206,464"),
    "2^62 x 4 x 0": (changed("a", shape=[1 << 62, 4, 0]), FormatError, "expected 0 bytes"),
    "rank 10^4": (changed("a", shape=[1] * 10_000), FormatError, "rank"),
    "one offset": (changed("a", data_offsets=[0]), FormatError, "[begin, end]"),
    "three offsets": (changed("a", data_offsets=[0, 8, 9]), FormatError, "[begin, end]"),
    "reversed offsets": (changed("a", data_offsets=[8, 0]), FormatError, "in order"),
    "negative offsets": (changed("a", data_offsets=[-8, 0]), FormatError, "at least 0"),
    "float offsets": (changed("a", data_offsets=[0.0, 8.0]), FormatError, "at least 0"),
    "overlap": (changed("b", data_offsets=[4, 8]), FormatError, "overlaps"),
    "same place": (changed("b", data_offsets=[0, 4]), FormatError, "overlaps"),
    "hole": (changed("b", data_offsets=[12, 16]), FormatError, "a hole"),
    "hole at the start": (
        safetensors_bytes({"a": entry("U8", [4], 8, 12)}, DATA),
        FormatError,
        "a hole",
    ),
    "trailing bytes": (safetensors_bytes(GOOD, DATA + b"x"), FormatError, "after the last"),
    "data but no tensors": (safetensors_bytes({}, DATA), FormatError, "after the last"),
    "data cut": (safetensors_bytes(GOOD, DATA[:-1]), TruncatedError, "ends early"),
    "data missing": (safetensors_bytes(GOOD), TruncatedError, "ends early"),
    "metadata of numbers": (header_of(__metadata__={"a": 1}), FormatError, "__metadata__"),
    "metadata of a list": (header_of(__metadata__=[]), FormatError, "__metadata__"),
    "NUL in a name": (header_of(**{"a\0b": GOOD["a"]}), FormatError, "name"),
    "../ in a name": (header_of(**{"../a": GOOD["a"]}), FormatError, "name"),
    "escape in a name": (header_of(**{"\x1b[31m": GOOD["a"]}), FormatError, "name"),
    "empty name": (header_of(**{"": GOOD["a"]}), FormatError, "name"),
    "long name": (header_of(**{"a" * 2000: GOOD["a"]}), FormatError, "name"),
    "huge integer": (
        safetensors_bytes(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b"]}}"),
        FormatError,
        "5,000 characters",
    ),
    "NaN as a shape": (safetensors_bytes(b'{"a":{"shape":[NaN]}}'), FormatError, "NaN"),
    "a GGUF file": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), FormatError, "header length"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused(name: str, tmp_path: Path) -> None:
    content, error, said = BAD_FILES[name]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content if isinstance(content, bytes) else content())
    with refused(tmp_path, error, said):
        SafetensorsFile(path)


def test_the_good_file_of_these_tests_is_good(tmp_path: Path) -> None:
    """Else every test above could pass for a reason of its own."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes(GOOD, DATA))
    assert SafetensorsFile(path).read("b").tolist() == [[0]]
    assert load_file(path)["b"].tolist() == [[0]]
    # A header may be padded with spaces, as our own files are.
    path.write_bytes(safetensors_bytes(json.dumps(GOOD).encode() + b" " * 100, DATA))
    assert SafetensorsFile(path).read("a").tolist() == [0, 0]


def test_bool_bytes_are_zero_or_one(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes({"a": entry("BOOL", [2], 0, 2)}, b"\1\2"))
    file = SafetensorsFile(path)
    with refused(tmp_path, FormatError, "0 or 1"):
        file.read("a")


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes(GOOD, DATA))
    with refused(tmp_path, TensorError, "'c'"):
        SafetensorsFile(path).read("c")


def test_a_file_cut_while_open_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(100_000)}, path)
    file = SafetensorsFile(path)
    size = path.stat().st_size
    with path.open("r+b") as handle:
        handle.truncate(size - 1)
    with pytest.raises(TruncatedError, match=f"expected {size:,} bytes, found {size - 1:,}"):
        file.read("a")
    file.close()


def test_every_one_of_a_thousand_cuts_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({f"layer.{n}.weight": torch.ones(9, n + 1) for n in range(20)}, path)
    content = path.read_bytes()
    step = len(content) / 1000
    for cut in sorted({int(n * step) for n in range(1000)}):
        path.write_bytes(content[:cut])
        with pytest.raises((TruncatedError, FormatError)):
            SafetensorsFile(path)


def test_no_memory_for_a_tensor_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes(GOOD, DATA))
    file = SafetensorsFile(path)

    def fail(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(torch, "empty", fail)
    with refused(tmp_path, MemoryLimitError, "8 bytes"):
        file.read("a")


def test_an_unreadable_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    def fail(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "a.safetensors"
    path.write_bytes(b"")
    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(CheckpointError, match="Permission denied"):
        SafetensorsFile(path)


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_by_their_beginning(name: str, tmp_path: Path) -> None:
    """All that is wrong with a header, or with the size it implies, is seen without the tensors."""
    content, error, said = BAD_FILES[name]
    content = content if isinstance(content, bytes) else content()
    path = tmp_path / "a.safetensors"
    path.write_bytes(content[: 8 + int.from_bytes(content[:8], "little")])
    with refused(tmp_path, error, said):
        SafetensorsFile(path, len(content))
