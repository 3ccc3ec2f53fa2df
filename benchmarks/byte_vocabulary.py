"""Tokenizers that need no training: 256 bytes, control tokens, and words as wished."""

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import pre_tokenizers

NUM_BYTES = 256


def byte_level_document(
    added: Sequence[str], ordinary: Iterable[str] = (), words: Iterable[str] = ()
) -> dict[str, Any]:
    """A tokenizer.json, as parsed: ids 0..255 are bytes, in the order of the library's alphabet;
    then come `added`, which are special tokens but for those in `ordinary`; then `words`, which no
    text is ever encoded to, but which a model may say."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = frozenset(ordinary)
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    first_word = NUM_BYTES + len(added)
    vocabulary |= {word: first_word + index for index, word in enumerate(words)}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": NUM_BYTES + index,
                "content": content,
                "special": content not in plain,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for index, content in enumerate(added)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": dict(byte_level),
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
