"""One Markdown block to styled lines that fit a width.

Only the terminal's own sixteen colours, bold, dim, italic and underline, so that its theme decides.
Code is printed without a frame, to be copied as it is, and is not wrapped.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from markdown_it.token import Token
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from localr1.cli.markdown_syntax import parser

if TYPE_CHECKING:
    from pygments.lexer import Lexer

STYLES = {
    "strong": "bold",
    "em": "italic",
    "s": "strike",
    "code": "cyan",
    "link": "underline",
    "marker": "dim",
}
HEADINGS = {"h1": "bold underline", "h2": "bold"}
# Pygments' token types, by the first that matches from the most special upwards.
CODE_STYLES = {
    "Comment": "dim italic",
    "Keyword": "magenta",
    "Literal.String": "green",
    "Literal.Number": "cyan",
    "Name.Function": "blue",
    "Name.Class": "blue",
    "Name.Decorator": "yellow",
    "Name.Tag": "blue",
    "Operator.Word": "magenta",
    "Generic.Deleted": "red",
    "Generic.Inserted": "green",
    "Generic.Heading": "bold",
    "Generic.Subheading": "cyan",
}
BULLETS = "•◦▪"
RULE = "─"
QUOTE = "│ "
COLUMN_GAP = "  "
MIN_TEXT_WIDTH = 10
"""Text is never squeezed below that, however deep it is nested."""
# Text.wrap asks a console for its tab size and nothing else.
_MEASURE = Console(width=80)


def render_block(source: str, width: int) -> list[Text]:
    """Lines of at most `width` cells, but for code and for what cannot be broken."""
    tokens = parser().parse(source)
    return list(_blocks(tokens, max(width, MIN_TEXT_WIDTH), depth=0))


def render_code(text: str, begin: int, info: str) -> list[Text]:
    """The lines of the program `text` from character `begin` on, coloured as what they are in the
    whole of it. info: the language, as behind the opening fence."""
    coloured = _coloured(text, info.split()[0] if info.split() else "")
    return list(coloured[begin:].split("\n", allow_blank=False)) if begin < len(text) else []


def _blocks(tokens: Sequence[Token], width: int, depth: int, tight: bool = False) -> Iterator[Text]:
    position = 0
    while position < len(tokens):
        if position and not tight:
            yield Text()
        token = tokens[position]
        end = _end_of(tokens, position)
        yield from _block(token, tokens[position + 1 : end], width, depth)
        position = end + 1


def _end_of(tokens: Sequence[Token], begin: int) -> int:
    """The place of the token that closes the one at `begin`."""
    level = 0
    for position in range(begin, len(tokens)):
        level += tokens[position].nesting
        if level == 0:
            return position
    raise AssertionError("markdown-it balances its tokens")


def _block(token: Token, inner: Sequence[Token], width: int, depth: int) -> Iterator[Text]:
    if token.type == "paragraph_open":
        yield from _wrapped(inline(inner[0]), width)
    elif token.type == "heading_open":
        text = inline(inner[0])
        text.stylize_before(HEADINGS.get(token.tag, "bold"))
        yield from _wrapped(text, width)
    elif token.type in ("bullet_list_open", "ordered_list_open"):
        yield from _list(token, inner, width, depth)
    elif token.type == "blockquote_open":
        for line in _blocks(inner, max(width - len(QUOTE), MIN_TEXT_WIDTH), depth):
            yield _marked(QUOTE, line)
    elif token.type == "table_open":
        yield from _table(inner, width)
    elif token.type == "hr":
        yield Text(RULE * min(width, 40), STYLES["marker"])
    elif token.type == "fence":
        yield Text(f"{token.markup}{token.info}", STYLES["marker"])
        yield from render_code(token.content, 0, token.info)
        yield Text(token.markup, STYLES["marker"])
    elif token.type == "code_block":
        for line in render_code(token.content, 0, ""):
            yield Text("    ") + line
    else:  # math_block
        yield from (Text(line) for line in token.content.rstrip("\n").split("\n"))


def _list(opening: Token, inner: Sequence[Token], width: int, depth: int) -> Iterator[Text]:
    number = int(opening.attrGet("start") or 1) if opening.type.startswith("ordered") else None
    position = 0
    while position < len(inner):
        end = _end_of(inner, position)
        content = inner[position + 1 : end]
        # markdown-it hides the paragraphs of a tight list.
        tight = not any(each.type == "paragraph_open" and not each.hidden for each in content)
        if position and not tight:
            yield Text()
        bullet = BULLETS[min(depth, len(BULLETS) - 1)]
        marker = f"{bullet} " if number is None else f"{number}. "
        rest = max(width - len(marker), MIN_TEXT_WIDTH)
        lines = list(_blocks(content, rest, depth + 1, tight)) or [Text()]
        for row, line in enumerate(lines):
            yield _marked(marker if row == 0 else " " * len(marker), line)
        number = None if number is None else number + 1
        position = end + 1


def _marked(marker: str, line: Text) -> Text:
    """The marker dim, the line as it was; no blanks alone."""
    marked = Text.assemble((marker, STYLES["marker"]), line)
    marked.rstrip()
    return marked


def inline(token: Token) -> Text:
    """The text of an "inline" token, in one piece: a line break stays one."""
    text = Text()
    open_styles: list[str] = []
    link_begin, target = 0, ""
    for child in token.children or []:
        kind = child.type.removesuffix("_open").removesuffix("_close")
        if child.type in ("text", "math_inline"):
            text.append(child.content, " ".join(open_styles))
        elif child.type == "code_inline":
            text.append(child.content, " ".join([*open_styles, STYLES["code"]]))
        elif child.type in ("softbreak", "hardbreak"):
            text.append("\n")
        elif child.type == "image":
            text.append(f"{child.content} ({child.attrGet('src')})", " ".join(open_styles))
        elif child.nesting == 1:
            open_styles.append(STYLES[kind])
            if kind == "link":
                link_begin, target = len(text), str(child.attrGet("href"))
        else:
            open_styles.remove(STYLES[kind])
            if kind == "link" and text.plain[link_begin:] not in (target, f"mailto:{target}"):
                text.append(f" ({target})", STYLES["marker"])
    return text


def _wrapped(text: Text, width: int) -> Iterator[Text]:
    for line in text.wrap(_MEASURE, width):
        line.rstrip()
        yield line


def _table(inner: Sequence[Token], width: int) -> Iterator[Text]:
    rows: list[list[Text]] = []
    aligns: list[str] = []
    for position, token in enumerate(inner):
        if token.type == "tr_open":
            rows.append([])
        elif token.type in ("th_open", "td_open"):
            rows[-1].append(inline(inner[position + 1]))
            if token.type == "th_open":
                style = str(token.attrGet("style") or "")
                aligns.append(style.removeprefix("text-align:") or "left")
    for heading in rows[0]:
        heading.stylize_before("bold")
    widths = _column_widths(rows, width)
    if widths is None:
        yield from _records(rows, width)
        return
    for number, row in enumerate(rows):
        yield from _row(row, widths, aligns)
        if number == 0:
            yield Text(COLUMN_GAP.join(RULE * column for column in widths), STYLES["marker"])


def _column_widths(rows: list[list[Text]], width: int) -> list[int] | None:
    """As wide as the content, else the widest are narrowed; None where that leaves too little."""
    widths = [
        max(max(map(cell_len, row[i].plain.split("\n"))) for row in rows) for i in _columns(rows)
    ]
    widths = [max(each, 1) for each in widths]
    least = [min(each, MIN_TEXT_WIDTH) for each in widths]
    room = width - len(COLUMN_GAP) * (len(widths) - 1)
    if sum(least) > room:
        return None
    while sum(widths) > room:
        widest = max((i for i in _columns(rows) if widths[i] > least[i]), key=widths.__getitem__)
        widths[widest] -= 1
    return widths


def _columns(rows: list[list[Text]]) -> range:
    return range(len(rows[0]))


def _row(row: list[Text], widths: list[int], aligns: list[str]) -> Iterator[Text]:
    cells = [list(_wrapped(cell, width)) for cell, width in zip(row, widths, strict=True)]
    for height in range(max(map(len, cells))):
        line = Text()
        for column, (lines, width) in enumerate(zip(cells, widths, strict=True)):
            cell = lines[height] if height < len(lines) else Text()
            missing = max(width - cell.cell_len, 0)
            left = {"right": missing, "center": missing // 2}.get(aligns[column], 0)
            line.append(COLUMN_GAP if column else "")
            line.append_text(Text(" " * left) + cell + Text(" " * (missing - left)))
        line.rstrip()
        yield line


def _records(rows: list[list[Text]], width: int) -> Iterator[Text]:
    """A table that does not fit, a line for each cell."""
    for number, row in enumerate(rows[1:]):
        if number:
            yield Text()
        for heading, cell in zip(rows[0], row, strict=True):
            yield from _wrapped(heading + Text(": ") + cell, width)


def _coloured(code: str, language: str) -> Text:
    text = Text(code)
    lexer = _lexer(language)
    if lexer is None:
        return text
    for position, kind, value in lexer.get_tokens_unprocessed(code):
        style = _code_style(kind)
        if style:
            text.stylize(style, position, position + len(value))
    return text


@lru_cache(maxsize=32)
def _lexer(language: str) -> "Lexer | None":
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        return get_lexer_by_name(language) if language else None
    except ClassNotFound:
        return None


@lru_cache(maxsize=512)
def _code_style(kind: object) -> str:
    name = str(kind).removeprefix("Token.")
    while name:
        if name in CODE_STYLES:
            return CODE_STYLES[name]
        name = name.rpartition(".")[0]
    return ""
