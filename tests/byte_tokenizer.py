"""A tokenizer of 256 bytes and a few control tokens, small enough to reason about: every character
beyond ASCII is cut into several tokens."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from localr1.checkpoint.api import TokenizerFiles
from localr1.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from byte_vocabulary import byte_level_document

CONTROL = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<think>", "</think>", "<tool_call>")
NOT_CALLED_SPECIAL = ("<think>", "</think>", "<tool_call>")
ORDINARY = "\n\n\n"
"""An added token that is plain text, as some vocabularies have for runs of white space."""
VOCAB_SIZE = 300


def tokenizer_document() -> dict[str, Any]:
    """tokenizer.json, as parsed: bytes 0..255 in the library's alphabet, then the added tokens."""
    return byte_level_document((*CONTROL, ORDINARY), ordinary=(*NOT_CALLED_SPECIAL, ORDINARY))


def tokenizer_files(document: dict[str, Any] | None = None, **changes: Any) -> TokenizerFiles:
    text = json.dumps(tokenizer_document() if document is None else document)
    files = TokenizerFiles(text, None, "<s>", "</s>", None, (257,), False)
    return replace(files, **changes)


def byte_tokenizer(**changes: Any) -> Tokenizer:
    return Tokenizer.from_files(tokenizer_files(**changes), VOCAB_SIZE)
