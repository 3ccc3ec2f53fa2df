"""How much room text takes on a terminal, in cells: CJK and emoji take two, combining marks none.

Terminals disagree about sequences (a family of four in one emoji, a flag of two letters): each of
these functions counts their parts one by one, which is the most any terminal uses. A line that is
cut by this measure never wraps.
"""

from collections.abc import Iterator

from wcwidth import wcwidth

WIDE_VARIANT = "\ufe0f"
"""Asks for the emoji form of what stands before it: one cell more, where a terminal obeys."""
ELLIPSIS = "…"


def character_cells(character: str) -> int:
    """Unprintable characters count nothing: they are escaped before they get here."""
    return 1 if character == WIDE_VARIANT else max(wcwidth(character), 0)


def cells(text: str) -> int:
    if text.isascii():
        return len(text)
    return sum(map(character_cells, text))


def fit(text: str, columns: int) -> str:
    """`text`, cut to so many cells; an ellipsis says that something is missing."""
    if cells(text) <= columns:
        return text
    return _beginning(text, columns - 1) + ELLIPSIS if columns > 0 else ""


def num_rows(text: str, columns: int) -> int:
    """How many rows a line takes at the most on a terminal of so many columns."""
    count = cells(text)
    # A wide glyph that has no room at the end of a row leaves the last cell empty.
    used = columns if count == len(text) else max(columns - 1, 1)
    return max(-(-count // used), 1)


def _beginning(text: str, columns: int) -> str:
    used = 0
    for position, character in enumerate(text):
        used += character_cells(character)
        if used > columns:
            return text[:position]
    return text


def wrapped(text: str, columns: int) -> Iterator[str]:
    """The rows of `text` on a screen of so many columns (at least 2), broken at spaces where that
    is possible. A space at a break is dropped; an empty line is an empty row."""
    for line in text.expandtabs(4).split("\n"):
        while cells(line) > columns:
            head = _beginning(line, columns)
            space = head.rfind(" ", 1)
            if line[len(head)] == " ":
                space = len(head)
            cut = space if space > 0 else max(len(head), 1)
            yield line[:cut]
            line = line[cut:].removeprefix(" ")
        yield line


def wrapped_words(text: str, columns: int) -> Iterator[str]:
    """`text` in lines of so many cells, broken at spaces alone: a word that is longer stays whole,
    and a line that fits is as it was."""
    for line in text.split("\n"):
        while cells(line) > columns:
            # The first space behind the indentation that is not too far right, or else the next.
            begin = len(line) - len(line.lstrip(" "))
            space = line.rfind(" ", begin, len(_beginning(line, columns)) + 1)
            if space < 0:
                space = line.find(" ", begin)
            if space < 0:
                break
            yield line[:space].rstrip(" ")
            line = line[space:].lstrip(" ")
        yield line
