"""Files for the tests of reading: written byte by byte, so that every field can be wrong."""

import json
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from localr1.errors import LocalR1Error

SECONDS_FOR_AN_ERROR = 1.0
"""Of processor time, so that a busy machine fails nothing."""

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_PACK = {
    U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q",
    I64: "q", F64: "d",
}  # fmt: skip


@contextmanager
def refused(directory: Path, error: type[LocalR1Error], said: str = "") -> Iterator[None]:
    """The block must raise `error` quickly with `said` in its message, and change no file."""
    before = tree(directory)
    begin = time.process_time()
    with pytest.raises(error) as caught:
        yield
    assert time.process_time() - begin < SECONDS_FOR_AN_ERROR
    assert said in str(caught.value)
    assert tree(directory) == before


def tree(directory: Path) -> list[tuple[str, int, int]]:
    """Every file with its size and time of change."""
    return sorted(
        (str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in directory.rglob("*")
    )


def safetensors_bytes(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """header: an object for JSON, or the bytes themselves. length: what the first 8 bytes say."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: Sequence[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, content: Any) -> bytes:
    """A metadata value with its type. content of an ARRAY: (item type, list)."""
    return struct.pack("<I", kind) + bare_value(kind, content)


def bare_value(kind: int, content: Any) -> bytes:
    if kind == STRING:
        return string(content)
    if kind == ARRAY:
        item, values = content
        return struct.pack("<IQ", item, len(values)) + b"".join(
            bare_value(item, each) for each in values
        )
    return struct.pack("<" + _PACK[kind], content)


def tensor_info(name: str, dimensions: Sequence[int], type_id: int, offset: int) -> bytes:
    return (
        string(name)
        + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
        + struct.pack("<IQ", type_id, offset)
    )


TINY_KEYS: Mapping[str, bytes] = {
    "general.architecture": value(STRING, "llama"),
    "llama.block_count": value(U32, 1),
    "llama.context_length": value(U32, 128),
    "llama.embedding_length": value(U32, 8),
    "llama.feed_forward_length": value(U32, 8),
    "llama.attention.head_count": value(U32, 2),
    "llama.attention.head_count_kv": value(U32, 1),
    "llama.attention.layer_norm_rms_epsilon": value(F32, 1e-5),
    "tokenizer.ggml.model": value(STRING, "gpt2"),
    "tokenizer.ggml.pre": value(STRING, "gpt-2"),
    "tokenizer.ggml.tokens": value(ARRAY, (STRING, ["a", "b", "ab", "<end>"])),
    "tokenizer.ggml.token_type": value(ARRAY, (I32, [1, 1, 1, 3])),
    "tokenizer.ggml.merges": value(ARRAY, (STRING, ["a b"])),
    "tokenizer.ggml.eos_token_id": value(U32, 3),
}
TINY_TENSORS: Sequence[bytes] = (
    tensor_info("token_embd.weight", [8, 4], 0, 0),
    tensor_info("output_norm.weight", [8], 0, 128),
)
TINY_DATA = struct.pack("<40f", *range(40))


def gguf_bytes(
    keys: Mapping[str, bytes] | Sequence[tuple[str, bytes]] | None = None,
    tensors: Sequence[bytes] = TINY_TENSORS,
    data: bytes = TINY_DATA,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF file; by default a whole tiny one. keys: name -> `value(...)`."""
    if keys is None:
        keys = TINY_KEYS
    pairs = list(keys.items()) if isinstance(keys, Mapping) else list(keys)
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if num_tensors is None else num_tensors,
        len(pairs) if num_keys is None else num_keys,
    )
    head += b"".join(string(name) + raw for name, raw in pairs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def with_keys(**changes: bytes | None) -> dict[str, bytes]:
    """The tiny keys changed; "__" stands for ".", None removes."""
    keys = dict(TINY_KEYS)
    for name, raw in changes.items():
        key = name.replace("__", ".")
        if raw is None:
            keys.pop(key, None)
        else:
            keys[key] = raw
    return keys
