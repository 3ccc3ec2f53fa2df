"""What a tokenizer.json may say, checked before the `tokenizers` library sees any of it.

The library trusts the file: some documents make it panic, abort the process, exhaust memory or
search for hours (robustness.md's list). So the parts that are used are checked, the parts that are
not (padding, truncation, the post-processor) are taken out, and the document is rebuilt.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from localr1.checkpoint.strict_json import parse_object
from localr1.errors import TokenizerError

MAX_BYTES = 64 << 20
MAX_VALUES = 6_000_000
"""A vocabulary of 256,000 tokens with merges written as pairs has about two million."""
MAX_TOKEN_LENGTH = 8192
MAX_COMPONENTS = 64
MAX_NUMBER = 4096
MAX_STRING = 8192
MAX_CHARSMAP = 4 << 20
MAX_GROWTH = 64
"""How much longer the normalizer may make a text."""
MAX_OPEN_REPEATS = 3
"""Unbounded repetitions in one branch of a pattern: its search takes at most that power of time."""

MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")
_NORMALIZERS = """Sequence NFC NFD NFKC NFKD Lowercase Strip StripAccents Prepend Replace ByteLevel
    Nmt BertNormalizer Precompiled"""
_PRE_TOKENIZERS = """Sequence ByteLevel Split Digits Metaspace Whitespace WhitespaceSplit
    Punctuation CharDelimiterSplit BertPreTokenizer UnicodeScripts FixedLength"""
_DECODERS = """Sequence ByteLevel ByteFallback Fuse Metaspace Replace Strip WordPiece BPEDecoder"""
COMPONENTS: dict[str, frozenset[str]] = {
    "normalizer": frozenset(_NORMALIZERS.split()),
    "pre_tokenizer": frozenset(_PRE_TOKENIZERS.split()),
    "decoder": frozenset(_DECODERS.split()),
}
FIX = "Take tokenizer.json from the model's original release."


@dataclass(frozen=True)
class AddedToken:
    """is_control: a text of one character never is; it could not be told from ordinary text."""

    content: str
    id: int
    is_control: bool


@dataclass(frozen=True)
class CheckedTokenizer:
    """document: safe to hand to the library, with every control token marked special.
    added: the added tokens, by content."""

    document: dict[str, Any]
    added: Mapping[str, AddedToken]


def check_tokenizer(
    text: str, vocab_size: int, mark: str, named: Mapping[str, str | None]
) -> CheckedTokenizer:
    """Check the text of a tokenizer.json for a model with `vocab_size` embedding rows.

    mark: a text that becomes one more control token, which no file may define. named: the tokens
    that tokenizer_config.json gives a role ("bos_token": "<s>"); they are control tokens whether or
    not they are among the added ones. Raises FormatError for what is not JSON and TokenizerError
    for the rest.
    """
    source = parse_object(
        text.encode("utf-8", "surrogatepass"),
        "tokenizer.json",
        max_bytes=MAX_BYTES,
        max_values=MAX_VALUES,
    )
    for kind, allowed in COMPONENTS.items():
        _check_component(kind, source.get(kind), allowed)
    model = dict(_expect(source.get("model"), dict, "model"))
    # A tokenizer.json of the library's first format has no "type"; it was always BPE with merges.
    model.setdefault("type", "BPE" if "merges" in model else None)
    if model["type"] not in MODELS:
        raise _error("model.type", " or ".join(MODELS), repr(model["type"])[:60])
    ids = _vocabulary(model, vocab_size)
    added, entries = _added_tokens(source.get("added_tokens"), ids, vocab_size)
    for role, content in named.items():
        if content is None or content in added:
            continue
        if content not in ids:
            raise TokenizerError(
                f"tokenizer_config.json: {role}",
                expected="a token of the vocabulary",
                found=repr(content[:60]),
                fix=FIX,
            )
        added[content] = AddedToken(content, ids[content], len(content) > 1)
        entries.append(_entry(content, ids[content]))
    if mark in ids or mark in added:
        raise _error("vocabulary", "no token with the text localr1 reserves", repr(mark))
    if model["type"] == "BPE":
        # With every added token in the vocabulary the library takes its id from there; else it
        # would count for itself and arrive elsewhere where the ids have holes. No merge leads to
        # them, so ordinary text cannot.
        vocabulary = dict(model["vocab"])
        vocabulary.update((token.content, token.id) for token in added.values())
        vocabulary[mark] = max(vocab_size, max(vocabulary.values(), default=0) + 1)
        model["vocab"] = vocabulary
        model["dropout"] = None  # Random merges are a means of training.
    entries.append(_entry(mark, vocab_size))
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": entries,
        "normalizer": source.get("normalizer"),
        "pre_tokenizer": source.get("pre_tokenizer"),
        "post_processor": None,
        "decoder": source.get("decoder"),
        "model": model,
    }
    return CheckedTokenizer(document, added)


def _error(part: str, expected: str, found: object) -> TokenizerError:
    return TokenizerError(f"tokenizer.json: {part}", expected=expected, found=found, fix=FIX)


def _expect(value: Any, kind: type, part: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _error(part, f"a value of type {kind.__name__}", repr(value)[:60])
    return value


def _check_id(value: Any, vocab_size: int, part: str) -> int:
    if type(value) is not int or not 0 <= value < vocab_size:
        raise _error(part, f"an id from 0 to {vocab_size - 1}", repr(value)[:60])
    return value


def _check_token(value: Any, part: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_TOKEN_LENGTH:
        found = f"{len(value):,}" if isinstance(value, str) else repr(value)[:60]
        raise _error(part, f"a text of at most {MAX_TOKEN_LENGTH:,} characters", found)
    return value


def _vocabulary(model: dict[str, Any], vocab_size: int) -> dict[str, int]:
    """Token text to id, every one of them checked."""
    vocabulary = model.get("vocab")
    if model["type"] == "Unigram":
        pieces = _expect(vocabulary, list, "model.vocab")
        if len(pieces) > vocab_size:
            raise _error("model.vocab", f"at most {vocab_size} tokens", len(pieces))
        for piece in pieces:
            if not isinstance(piece, list) or len(piece) != 2 or type(piece[1]) not in (int, float):
                raise _error("model.vocab", "pairs of a text and a score", repr(piece)[:60])
            _check_token(piece[0], "model.vocab")
        return {piece[0]: index for index, piece in enumerate(pieces)}
    ids: dict[str, int] = _expect(vocabulary, dict, "model.vocab")
    for token, value in ids.items():
        if type(value) is not int or not 0 <= value < vocab_size:
            _check_id(value, vocab_size, f"model.vocab: id of {token[:40]!r}")
        if len(token) > MAX_TOKEN_LENGTH:
            _check_token(token, "model.vocab")
    if len(set(ids.values())) != len(ids):
        raise _error("model.vocab", "one token for an id", "two tokens with the same id")
    return ids


def _added_tokens(
    value: Any, ids: Mapping[str, int], vocab_size: int
) -> tuple[dict[str, AddedToken], list[dict[str, Any]]]:
    """The added tokens, and their entries for the rebuilt document."""
    added: dict[str, AddedToken] = {}
    entries = []
    taken = {identifier: token for token, identifier in ids.items()}
    for item in _expect([] if value is None else value, list, "added_tokens"):
        _expect(item, dict, "added_tokens")
        content = _check_token(item.get("content"), "added_tokens: content")
        if not content:
            raise _error("added_tokens: content", "a text", "an empty one")
        identifier = _check_id(item.get("id"), vocab_size, f"added_tokens: id of {content[:40]!r}")
        if content in added:
            raise _error("added_tokens", "every token once", f"{content[:40]!r} twice")
        if ids.get(content, identifier) != identifier:
            raise _error(
                f"added_tokens: id of {content[:40]!r}",
                f"{ids[content]}, as in the vocabulary",
                identifier,
            )
        if taken.setdefault(identifier, content) != content:
            raise _error(
                f"added_tokens: id of {content[:40]!r}",
                "an id of its own",
                f"{identifier}, which is {taken[identifier][:40]!r}",
            )
        is_control = len(content) > 1 and (bool(item.get("special")) or _is_tag(content))
        added[content] = AddedToken(content, identifier, is_control)
        entry = {
            key: bool(item.get(key)) for key in ("single_word", "lstrip", "rstrip", "normalized")
        }
        if is_control:
            # Matched on the text as given, so that no normalizer can turn another text into one.
            entry["normalized"] = False
        entries.append({"id": identifier, "content": content, "special": is_control, **entry})
    return added, entries


def _entry(content: str, identifier: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": identifier, "content": content, "special": True, **flags}


def _is_tag(content: str) -> bool:
    """Whether a token that is not called special is a mark all the same: <think>, <tool_call>.
    Runs of spaces and the like are ordinary text."""
    return len(content) > 2 and content[0] + content[-1] in ("<>", "[]")


def _check_component(kind: str, value: Any, allowed: frozenset[str]) -> None:
    if value is None:
        return
    components: list[dict[str, Any]] = []

    def collect(item: Any) -> None:
        _expect(item, dict, kind)
        components.append(item)
        if len(components) > MAX_COMPONENTS:
            raise _error(kind, f"at most {MAX_COMPONENTS} components", "more")
        if item.get("type") not in allowed:
            raise _error(f"{kind}.type", "one of " + ", ".join(sorted(allowed)), item.get("type"))
        if item["type"] == "Sequence":
            steps = [
                item[key] for key in ("normalizers", "pretokenizers", "decoders") if key in item
            ]
            for inner in _expect(steps[0] if len(steps) == 1 else None, list, f"{kind}.Sequence"):
                collect(inner)

    collect(value)
    growth = 1.0
    for item in components:
        if item["type"] != "Sequence":
            _check_values(kind, item)
        if item["type"] == "Replace":
            growth *= _growth(kind, item)
        elif item["type"] == "Prepend" and len(item.get("prepend") or "") > MAX_GROWTH:
            raise _error(f"{kind}.Prepend", f"at most {MAX_GROWTH} characters", "more")
        if growth > MAX_GROWTH:
            raise _error(
                kind, f"a text grown at most {MAX_GROWTH} times", "replacements that grow more"
            )


def _growth(kind: str, item: Mapping[str, Any]) -> float:
    """How much longer one Replace can make a text. A pattern may match the empty string between
    any two characters, so its content counts once a character."""
    content = len(_expect(item.get("content"), str, f"{kind}.Replace.content"))
    pattern = item.get("pattern")
    if isinstance(pattern, dict) and isinstance(pattern.get("String"), str):
        if not pattern["String"]:
            raise _error(f"{kind}.Replace.pattern", "a text", "an empty one")
        return max(1.0, content / len(pattern["String"]))
    return 1.0 + content


def _check_values(kind: str, value: Any, key: str = "") -> None:
    """Bound every number and text of a component, and check every pattern."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_values(kind, inner, name)
    elif isinstance(value, list):
        for inner in value:
            _check_values(kind, inner, key)
    elif isinstance(value, str):
        limit = MAX_CHARSMAP if key == "precompiled_charsmap" else MAX_STRING
        if len(value) > limit:
            raise _error(f"{kind}.{key}", f"at most {limit:,} characters", f"{len(value):,}")
        if key == "Regex":
            check_pattern(kind, value)
    elif isinstance(value, (int, float)) and not -MAX_NUMBER <= value <= MAX_NUMBER:
        raise _error(f"{kind}.{key}", f"a number up to {MAX_NUMBER}", value)


@dataclass
class _Group:
    """A group of a pattern while it is read. open_repeats: of the branch being read; most: of the
    worst branch so far. is_simple: without alternatives and without anything of variable length."""

    open_repeats: int = 0
    most: int = 0
    is_simple: bool = True


# With a lazy "?" or a possessive "+" behind it; behind braces "+" would be a repetition of its own.
_QUANTIFIER = re.compile(r"([*+?])[?+]?|\{(\d{0,9})(,?)(\d{0,9})\}\??")
_ESCAPED = re.compile(r"\\(?:[pPx]\{[^}]{0,64}\}|.)", re.DOTALL)
_GROUP_HEAD = re.compile(r"\((?:\?(?:<?[=!]|[:>]|[im-]{1,4}:|<\w{1,32}>))?")


def check_pattern(kind: str, pattern: str) -> None:
    """Refuse a pattern whose search can take exponential time, or a high power of time.

    The rule (stricter than needed, met by every released tokenizer): what is repeated has a fixed
    length and no alternatives inside, a branch has at most MAX_OPEN_REPEATS unbounded repetitions,
    and nothing refers back.
    """

    def refuse(reason: str) -> TokenizerError:
        return _error(
            f"{kind}: pattern {pattern[:60]!r}", "a pattern that is searched fast", reason
        )

    stack = [_Group()]
    closed: _Group | None = None  # The group that ended just before `at`.
    at = 0
    while at < len(pattern):
        character = pattern[at]
        quantifier = _QUANTIFIER.match(pattern, at)
        if quantifier and at:
            least, most = _bounds(quantifier)
            group = stack[-1]
            if closed is not None and not closed.is_simple and most > 1:
                raise refuse("a repetition of something that itself varies in length")
            if least != most:
                group.is_simple = False
            if most > MAX_GROWTH:
                group.open_repeats += 1
            at = quantifier.end()
            closed = _Group(is_simple=False)  # For a quantifier on this quantifier.
            continue
        closed = None
        if character == "\\":
            escaped = _ESCAPED.match(pattern, at)
            if escaped is None or re.match(r"\\[1-9kgKRX]", escaped[0]):
                raise refuse(f"the escape {pattern[at : at + 3]!r}")
            at = escaped.end()
        elif character == "[":
            at = _class_end(pattern, at)
            if at < 0:
                raise refuse("a character class that does not end")
        elif character == "(":
            head = _GROUP_HEAD.match(pattern, at)
            if head is None or pattern.startswith("?", head.end()):
                raise refuse(f"the group {pattern[at : at + 4]!r}")
            stack.append(_Group())
            at = head.end()
        elif character == ")":
            if len(stack) == 1:
                raise refuse("a group that ends without having begun")
            closed = stack.pop()
            closed.most = max(closed.most, closed.open_repeats)
            stack[-1].open_repeats += closed.most
            stack[-1].is_simple &= closed.is_simple
            at += 1
        else:
            if character == "|":
                stack[-1].most = max(stack[-1].most, stack[-1].open_repeats)
                stack[-1].open_repeats = 0
                stack[-1].is_simple = False
            at += 1
        if max(stack[-1].most, stack[-1].open_repeats) > MAX_OPEN_REPEATS:
            raise refuse(f"more than {MAX_OPEN_REPEATS} unbounded repetitions in one branch")
    if len(stack) != 1:
        raise refuse("a group that does not end")


def _bounds(quantifier: re.Match[str]) -> tuple[int, float]:
    """The least and the most repetitions; {,n} starts at zero."""
    if quantifier[1]:
        return int(quantifier[1] == "+"), 1 if quantifier[1] == "?" else float("inf")
    least = int(quantifier[2] or 0)
    if not quantifier[3]:
        return least, least
    return least, int(quantifier[4]) if quantifier[4] else float("inf")


def _class_end(pattern: str, start: int) -> int:
    """Past the "]" of the class that starts at `start` (classes nest), or -1."""
    depth, at = 0, start
    while at < len(pattern):
        character = pattern[at]
        if character == "\\":
            at += 1
        elif character == "[":
            depth += 1
            if pattern.startswith("^", at + 1):
                at += 1
            if pattern.startswith("]", at + 1):
                at += 1  # The first "]" of a class is a character of it.
        elif character == "]":
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1
    return -1
