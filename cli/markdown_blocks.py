"""A growing Markdown text, cut into the blocks that no later line can change.

A block is closed when the next one begins, when a blank line ends it (paragraph, table, quote,
formula), or at once (heading, rule). Items of a list at the top level are closed one by one. Code
between fences comes line by line, for a program is long and needs no end to be read.
"""

import re
from dataclasses import dataclass
from typing import TypeAlias

from localr1.cli.markdown_syntax import block_parser

FENCE = re.compile(r"( {0,3})(`{3,}(?=[^`]*$)|~{3,})(.*)")
CLOSED_AT_ONCE = ("heading_close", "hr")
CLOSED_BY_A_BLANK_LINE = ("paragraph_close", "table_close", "blockquote_close", "math_block")
CODE_BATCH = 8
CODE_SHARE = 16
"""Lines of code are handed on so many together, or this share of those before: colouring begins at
the first line each time, and must not cost more the longer a program is."""


@dataclass(frozen=True)
class Block:
    """source: whole lines. is_spaced: whether an empty line belongs before it (not between the
    items of a tight list)."""

    source: str
    is_spaced: bool


@dataclass(frozen=True)
class Code:
    """Lines between fences. text: all of them so far; begin: where in it the new ones are. opening,
    closing: the fence's own lines, where these have just come."""

    text: str
    begin: int
    info: str
    opening: str | None = None
    closing: str | None = None


Piece: TypeAlias = Block | Code


class BlockSplitter:
    """feed() what comes, flush() at the end; `pending` is what is not closed yet."""

    def __init__(self) -> None:
        self.pending = ""
        self._fence: re.Match[str] | None = None
        self._code = ""
        self._code_given = 0
        self._gave_opening = False
        self._follows_item = False
        self._follows_blank = False

    @property
    def is_in_code(self) -> bool:
        return self._fence is not None

    def feed(self, text: str) -> list[Piece]:
        """The blocks that `text` closes."""
        self.pending += text
        pieces: list[Piece] = []
        if "\n" not in text:
            return pieces
        while self._advance(pieces):
            pass
        return pieces

    def flush(self) -> list[Piece]:
        """What is left, as it is, now that nothing follows."""
        pieces: list[Piece] = []
        if self.pending and not self.pending.endswith("\n"):
            self.pending += "\n"
        while self._advance(pieces):
            pass
        if self._fence is not None:
            pieces += self._code_lines(None)
        elif self.pending.strip():
            pieces.append(Block(self.pending, self._is_spaced(self.pending)))
        self.pending = ""
        return pieces

    def _advance(self, pieces: list[Piece]) -> bool:
        """One step on; False when it takes more text to go further."""
        if self._fence is not None:
            return self._advance_in_code(pieces)
        first, newline, rest = self.pending.partition("\n")
        if newline and not first.strip():
            self.pending = rest
            self._follows_blank = True
            return True
        if newline and (fence := FENCE.fullmatch(first)):
            self._fence, self.pending = fence, rest
            self._code, self._code_given, self._gave_opening = "", 0, False
            return True
        end = self._end_of_block()
        if end is None:
            return False
        source = self.pending[:end]
        pieces.append(Block(source, self._is_spaced(source)))
        self.pending = self.pending[end:]
        self._follows_blank = source.endswith("\n\n")
        return True

    def _is_spaced(self, source: str) -> bool:
        is_item = block_parser().parse(source)[0].type.endswith("list_open")
        spaced = not (is_item and self._follows_item) or self._follows_blank
        self._follows_item = is_item
        return spaced

    def _end_of_block(self) -> int | None:
        """Where in `pending` the first block ends, if it is closed."""
        complete = self.pending[: self.pending.rfind("\n") + 1]
        tokens = block_parser().parse(complete)
        tops = [token for token in tokens if token.level == 0 and token.map]
        if not tops:
            return None
        starts = [token.map[0] for token in tops if token.map]
        if tops[0].type.endswith("list_open"):
            items = {
                token.map[0]
                for token in tokens
                if token.type == "list_item_open" and token.level == 1 and token.map
            }
            starts = sorted({*items, *starts})
        if len(starts) > 1:
            lines = complete.split("\n")[: starts[1]]
            return len("\n".join(lines)) + 1
        last = next(token for token in reversed(tokens) if token.level == 0)
        if last.type in CLOSED_AT_ONCE:
            return len(complete)
        if last.type in CLOSED_BY_A_BLANK_LINE and complete.endswith("\n\n"):
            return len(complete)
        return None

    def _advance_in_code(self, pieces: list[Piece]) -> bool:
        assert self._fence is not None
        indent, marks = len(self._fence[1]), self._fence[2]
        line, newline, rest = self.pending.partition("\n")
        if not newline:
            batch = max(CODE_BATCH, self._code.count("\n", 0, self._code_given) // CODE_SHARE)
            if self._code.count("\n", self._code_given) >= batch:
                pieces += self._code_lines(None)
            return False
        self.pending = rest
        stripped = line.strip()
        is_closing = len(line) - len(line.lstrip(" ")) < 4 and len(stripped) >= len(marks)
        if is_closing and set(stripped) == {marks[0]}:
            pieces += self._code_lines(line.strip())
            self._fence = None
            self._follows_item = self._follows_blank = False
        else:
            removed = min(indent, len(line) - len(line.lstrip(" ")))
            self._code += line[removed:] + "\n"
        return True

    def _code_lines(self, closing: str | None) -> list[Piece]:
        assert self._fence is not None
        opening = None if self._gave_opening else self._fence[0].strip()
        begin, self._code_given, self._gave_opening = self._code_given, len(self._code), True
        if begin == len(self._code) and opening is None and closing is None:
            return []
        return [Code(self._code, begin, self._fence[3].strip(), opening, closing)]

    @property
    def tail(self) -> str:
        """What came and was not handed on: to be shown as it is until its block is closed."""
        if self._fence is None:
            return self.pending
        opening = "" if self._gave_opening else self._fence[0] + "\n"
        return opening + self._code[self._code_given :] + self.pending
