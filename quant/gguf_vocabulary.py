"""The tokenizer of a GGUF file from a tokenizer.json: the inverse of checkpoint/gguf_tokenizer.py.

Byte-level BPE alone, and of that what llama.cpp has a name for (`tokenizer.ggml.pre`): how text is
cut is in its program, not in the file, so a tokenizer of another kind would silently give other
tokens.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from localr1.checkpoint.api import TokenizerFiles
from localr1.checkpoint.gguf_pretokenizers import PRE_TOKENIZERS
from localr1.checkpoint.paths import quoted
from localr1.errors import UnsupportedError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Token types of the format."""
_GPT2: Final = PRE_TOKENIZERS["gpt-2"].patterns[0]
_WHERE: Final = "GGUF: tokenizer.json"


@dataclass(frozen=True)
class Vocabulary:
    """tokens: by id, as many as the embedding has rows. types: of each. merges: "a b". pre: how
    text is cut. ids: of special tokens, by the name that GGUF has for their role."""

    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    pre: str
    ids: Mapping[str, int]


def vocabulary_of(files: TokenizerFiles, vocab_size: int) -> Vocabulary:
    """Raises UnsupportedError for a tokenizer that a GGUF file cannot say."""
    document = json.loads(files.tokenizer_json)
    model = document.get("model") or {}
    is_bpe = model.get("type", "BPE") == "BPE" and not model.get("byte_fallback")
    if not is_bpe or "merges" not in model:
        raise UnsupportedError(
            f"{_WHERE}: model", expected="byte-level BPE", found=quoted(model.get("type"))
        )
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for added in document.get("added_tokens") or []:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    ids = {token: index for index, token in enumerate(tokens)}
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    return Vocabulary(tokens, types, merges, _pre_of(document, model), _roles(files, ids))


def _roles(files: TokenizerFiles, ids: Mapping[str, int]) -> dict[str, int]:
    roles = {}
    for role, token in (
        ("bos", files.bos_token),
        ("eos", files.eos_token),
        ("padding", files.pad_token),
    ):
        if token is not None and token in ids:
            roles[role] = ids[token]
    ends = list(files.eos_token_ids)
    if ends and roles.get("eos") not in ends:
        roles["eos"] = ends[0]
    others = [end for end in ends if end != roles.get("eos")]
    # What else ends a turn: of a message, and of a turn that asks for more.
    roles |= dict(zip(("eot", "eom"), others, strict=False))
    return roles


def _pre_of(document: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """The name of the way that text is cut."""
    normalizer = document.get("normalizer")
    nfc = normalizer is not None and normalizer.get("type") == "NFC"
    if normalizer is not None and not nfc:
        raise UnsupportedError(
            f"{_WHERE}: normalizer", expected="none or NFC", found=quoted(normalizer.get("type"))
        )
    patterns = _patterns(document.get("pre_tokenizer"))
    wanted = (patterns, nfc, bool(model.get("ignore_merges")))
    for name, known in PRE_TOKENIZERS.items():
        if (known.patterns, known.nfc, known.ignore_merges) == wanted:
            return name
    raise UnsupportedError(
        f"{_WHERE}: pre_tokenizer",
        expected=f"that of one of {', '.join(PRE_TOKENIZERS)}",
        found=quoted(patterns),
        fix="llama.cpp has no name for this one, and would cut text in another way.",
    )


def _patterns(value: Any) -> tuple[str, ...]:
    """The regular expressions that it comes to, in order."""
    steps = value.get("pretokenizers", [value]) if isinstance(value, dict) else []
    found: list[str] = []
    is_byte_level = False
    for step in steps:
        kind = step.get("type")
        if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            found.append(step["pattern"].get("Regex", ""))
        elif kind == "Digits":
            found.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            is_byte_level = True
            found += [_GPT2] if step.get("use_regex", True) else []
        else:
            raise UnsupportedError(
                f"{_WHERE}: pre_tokenizer", expected="Split, Digits, ByteLevel", found=quoted(kind)
            )
    if not is_byte_level:
        raise UnsupportedError(f"{_WHERE}: pre_tokenizer", expected="ByteLevel", found="none")
    return tuple(found)
