"""Tokenizers rebuilt from GGUF metadata give the ids that llama.cpp gives from the same file.

The ids in data/llama_cpp_token_ids.json were recorded from llama.cpp itself: of the two real files,
of SmolLM2's vocabulary cut as other models cut their text, and of the SentencePiece vocabulary
below.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U32,
    gguf_bytes,
    refused,
    value,
    with_keys,
)
from tokenizers import Tokenizer

from localr1.checkpoint.api import TokenizerFiles
from localr1.checkpoint.files import RandomAccessFile
from localr1.checkpoint.gguf_file import GgufFile
from localr1.checkpoint.gguf_header import read_header
from localr1.checkpoint.gguf_metadata import Metadata
from localr1.checkpoint.gguf_pretokenizers import PRE_TOKENIZERS
from localr1.checkpoint.gguf_tokenizer import build_tokenizer_files
from localr1.checkpoint.reader import open_checkpoint
from localr1.errors import FormatError, LocalR1Error, TokenizerError, UnsupportedError

FACTS = json.loads(
    (Path(__file__).parent / "data" / "llama_cpp_token_ids.json").read_text(encoding="utf-8")
)
DECOMPOSED = "e\u0301"
"""The one text that differs on purpose where a model's own tokenizer.json normalizes to NFC (Qwen's
do): llama.cpp does not normalize."""
TEXTS: list[str] = FACTS["texts"]


def tokenizer(files: TokenizerFiles) -> Tokenizer:
    return Tokenizer.from_str(files.tokenizer_json)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    result: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return result


def check(tokenizer: Tokenizer, fact: str, *, nfc: bool = False) -> None:
    for text, expected in zip(TEXTS, FACTS["ids"][fact], strict=True):
        if nfc and text == DECOMPOSED:
            assert ids(tokenizer, text) == ids(tokenizer, "é")
        else:
            assert ids(tokenizer, text) == expected, text


def round_trips(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        decoded = tokenizer.decode(ids(tokenizer, text), skip_special_tokens=False)
        assert decoded in (text, text.replace(DECOMPOSED, "é"))


def test_smollm2(smollm2_gguf: Path) -> None:
    with open_checkpoint(smollm2_gguf) as checkpoint:
        files = checkpoint.tokenizer_files()
    assert (files.bos_token, files.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert files.pad_token == "<|im_end|>"
    assert files.eos_token_ids == (2,)
    assert not files.add_bos
    assert files.chat_template is not None
    assert "You are a helpful AI assistant named SmolLM" in files.chat_template
    check(tokenizer(files), "smollm2")
    round_trips(tokenizer(files))


def test_r1_distill(r1_header_gguf: Path) -> None:
    with GgufFile.open(r1_header_gguf, allow_truncated=True) as file:
        files = file.tokenizer_files()
    assert files.bos_token == "<｜begin▁of▁sentence｜>"
    assert files.eos_token == "<｜end▁of▁sentence｜>"
    assert files.eos_token_ids == (151643,)
    assert files.add_bos
    assert files.chat_template is not None
    assert "<｜Assistant｜>" in files.chat_template
    loaded = tokenizer(files)
    assert loaded.token_to_id("<think>") == 151648
    assert loaded.token_to_id("</think>") == 151649
    turn = "<｜User｜>hi<｜Assistant｜><think>\n"
    assert ids(loaded, turn) == [151644, 6023, 151645, 151648, 198]
    check(loaded, "r1-distill-qwen", nfc=True)
    round_trips(loaded)


def metadata_of(path: Path, **changes: Any) -> Metadata:
    file = RandomAccessFile(path)
    try:
        metadata = read_header(file, allow_truncated=True).metadata
    finally:
        file.close()
    metadata._values.update(changes)
    return metadata


CUTS = sorted(set(PRE_TOKENIZERS) - {"llama3", "llama-v3"})


@pytest.mark.parametrize("pre", CUTS)
def test_every_way_to_cut_text(pre: str, smollm2_gguf: Path) -> None:
    """The same vocabulary cut by each model's rule, user text holding no special token."""
    metadata = metadata_of(smollm2_gguf, **{"tokenizer.ggml.pre": pre})
    loaded = tokenizer(build_tokenizer_files(metadata))
    loaded.encode_special_tokens = True
    check(loaded, f"smollm2 cut as {pre}", nfc=PRE_TOKENIZERS[pre].nfc)


def test_the_ways_differ() -> None:
    """Else the facts above could not tell one rule from another."""
    recorded = [json.dumps(FACTS["ids"][f"smollm2 cut as {pre}"]) for pre in CUTS]
    # With SmolLM2's vocabulary, which has no token of two digits, some rules cannot differ.
    assert len(set(recorded)) >= 6


CORPUS = (
    "the then hello world, this is a small test of the pieces that a model has learned; "
    "hello there 123 aaa aaaa été über"
)


def sentencepiece(**changes: bytes | None) -> bytes:
    """A GGUF file with a SentencePiece vocabulary: bytes, pieces of CORPUS by how much of it they
    are, characters, and one user-defined token."""
    words = ["\u2581" + word for word in CORPUS.split(" ")]
    counts = Counter(
        word[begin:end]
        for word in words
        for begin in range(len(word))
        for end in range(begin + 2, min(begin + 7, len(word) + 1))
    )
    pieces = sorted(
        (piece for piece, count in counts.items() if count > 1 or len(piece) == 2),
        key=lambda piece: (-counts[piece] * len(piece), piece),
    )
    pieces += sorted(set("".join(words)))
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *pieces, "<tool>"]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))] + [-1000.0]
    keys: dict[str, bytes | None] = {
        "tokenizer__ggml__model": value(STRING, "llama"),
        "tokenizer__ggml__pre": None,
        "tokenizer__ggml__merges": None,
        "tokenizer__ggml__tokens": value(ARRAY, (STRING, tokens)),
        "tokenizer__ggml__token_type": value(ARRAY, (I32, types)),
        "tokenizer__ggml__scores": value(ARRAY, (F32, scores)),
        "tokenizer__ggml__unknown_token_id": value(U32, 0),
        "tokenizer__ggml__bos_token_id": value(U32, 1),
        "tokenizer__ggml__eos_token_id": value(U32, 2),
    }
    return gguf_bytes(with_keys(**{**keys, **changes}))


def files_of(path: Path, content: bytes) -> TokenizerFiles:
    path.write_bytes(content)
    with open_checkpoint(path) as checkpoint:
        return checkpoint.tokenizer_files()


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    changes = {} if prefix else {"tokenizer__ggml__add_space_prefix": value(BOOL, 0)}
    files = files_of(tmp_path / "a.gguf", sentencepiece(**changes))
    assert (files.bos_token, files.eos_token, files.add_bos) == ("<s>", "</s>", True)
    loaded = tokenizer(files)
    check(loaded, "sentencepiece" if prefix else "sentencepiece without prefix")
    for text in ("hello world", " the été 🚀", "a  b", "日本\n"):
        assert loaded.decode(ids(loaded, text)) == text


def test_merges_never_make_a_control_token(tmp_path: Path) -> None:
    """A piece that looks like a control token is not put together from a user's text."""
    files = files_of(tmp_path / "a.gguf", sentencepiece())
    loaded = tokenizer(files)
    loaded.encode_special_tokens = True
    assert not {0, 1, 2} & set(ids(loaded, "<s></s><unk> <s>"))
    spoiled = with_keys(
        tokenizer__ggml__tokens=value(ARRAY, (STRING, ["<", "end>", "ab", "<end>"])),
        tokenizer__ggml__merges=value(ARRAY, (STRING, ["< end>"])),
    )
    with pytest.raises(FormatError, match="ordinary tokens of the vocabulary, found '<end>'"):
        files_of(tmp_path / "b.gguf", gguf_bytes(spoiled))


def test_kinds_of_tokens(tmp_path: Path) -> None:
    """Control tokens are special, user-defined ones matched but not special, unused ones plain."""
    keys = with_keys(
        tokenizer__ggml__tokens=value(ARRAY, (STRING, ["a", "<think>", "[PAD0]", "<|im_end|>"])),
        tokenizer__ggml__token_type=value(ARRAY, (I32, [1, 4, 5, 3])),
        tokenizer__ggml__merges=value(ARRAY, (STRING, [])),
        tokenizer__ggml__eos_token_id=None,
        tokenizer__ggml__eot_token_id=value(U32, 1),
        tokenizer__ggml__bos_token_id=value(U32, 0),
        tokenizer__ggml__add_bos_token=value(BOOL, 1),
    )
    files = files_of(tmp_path / "a.gguf", gguf_bytes(keys))
    document = json.loads(files.tokenizer_json)
    added = {each["content"]: each["special"] for each in document["added_tokens"]}
    assert added == {"<think>": False, "<|im_end|>": True}
    assert files.eos_token is None
    assert files.eos_token_ids == (1, 3)  # The declared end of a turn, and the known one.
    assert files.add_bos
    assert files.chat_template is None


def test_who_adds_bos_when_the_file_is_silent(tmp_path: Path) -> None:
    for pre, adds in (("gpt-2", False), ("llama-bpe", True)):
        keys = with_keys(
            tokenizer__ggml__pre=value(STRING, pre), tokenizer__ggml__bos_token_id=value(U32, 3)
        )
        assert files_of(tmp_path / "a.gguf", gguf_bytes(keys)).add_bos is adds
    keys = with_keys(tokenizer__ggml__pre=value(STRING, "llama-bpe"))
    assert not files_of(tmp_path / "a.gguf", gguf_bytes(keys)).add_bos  # It has no bos.


def test_whole_pieces_go_before_merges_in_llama_3(tmp_path: Path) -> None:
    """A piece that is a token is taken as it is, although no merge leads to it."""
    for pre, expected in (("llama-bpe", ["abc"]), ("qwen2", ["ab", "c"])):
        keys = with_keys(
            tokenizer__ggml__tokens=value(ARRAY, (STRING, ["a", "b", "ab", "<end>", "c", "abc"])),
            tokenizer__ggml__token_type=None,
            tokenizer__ggml__pre=value(STRING, pre),
        )
        loaded = tokenizer(files_of(tmp_path / "a.gguf", gguf_bytes(keys)))
        assert loaded.encode("abc").tokens == expected


def keys(**changes: bytes | None) -> bytes:
    return gguf_bytes(with_keys(**{f"tokenizer__ggml__{k}": v for k, v in changes.items()}))


def strings(*values: str) -> bytes:
    return value(ARRAY, (STRING, values))


BAD_TOKENIZERS: dict[str, tuple[bytes, type[LocalR1Error], str]] = {
    "unknown model": (keys(model=value(STRING, "t5")), UnsupportedError, "'t5'"),
    "no model": (keys(model=None), FormatError, "tokenizer.ggml.model is missing"),
    "unknown cut": (keys(pre=value(STRING, "tekken")), UnsupportedError, "'tekken'"),
    "no cut": (keys(pre=None), UnsupportedError, "tokenizer.ggml.pre is missing"),
    "no tokens": (keys(tokens=None), FormatError, "tokens is missing"),
    "empty tokens": (keys(tokens=strings()), FormatError, "1 to"),
    "tokens of numbers": (keys(tokens=value(ARRAY, (U32, [1]))), FormatError, "array of strings"),
    "tokens of text": (keys(tokens=value(STRING, "a")), FormatError, "an array of strings"),
    "a token twice": (keys(tokens=strings("a", "b", "ab", "a")), FormatError, "'a' appears twice"),
    "a token of 2 MB": (keys(tokens=strings("a", "b", "ab", "x" * 2_000_000)), FormatError,
                        "one of 2,000,000"),
    "too few types": (keys(token_type=value(ARRAY, (I32, [1]))), FormatError, "4 values"),
    "types of text": (keys(token_type=strings("1")), FormatError, "an array of integers"),
    "types of floats": (keys(token_type=value(ARRAY, (F32, [1.0] * 4))), FormatError, "integers"),
    "no merges": (keys(merges=None), FormatError, "merges is missing"),
    "merge of one": (keys(merges=strings("ab")), FormatError, "a space between"),
    "merge of three": (keys(merges=strings("a b ab")), FormatError, "a space between"),
    "merge of nothing": (keys(merges=strings(" ab")), FormatError, "a space between"),
    "merge absent from the vocabulary": (keys(merges=strings("a c")), FormatError, "found 'c'"),
    "merge into nothing": (keys(merges=strings("b a")), FormatError, "found 'ba'"),
    "end beyond the vocabulary": (keys(eos_token_id=value(U32, 4)), TokenizerError, "below 4"),
    "end 2^32-1": (keys(eos_token_id=value(U32, 2**32 - 1)), TokenizerError, "4,294,967,295"),
    "end -1": (keys(bos_token_id=value(I32, -1)), TokenizerError, "found -1"),
    "end of text": (keys(eos_token_id=value(STRING, "3")), FormatError, "an integer"),
    "add_bos 1": (
        keys(add_bos_token=value(U32, 1), bos_token_id=value(U32, 0)), FormatError, "a bool"),
    "no scores": (sentencepiece(tokenizer__ggml__scores=None), FormatError, "scores is missing"),
    "too few scores": (
        sentencepiece(tokenizer__ggml__scores=value(ARRAY, (F32, [0.0]))), FormatError, "values"),
    "NaN score": (
        sentencepiece(tokenizer__ggml__scores=value(ARRAY, (F32, [float("nan")]))),
        FormatError, "finite numbers"),
    "no bytes": (
        sentencepiece(tokenizer__ggml__tokens=strings("<unk>", "a"),
                      tokenizer__ggml__token_type=None,
                      tokenizer__ggml__scores=value(ARRAY, (F32, [0.0, 0.0]))),
        FormatError, "each of the 256 bytes"),
    "a template of 2 MB": (
        gguf_bytes(with_keys(tokenizer__chat_template=value(STRING, "x" * 2_000_000))),
        FormatError, "tokenizer.chat_template"),
    "a template of numbers": (
        gguf_bytes(with_keys(tokenizer__chat_template=value(U32, 1))), FormatError, "a string"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TOKENIZERS)
def test_bad_tokenizers_are_refused(name: str, tmp_path: Path) -> None:
    content, error, said = BAD_TOKENIZERS[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with refused(tmp_path, error, said), open_checkpoint(path) as checkpoint:
        checkpoint.tokenizer_files()


def test_metadata_readers_refuse_other_types() -> None:
    metadata = Metadata("f.gguf", {"a": 1, "b": True, "c": np.ones(2, np.float32), "d": 0.5})
    assert metadata.numbers("c") == [1.0, 1.0]
    assert metadata.number("a") == 1.0
    assert len(metadata) == 4
    for read, key in (
        (metadata.boolean, "a"), (metadata.number, "b"), (metadata.integers, "c"),
        (metadata.integer, "d"), (metadata.strings, "c"), (metadata.string, "d"),
    ):  # fmt: skip
        with pytest.raises(FormatError, match=f"f.gguf: metadata {key}: expected"):
            read(key)
