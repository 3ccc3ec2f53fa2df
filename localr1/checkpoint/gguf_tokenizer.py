"""The tokenizer of a GGUF file, rebuilt as the text of a tokenizer.json (the `tokenizers` library).

Two models exist in the architectures read here: "gpt2", byte-level BPE with a list of merges, and
"llama", SentencePiece BPE, whose merges follow from the scores of the pieces.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from localr1.checkpoint.api import TokenizerFiles
from localr1.checkpoint.gguf_metadata import Metadata
from localr1.checkpoint.gguf_pretokenizers import PRE_TOKENIZERS, PreTokenizer
from localr1.checkpoint.paths import quoted
from localr1.errors import FormatError, TokenizerError, UnsupportedError

MAX_TOKENS = 1_000_000
MAX_TOKEN_LENGTH = 1024
MAX_TEMPLATE_LENGTH = 1 << 20
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
"""Token types of the format; 1 is normal, 5 unused."""
TURN_ENDS = frozenset({"<|im_end|>", "<|eot_id|>", "<|eom_id|>"})
"""Control tokens that end a turn wherever a vocabulary has them; files made from base models name
only the end of text."""
SPACE = "\u2581"
"""What SentencePiece writes for a space."""


@dataclass(frozen=True)
class _Vocabulary:
    tokens: list[str]
    types: list[int]
    ids: dict[str, int]

    def mergeable(self, token: str) -> bool:
        """Whether merging may produce it: else a user's text could become a control token."""
        index = self.ids.get(token)
        return index is not None and self.types[index] not in (UNKNOWN, CONTROL, BYTE)


def build_tokenizer_files(metadata: Metadata) -> TokenizerFiles:
    """Raises FormatError for missing or inconsistent lists, TokenizerError for ids outside the
    vocabulary, UnsupportedError for a model or pre-tokenizer that is not known."""
    vocabulary = _read_vocabulary(metadata)
    model = metadata.string("tokenizer.ggml.model")
    if model == "gpt2":
        pre_tokenizer = _pre_tokenizer(metadata)
        document = _byte_level(metadata, vocabulary, pre_tokenizer)
        add_bos = pre_tokenizer.adds_bos
    elif model == "llama":
        document = _sentencepiece(metadata, vocabulary)
        add_bos = True
    else:
        raise UnsupportedError(
            f"{metadata.shown}: tokenizer.ggml.model", expected="gpt2 or llama", found=quoted(model)
        )
    bos, eos, pad = (
        _special(metadata, vocabulary, f"tokenizer.ggml.{name}_token_id")
        for name in ("bos", "eos", "padding")
    )
    return TokenizerFiles(
        tokenizer_json=json.dumps(document, ensure_ascii=False),
        chat_template=_chat_template(metadata),
        bos_token=None if bos is None else vocabulary.tokens[bos],
        eos_token=None if eos is None else vocabulary.tokens[eos],
        pad_token=None if pad is None else vocabulary.tokens[pad],
        eos_token_ids=_turn_ends(metadata, vocabulary, eos),
        add_bos=bos is not None and metadata.boolean("tokenizer.ggml.add_bos_token", add_bos),
    )


def _read_vocabulary(metadata: Metadata) -> _Vocabulary:
    tokens = metadata.strings("tokenizer.ggml.tokens")
    if not 0 < len(tokens) <= MAX_TOKENS:
        raise FormatError(
            f"{metadata.shown}: tokenizer.ggml.tokens",
            expected=f"1 to {MAX_TOKENS:,}",
            found=f"{len(tokens):,}",
        )
    if (longest := max(map(len, tokens))) > MAX_TOKEN_LENGTH:
        raise FormatError(
            f"{metadata.shown}: tokenizer.ggml.tokens",
            expected=f"tokens of at most {MAX_TOKEN_LENGTH:,} characters",
            found=f"one of {longest:,}",
        )
    types = metadata.integers("tokenizer.ggml.token_type", [1] * len(tokens))
    if len(types) != len(tokens):
        raise FormatError(
            f"{metadata.shown}: tokenizer.ggml.token_type",
            expected=f"{len(tokens):,} values",
            found=f"{len(types):,}",
        )
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if ids[token] != index)
        raise FormatError(f"{metadata.shown}: the token {quoted(twice)} appears twice")
    return _Vocabulary(tokens, types, ids)


def _pre_tokenizer(metadata: Metadata) -> PreTokenizer:
    if "tokenizer.ggml.pre" not in metadata:
        raise UnsupportedError(
            f"{metadata.shown}: tokenizer.ggml.pre is missing",
            fix="Files from before May 2024 do not say how their text is cut; use a newer one.",
        )
    name = metadata.string("tokenizer.ggml.pre")
    if name not in PRE_TOKENIZERS:
        raise UnsupportedError(
            f"{metadata.shown}: tokenizer.ggml.pre",
            expected=f"one of {', '.join(PRE_TOKENIZERS)}",
            found=quoted(name),
        )
    return PRE_TOKENIZERS[name]


def _byte_level(
    metadata: Metadata, vocabulary: _Vocabulary, pre_tokenizer: PreTokenizer
) -> dict[str, Any]:
    """tokenizer.json of a GPT-2 style model."""
    merges = [
        _split_merge(merge, vocabulary, metadata.shown)
        for merge in metadata.strings("tokenizer.ggml.merges")
    ]
    return _document(
        vocabulary,
        normalizer={"type": "NFC"} if pre_tokenizer.nfc else None,
        pre_tokenizer=pre_tokenizer.to_json(),
        decoder={
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        model=_bpe(vocabulary, merges, ignore_merges=pre_tokenizer.ignore_merges),
    )


def _split_merge(merge: str, vocabulary: _Vocabulary, shown: str) -> tuple[str, str]:
    """ "a b" -> (a, b). The alphabet has no space, so there is exactly one."""
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        raise FormatError(
            f"{shown}: tokenizer.ggml.merges",
            expected="two tokens with a space between",
            found=quoted(merge),
        )
    for part in (left, right, left + right):
        if not vocabulary.mergeable(part):
            raise FormatError(
                f"{shown}: tokenizer.ggml.merges: {quoted(merge)}",
                expected="ordinary tokens of the vocabulary",
                found=quoted(part),
            )
    return left, right


def _sentencepiece(metadata: Metadata, vocabulary: _Vocabulary) -> dict[str, Any]:
    """tokenizer.json of a SentencePiece BPE model with byte fallback."""
    scores = metadata.numbers("tokenizer.ggml.scores")
    if len(scores) != len(vocabulary.tokens):
        raise FormatError(
            f"{metadata.shown}: tokenizer.ggml.scores",
            expected=f"{len(vocabulary.tokens):,} values",
            found=f"{len(scores):,}",
        )
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary.ids]
    if missing:
        raise FormatError(
            f"{metadata.shown}: tokenizer.ggml.tokens",
            expected="a token for each of the 256 bytes",
            found=f"no {missing[0]}",
        )
    unknown = _special(metadata, vocabulary, "tokenizer.ggml.unknown_token_id")
    prefix = metadata.boolean("tokenizer.ggml.add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizers = [{"type": "Prepend", "prepend": SPACE}, spaces] if prefix else [spaces]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _document(
        vocabulary,
        normalizer={"type": "Sequence", "normalizers": normalizers},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
        model=_bpe(
            vocabulary,
            _merges_from_scores(vocabulary, scores),
            byte_fallback=True,
            unknown=None if unknown is None else vocabulary.tokens[unknown],
        ),
    )


def _merges_from_scores(vocabulary: _Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece joins, of all neighbours, those whose joined piece has the highest score. As a
    ranked list: every way to cut every piece in two pieces, best score first."""
    ranked: list[tuple[float, int, int, str, str]] = []
    for index, token in enumerate(vocabulary.tokens):
        if len(token) < 2 or not vocabulary.mergeable(token):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if vocabulary.mergeable(left) and vocabulary.mergeable(right):
                ids = vocabulary.ids
                ranked.append((-scores[index], ids[left], ids[right], left, right))
    ranked.sort()
    return [(left, right) for _, _, _, left, right in ranked]


def _bpe(
    vocabulary: _Vocabulary,
    merges: Sequence[tuple[str, str]],
    *,
    ignore_merges: bool = False,
    byte_fallback: bool = False,
    unknown: str | None = None,
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unknown is not None,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocabulary.ids,
        "merges": merges,
    }


def _document(vocabulary: _Vocabulary, **parts: Any) -> dict[str, Any]:
    """The parts in one document, with the tokens that are matched before any cutting."""
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and token
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": None,
        **parts,
    }


def _special(metadata: Metadata, vocabulary: _Vocabulary, key: str) -> int | None:
    if key not in metadata:
        return None
    value = metadata.integer(key)
    if not 0 <= value < len(vocabulary.tokens):
        raise TokenizerError(
            f"{metadata.shown}: metadata {key}",
            expected=f"below {len(vocabulary.tokens):,}, the tokens of the vocabulary",
            found=f"{value:,}",
        )
    return value


def _turn_ends(metadata: Metadata, vocabulary: _Vocabulary, eos: int | None) -> tuple[int, ...]:
    """Every id that ends an answer, the declared end of sequence first."""
    ends = [eos]
    ends += [
        _special(metadata, vocabulary, f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")
    ]
    ends += [
        vocabulary.ids[token]
        for token in sorted(TURN_ENDS)
        if token in vocabulary.ids and vocabulary.types[vocabulary.ids[token]] == CONTROL
    ]
    return tuple(dict.fromkeys(end for end in ends if end is not None))


def _chat_template(metadata: Metadata) -> str | None:
    if "tokenizer.chat_template" not in metadata:
        return None
    template = metadata.string("tokenizer.chat_template")
    if len(template) > MAX_TEMPLATE_LENGTH:
        raise FormatError(
            f"{metadata.shown}: tokenizer.chat_template",
            expected=f"at most {MAX_TEMPLATE_LENGTH:,} characters",
            found=f"{len(template):,}",
        )
    return template
