"""Text to token ids and back, over the `tokenizers` library.

Two kinds of text are kept apart. Ordinary text (what a user types, a file that is read) never
becomes a control token, whatever it contains; template text may. Control tokens are the special
ones, and those that are marks without being called special: <think>, </think>, <tool_call>.
"""

import json
import re
from collections.abc import Callable, Iterable
from typing import TypeVar

import tokenizers

from localr1.checkpoint.api import TokenizerFiles
from localr1.errors import TokenizerError
from localr1.token_stream import TokenStream
from localr1.tokenizer_rules import FIX, check_tokenizer

MARK = "\ufdd0\ufdd1"
"""A control token of our own, of two of Unicode's noncharacters. `protect` puts it inside what
would else be a control token; `encode` drops its id again: it splits text without changing it."""

MAX_TEXT = 8 << 20
"""Characters in one call: some ten seconds of work in the library, which nothing can interrupt."""

T = TypeVar("T")


class Tokenizer:
    """vocab_size: rows of the model's embedding; every id is below it. eos_ids: what ends a turn.
    bos_token, bos_id: what a text starts with, or None. adds_bos: whether the model was trained
    with it in front of plain text. control_ids: the control tokens by text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        vocab_size: int,
        control_ids: dict[str, int],
        eos_ids: frozenset[int],
        bos_token: str | None,
        adds_bos: bool,
    ) -> None:
        self._backend = backend
        self.vocab_size = vocab_size
        self.control_ids = control_ids
        self.eos_ids = eos_ids
        self.bos_token = bos_token
        self.adds_bos = adds_bos
        self.bos_id = None if bos_token is None else backend.token_to_id(bos_token)
        self._mark_id = backend.token_to_id(MARK)
        self._control_values = frozenset(control_ids.values())
        self._patterns: dict[frozenset[str], re.Pattern[str]] = {}
        self._anchor = self._find_anchor()

    @classmethod
    def from_files(cls, files: TokenizerFiles, vocab_size: int) -> "Tokenizer":
        """Check and build the tokenizer of a model with `vocab_size` embedding rows.

        Raises FormatError (tokenizer.json is not JSON) and TokenizerError.
        """
        named = {
            "bos_token": files.bos_token,
            "eos_token": files.eos_token,
            "pad_token": files.pad_token,
        }
        checked = check_tokenizer(files.tokenizer_json, vocab_size, MARK, named)
        document = json.dumps(checked.document, ensure_ascii=False, separators=(",", ":"))
        backend = _guarded(
            lambda: tokenizers.Tokenizer.from_str(document), "tokenizer.json cannot be used"
        )
        expected_ids = {token.content: token.id for token in checked.added.values()}
        for content, expected in expected_ids.items():
            if (found := backend.token_to_id(content)) != expected:
                raise TokenizerError(
                    f"tokenizer.json: id of {content[:40]!r}",
                    expected=f"{expected}, as the file says",
                    found=f"{found}, by its place",
                    fix=FIX,
                )
        mark_id = backend.token_to_id(MARK)
        assert mark_id is not None
        if (holder := backend.id_to_token(mark_id)) != MARK:
            raise TokenizerError(
                "tokenizer.json: vocabulary",
                expected="ids without holes",
                found=f"{holder!r} in the place after the last",
                fix=FIX,
            )
        for identifier in files.eos_token_ids:
            if type(identifier) is not int or not 0 <= identifier < vocab_size:
                raise TokenizerError(
                    "eos_token_id",
                    expected=f"an id from 0 to {vocab_size - 1}",
                    found=identifier,
                    fix="Take the config files from the model's original release.",
                )
        eos_ids = set(files.eos_token_ids)
        if files.eos_token is not None:
            eos_ids.add(expected_ids[files.eos_token])
        return cls(
            backend,
            vocab_size=vocab_size,
            control_ids={t.content: t.id for t in checked.added.values() if t.is_control},
            eos_ids=frozenset(eos_ids),
            bos_token=files.bos_token,
            adds_bos=files.add_bos and files.bos_token is not None,
        )

    def to_json(self) -> str:
        """As a tokenizer.json, as it was checked. Its ids below `vocab_size` are the model's."""
        return self._backend.to_str()

    @property
    def num_ids(self) -> int:
        """Of the model and of `to_json` together, which may have a token more than the model."""
        return max(self.vocab_size, self._backend.get_vocab_size(with_added_tokens=True))

    def special_id(self, text: str) -> int | None:
        """The id of the control token with this text."""
        return self.control_ids.get(text)

    def encode(self, text: str, *, allow_special: bool = False, add_bos: bool = False) -> list[int]:
        """The ids of `text`.

        allow_special: control tokens in the text become their ids, except where `protect` went over
        them; otherwise the whole text is ordinary. add_bos: put bos in front, where there is one.
        Raises TokenizerError.
        """
        if len(text) > MAX_TEXT:
            raise TokenizerError(
                "text",
                expected=f"at most {MAX_TEXT:,} characters",
                found=f"{len(text):,}",
                fix="Give it in parts.",
            )
        if not allow_special:
            text = self.protect(text)
        encoding = _guarded(
            lambda: self._backend.encode(text, add_special_tokens=False), "text cannot be encoded"
        )
        ids: list[int] = encoding.ids
        found = sum(identifier in self._control_values for identifier in ids)
        if found and found > len(self._pattern(frozenset()).findall(text)):
            # A vocabulary whose merges or words lead to a control token by way of ordinary text.
            raise TokenizerError(
                "text cannot be encoded",
                expected="ordinary tokens",
                found="a control token that the text does not spell",
                fix=FIX,
            )
        if MARK in text:
            ids = [identifier for identifier in ids if identifier != self._mark_id]
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def protect(self, text: str, keep: Iterable[str] = ()) -> str:
        """`text` with a mark inside everything that spells a control token, except those in `keep`.

        What `encode(allow_special=True)` makes of it is ordinary text, without the marks.
        """
        pattern = self._pattern(frozenset(keep))
        text = text.replace(MARK, MARK[0] + MARK + MARK[1])
        while pattern.search(text):  # Where texts overlap, breaking one may leave the next.
            text = pattern.sub(lambda match: match[0][0] + MARK + match[0][1:], text)
        return text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, control tokens included; bytes that are no text become U+FFFD."""
        stream = self.stream()
        return "".join([stream.step(identifier) or "" for identifier in ids]) + stream.flush()

    def stream(self) -> TokenStream:
        """A decoder of its own for one sequence of tokens."""
        return TokenStream(self._decode_slice, self.vocab_size, self._anchor)

    def _find_anchor(self) -> list[int]:
        """A token that is letters by itself, for the streams; [] when there is none at hand."""
        for identifier in range(min(self.vocab_size, 4096)):
            token = self._backend.id_to_token(identifier)
            # <0x61> says "a" too, but joins the bytes that follow it.
            if token is not None and not token.startswith("<0x"):
                text = self._decode_slice([identifier])
                if text.isascii() and text.isalpha():
                    return [identifier]
        return []

    def _decode_slice(self, ids: list[int]) -> str:
        return _guarded(
            lambda: self._backend.decode(ids, skip_special_tokens=False), "tokens cannot be decoded"
        )

    def _pattern(self, without: frozenset[str]) -> re.Pattern[str]:
        """Any control token, the longest that fits, as the library matches them."""
        pattern = self._patterns.get(without)
        if pattern is None:
            texts = sorted(self.control_ids.keys() - without, key=len, reverse=True)
            # Without any there must be no match: "(?!)" never does, where "" always would.
            pattern = re.compile("|".join(map(re.escape, texts)) or "(?!)")
            self._patterns[without] = pattern
        return pattern


def strip_marks(text: str) -> str:
    """What `protect` was given, of any text that was put together from protected ones."""
    return text.replace(MARK, "")


def _guarded(call: Callable[[], T], what: str) -> T:
    """Run the library. Its Rust panics are no Exceptions (pyo3's PanicException derives from
    BaseException and cannot be imported), and every kind of failure says what this data did."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise TokenizerError(what, found=str(error)[:200], fix=FIX) from error
