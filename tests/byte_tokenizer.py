"""A tokenizer of 256 bytes and a few control tokens, small enough to reason about: every character
beyond ASCII is cut into several tokens."""

import json
from dataclasses import replace
from typing import Any

from tokenizers import pre_tokenizers

from localr1.checkpoint.api import TokenizerFiles
from localr1.tokenizer import Tokenizer

CONTROL = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<think>", "</think>", "<tool_call>")
NOT_CALLED_SPECIAL = ("<think>", "</think>", "<tool_call>")
ORDINARY = "\n\n\n"
"""An added token that is plain text, as some vocabularies have for runs of white space."""
VOCAB_SIZE = 300


def tokenizer_document() -> dict[str, Any]:
    """tokenizer.json, as parsed: bytes 0..255 in the library's alphabet, then the added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    added = [
        {
            "id": 256 + index,
            "content": content,
            "special": content not in (*NOT_CALLED_SPECIAL, ORDINARY),
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for index, content in enumerate((*CONTROL, ORDINARY))
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "model": {
            "type": "BPE",
            "vocab": {character: index for index, character in enumerate(alphabet)},
            "merges": [],
        },
    }


def tokenizer_files(document: dict[str, Any] | None = None, **changes: Any) -> TokenizerFiles:
    text = json.dumps(tokenizer_document() if document is None else document)
    files = TokenizerFiles(text, None, "<s>", "</s>", None, (257,), False)
    return replace(files, **changes)


def byte_tokenizer(**changes: Any) -> Tokenizer:
    return Tokenizer.from_files(tokenizer_files(**changes), VOCAB_SIZE)
