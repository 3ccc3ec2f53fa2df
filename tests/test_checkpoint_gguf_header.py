"""The header of a GGUF file: every fault refused by type, quickly, before anything is allocated."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_files import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    TINY_DATA,
    TINY_KEYS,
    TINY_TENSORS,
    U8,
    U32,
    U64,
    gguf_bytes,
    refused,
    string,
    tensor_info,
    value,
    with_keys,
)

from localr1.checkpoint.gguf_file import GgufFile
from localr1.checkpoint.gguf_header import (
    MAX_ELEMENTS,
    MAX_HEADER_BYTES,
    MAX_KEYS,
    MAX_STRINGS,
    MAX_TENSORS,
)
from localr1.checkpoint.reader import open_checkpoint
from localr1.errors import (
    ConfigError,
    FormatError,
    LocalR1Error,
    TensorError,
    TruncatedError,
    UnsupportedError,
)

EMBEDDING, NORM = TINY_TENSORS
Q4_0, Q8_1, IQ4_NL_4_4 = 2, 9, 36


def test_the_good_file_of_these_tests_is_good(tmp_path: Path) -> None:
    """Else every test below could pass for a reason of its own."""
    path = tmp_path / "a.gguf"
    for version in (2, 3):
        path.write_bytes(gguf_bytes(version=version))
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.read("model.norm.weight").tolist() == list(range(32, 40))
            assert checkpoint.read("model.embed_tokens.weight").shape == (4, 8)
            assert checkpoint.config["hidden_size"] == 8
            assert checkpoint.tokenizer_files().eos_token_ids == (3,)
    path.write_bytes(gguf_bytes(with_keys(general__alignment=value(U32, 64)), alignment=64))
    open_checkpoint(path).close()
    path.write_bytes(gguf_bytes(with_keys(general__tags=value(ARRAY, (STRING, [])))))
    open_checkpoint(path).close()


def array_head(item: int, count: int) -> bytes:
    """An array that says how long it is and then ends."""
    return struct.pack("<IIQ", ARRAY, item, count)


def nested(depth: int) -> bytes:
    return (
        struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", 0, 0)
    )


def keys(**changes: bytes | None) -> bytes:
    return gguf_bytes(with_keys(**changes))


def tensors(*infos: bytes) -> bytes:
    return gguf_bytes(tensors=infos)


BAD_HEADERS: dict[str, tuple[bytes | Callable[[], bytes], type[LocalR1Error], str]] = {
    "empty": (b"", TruncatedError, "magic"),
    "three bytes": (b"GGU", TruncatedError, "magic"),
    "magic": (gguf_bytes(magic=b"GGML"), FormatError, "is not a GGUF file"),
    "a safetensors file": (struct.pack("<Q", 2) + b"{}", FormatError, "is not a GGUF file"),
    "version 1": (gguf_bytes(version=1), UnsupportedError, "found 1"),
    "version 4": (gguf_bytes(version=4), UnsupportedError, "found 4"),
    "version 2^32-1": (gguf_bytes(version=(1 << 32) - 1), UnsupportedError, "4294967295"),
    "big-endian": (gguf_bytes(version=3 << 24), UnsupportedError, "big-endian"),
    "tensors 2^63": (gguf_bytes(num_tensors=1 << 63), FormatError, "too many tensors"),
    "tensors over the cap": (gguf_bytes(num_tensors=MAX_TENSORS + 1), FormatError, "too many"),
    "tensors over the file": (gguf_bytes(num_tensors=MAX_TENSORS), FormatError, ""),
    "keys 2^63": (gguf_bytes(num_keys=1 << 63), FormatError, "too many metadata keys"),
    "keys over the cap": (gguf_bytes(num_keys=MAX_KEYS + 1), FormatError, "too many"),
    "keys over the file": (gguf_bytes(num_keys=MAX_KEYS), LocalR1Error, ""),
    "no keys": (gguf_bytes({}), FormatError, "general.architecture is missing"),
    "key length 2^63": (
        gguf_bytes([], num_keys=1, tensors=[struct.pack("<Q", 1 << 63)], num_tensors=0),
        FormatError,
        "string too long",
    ),
    "value length 2^63": (
        keys(general__name=struct.pack("<IQ", STRING, 1 << 63)),
        FormatError,
        "string too long",
    ),
    "value length beyond the file": (
        keys(general__name=struct.pack("<IQ", STRING, 1 << 20)),
        TruncatedError,
        "'general.name'",
    ),
    "key not UTF-8": (
        gguf_bytes([], num_keys=1, tensors=[string(b"\xff") + value(U8, 0)], num_tensors=0),
        FormatError,
        "UTF-8",
    ),
    "value not UTF-8": (keys(general__name=value(STRING, b"\xed\xa0\x80")), FormatError, "UTF-8"),
    "value type 13": (keys(general__name=struct.pack("<I", 13)), FormatError, "value type"),
    "value type 2^32-1": (keys(x=struct.pack("<I", (1 << 32) - 1)), FormatError, "value type"),
    "array type 13": (keys(x=array_head(13, 1)), FormatError, "value type"),
    "bool 2": (keys(x=struct.pack("<IB", BOOL, 2)), FormatError, "0 or 1"),
    "bool 2 in an array": (keys(x=value(ARRAY, (BOOL, [1, 2]))), FormatError, "0 or 1"),
    "array of arrays": (keys(x=nested(1)), UnsupportedError, "an array of arrays"),
    "arrays 10^5 deep": (keys(x=nested(100_000)), UnsupportedError, "an array of arrays"),
    "2^40 bytes in an array": (keys(x=array_head(U8, 1 << 40)), TruncatedError, "'x'"),
    "2^63 numbers": (keys(x=array_head(U64, 1 << 63)), TruncatedError, "'x'"),
    "2^63 strings": (keys(x=array_head(STRING, 1 << 63)), FormatError, "too many strings"),
    "strings over the file": (keys(x=array_head(STRING, 100_000)), TruncatedError, "'x'"),
    "too many strings": (
        lambda: keys(
            **{
                f"x{n}": array_head(STRING, MAX_STRINGS // 2) + bytes(4 * MAX_STRINGS) for n in "12"
            },
            x3=value(ARRAY, (STRING, [""])),
        ),
        FormatError,
        "too many strings",
    ),
    "a header over the cap": (
        lambda: keys(x=array_head(U8, MAX_HEADER_BYTES) + bytes(MAX_HEADER_BYTES)),
        FormatError,
        "header too large",
    ),
    "duplicate key": (
        gguf_bytes([*TINY_KEYS.items(), ("llama.block_count", value(U32, 2))]),
        FormatError,
        "'llama.block_count' appears twice",
    ),
    "alignment 0": (keys(general__alignment=value(U32, 0)), FormatError, "a power of two"),
    "alignment 13": (keys(general__alignment=value(U32, 13)), FormatError, "a power of two"),
    "alignment 2^31": (keys(general__alignment=value(U32, 1 << 31)), FormatError, "a power of two"),
    "alignment of text": (keys(general__alignment=value(STRING, "32")), FormatError, "an integer"),
    "alignment true": (keys(general__alignment=value(BOOL, 1)), FormatError, "an integer"),
    "another alignment than the file's": (
        keys(general__alignment=value(U32, 256)),
        FormatError,
        "expected data offset 256, found 128",
    ),
    "0 dimensions": (
        tensors(tensor_info("token_embd.weight", [], 0, 0)),
        FormatError,
        "dimensions",
    ),
    "5 dimensions": (tensors(tensor_info("a", [1] * 5, 0, 0)), FormatError, "found 5"),
    "n_dims 2^32-1": (
        tensors(string("a") + struct.pack("<I", (1 << 32) - 1)),
        FormatError,
        "4,294,967,295",
    ),
    "dimension 0": (tensors(tensor_info("a", [8, 0], 0, 0)), FormatError, "[8, 0]"),
    "dimension 2^62": (tensors(tensor_info("a", [1 << 62], 0, 0)), FormatError, "shape"),
    "dimensions that overflow": (
        tensors(tensor_info("a", [1 << 32, 1 << 32, 1 << 32], 0, 0)),
        FormatError,
        f"1 to {MAX_ELEMENTS:,}",
    ),
    "tensor type 999": (tensors(tensor_info("a", [8], 999, 0)), UnsupportedError, "number 999"),
    "a type that was removed": (
        tensors(tensor_info("a", [8], IQ4_NL_4_4, 0)),
        UnsupportedError,
        "number 36",
    ),
    "a type nobody dequantizes": (
        gguf_bytes(tensors=[tensor_info("token_embd.weight", [32, 4], Q8_1, 0)], data=bytes(160)),
        UnsupportedError,
        "Q8_1",
    ),
    "half a block": (tensors(tensor_info("a", [8, 4], Q4_0, 0)), FormatError, "a multiple of 32"),
    "tensor name of 10^4": (tensors(tensor_info("a" * 10_000, [8], 0, 0)), FormatError, "too long"),
    "duplicate name": (tensors(EMBEDDING, EMBEDDING), FormatError, "appears twice"),
    "offset past the end": (
        tensors(EMBEDDING, tensor_info("output_norm.weight", [8], 0, 1 << 40)),
        FormatError,
        "out of place",
    ),
    "offset 2^64-32": (
        tensors(EMBEDDING, tensor_info("output_norm.weight", [8], 0, (1 << 64) - 32)),
        FormatError,
        "out of place",
    ),
    "offset not aligned": (
        tensors(EMBEDDING, tensor_info("output_norm.weight", [8], 0, 129)),
        FormatError,
        "out of place",
    ),
    "overlap": (
        tensors(EMBEDDING, tensor_info("output_norm.weight", [8], 0, 96)),
        FormatError,
        "overlaps",
    ),
    "reversed offsets": (
        tensors(
            tensor_info("token_embd.weight", [8, 4], 0, 32),
            tensor_info("output_norm.weight", [8], 0, 0),
        ),
        FormatError,
        "out of place",
    ),
    "data cut": (gguf_bytes(data=TINY_DATA[:-1]), TruncatedError, "ends early"),
    "no data": (gguf_bytes(data=b""), TruncatedError, "ends early"),
    "trailing bytes": (gguf_bytes(data=TINY_DATA + bytes(64)), FormatError, "after the last"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_headers_are_refused(name: str, tmp_path: Path) -> None:
    content, error, said = BAD_HEADERS[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(content if isinstance(content, bytes) else content())
    with refused(tmp_path, error, said):
        open_checkpoint(path)


BAD_CONFIGS: dict[str, tuple[bytes, type[LocalR1Error], str]] = {
    "unknown architecture": (
        keys(general__architecture=value(STRING, "gemma3")),
        UnsupportedError,
        "'gemma3'",
    ),
    "architecture of a number": (
        keys(general__architecture=value(U32, 1)),
        FormatError,
        "a string, found an integer 1",
    ),
    "no layers": (keys(llama__block_count=None), FormatError, "llama.block_count is missing"),
    "layers 0": (keys(llama__block_count=value(U32, 0)), ConfigError, "found 0"),
    "layers -1": (keys(llama__block_count=value(I32, -1)), ConfigError, "found -1"),
    "layers 10^9": (keys(llama__block_count=value(U32, 10**9)), ConfigError, "1,000,000,000"),
    "layers true": (keys(llama__block_count=value(BOOL, 1)), FormatError, "an integer"),
    "layers of text": (keys(llama__block_count=value(STRING, "1")), FormatError, "an integer"),
    "heads 0": (keys(llama__attention__head_count=value(U32, 0)), ConfigError, "head_count"),
    "heads by layer": (
        keys(llama__attention__head_count=value(ARRAY, (I32, [2, 4]))),
        FormatError,
        "the same value for every layer",
    ),
    "hidden not by heads": (
        keys(llama__attention__head_count=value(U32, 3)),
        ConfigError,
        "a multiple of 3 heads",
    ),
    "NaN epsilon": (
        keys(llama__attention__layer_norm_rms_epsilon=value(F32, float("nan"))),
        FormatError,
        "a finite number",
    ),
    "rope base 0": (keys(llama__rope__freq_base=value(F32, 0.0)), ConfigError, "above 0"),
    "rope base Inf": (keys(llama__rope__freq_base=value(F32, float("inf"))), FormatError, "finite"),
    "part of a head turns": (
        keys(llama__rope__dimension_count=value(U32, 2)),
        UnsupportedError,
        "rope.dimension_count",
    ),
    "values of another length": (
        keys(llama__attention__value_length=value(U32, 8)),
        UnsupportedError,
        "attention.value_length",
    ),
    "longrope": (
        keys(llama__rope__scaling__type=value(STRING, "longrope")),
        UnsupportedError,
        "'longrope'",
    ),
    "linear without factor": (
        keys(llama__rope__scaling__type=value(STRING, "linear")),
        FormatError,
        "is missing",
    ),
    "experts": (keys(llama__expert_count=value(U32, 8)), UnsupportedError, "expert_count"),
    "an unknown key": (keys(llama__logit_scale=value(F32, 0.5)), UnsupportedError, "logit_scale"),
    "vocabulary of another size": (
        keys(llama__vocab_size=value(U32, 5)),
        ConfigError,
        "expected 4, the rows of token_embd.weight",
    ),
    "an unknown tensor": (
        tensors(EMBEDDING, tensor_info("blk.0.attn_sinks.weight", [8], 0, 128)),
        UnsupportedError,
        "'blk.0.attn_sinks.weight'",
    ),
    "a layer too many": (
        tensors(EMBEDDING, tensor_info("blk.1.attn_norm.weight", [8], 0, 128)),
        TensorError,
        "found layer 1",
    ),
    "no embedding": (
        gguf_bytes(tensors=[tensor_info("output_norm.weight", [8], 0, 0)], data=bytes(32)),
        TensorError,
        "token_embd.weight",
    ),
    "one part of several": (keys(split__count=value(U32, 3)), FormatError, "one of 3 parts"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configs_are_refused(name: str, tmp_path: Path) -> None:
    content, error, said = BAD_CONFIGS[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with refused(tmp_path, error, said):
        open_checkpoint(path)


def test_a_cut_file_opens_for_its_header_only(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    whole = gguf_bytes()
    path.write_bytes(whole[:-40])
    with refused(tmp_path, TruncatedError, f"expected {len(whole):,} bytes, found"):
        open_checkpoint(path)
    with GgufFile.open(path, allow_truncated=True) as file:
        assert file.is_truncated
        assert file.config["vocab_size"] == 4
        assert file.tokenizer_files().eos_token == "<end>"
        assert file.tensors["model.norm.weight"].shape == (8,)
        with refused(tmp_path, TruncatedError, f"expected {len(whole):,} bytes"):
            file.read("model.norm.weight")
    path.write_bytes(whole[:100])
    with refused(tmp_path, TruncatedError, "inside its header"):
        GgufFile.open(path, allow_truncated=True)


def test_a_file_cut_while_open_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes())
    with open_checkpoint(path) as checkpoint:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(TruncatedError):
            checkpoint.read("model.norm.weight")


def test_every_cut_is_an_error(tmp_path: Path) -> None:
    """At each of its bytes (about a thousand)."""
    path = tmp_path / "a.gguf"
    whole = gguf_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(TruncatedError):
            open_checkpoint(path)


def test_the_cut_r1_distill(r1_header_gguf: Path) -> None:
    """The real file: its tensors are cut off, and the message says how many bytes are missing."""
    with pytest.raises(TruncatedError, match="expected 4,683,073,248 bytes, found 99,614,720"):
        open_checkpoint(r1_header_gguf)
    with GgufFile.open(r1_header_gguf, allow_truncated=True) as file:
        assert file.config["architectures"] == ["Qwen2ForCausalLM"]
        assert file.config["vocab_size"] == 152_064
        assert file.config["num_hidden_layers"] == 28
        assert file.config["tie_word_embeddings"] is False
        assert "model.layers.27.self_attn.q_proj.bias" in file.tensors
        with pytest.raises(TruncatedError):
            file.read("lm_head.weight")
