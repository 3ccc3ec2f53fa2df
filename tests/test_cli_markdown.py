"""Markdown as it grows: which blocks are closed, and how each looks."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from localr1.cli.answer_view import MarkdownAnswer
from localr1.cli.live import LiveRegion
from localr1.cli.markdown_blocks import Block, BlockSplitter, Code, Piece
from localr1.cli.markdown_render import render_block, render_code
from localr1.cli.output import Output

SAMPLE = """\
# Überschrift

Two lines
of *text*.
- a
- b

  more

  ```py
  inner
  ```
- c

1. x
2. y

> quote
lazy

| a | b |
|---|--:|
| 1 | 2 |

\\[
x_1 = *2*
\\]

```python
def f():
    pass

```
***
[1]: http://x
tail"""


def split(text: str, step: int) -> list[Piece]:
    splitter = BlockSplitter()
    pieces = []
    for begin in range(0, len(text), step):
        pieces += splitter.feed(text[begin : begin + step])
    return [*pieces, *splitter.flush()]


def sources(pieces: list[Piece]) -> list[str]:
    """How blocks are spaced, and in what portions code comes, may differ from cut to cut."""
    found: list[str] = []
    for piece in pieces:
        if isinstance(piece, Block):
            found.append(piece.source.strip("\n"))
            continue
        new = piece.text[piece.begin :]
        if piece.opening is not None:
            found.append(piece.opening + "\n" + new)
        else:
            found[-1] += new
        found[-1] += piece.closing or ""
    return found


def test_blocks_of_a_text() -> None:
    assert sources(split(SAMPLE, 1)) == [
        "# Überschrift",
        "Two lines\nof *text*.",
        "- a",
        "- b\n\n  more\n\n  ```py\n  inner\n  ```",
        "- c",
        "1. x",
        "2. y",
        "> quote\nlazy",
        "| a | b |\n|---|--:|\n| 1 | 2 |",
        "\\[\nx_1 = *2*\n\\]",
        "```python\ndef f():\n    pass\n\n```",
        "***",
        "[1]: http://x\ntail",
    ]


@pytest.mark.parametrize("step", [1, 3, 17, 10_000])
def test_blocks_do_not_depend_on_the_pieces(step: int) -> None:
    assert sources(split(SAMPLE, step)) == sources(split(SAMPLE, 1))


BLOCK_LINES = "# h|- a|  b|1. x|> q|```|~~~|    code|***|\\[|x_1|\\]|$$|===|[1]: x|<b>"
LINES = st.sampled_from(["text", "more *text*", "", "", *BLOCK_LINES.split("|")])
WORD = re.compile("[a-z]+")
TABLE_LINES = st.sampled_from(["| a | b |", "|---|---|", "| 1 | 2 |"])


@given(st.lists(LINES | TABLE_LINES, max_size=14).map("\n".join), st.integers(1, 9))
def test_nothing_is_lost_or_said_twice(text: str, step: int) -> None:
    kept = "\n".join(sources(split(text, step)))
    assert [line for line in kept.split("\n") if line.strip()] == [
        line for line in text.split("\n") if line.strip()
    ]


@given(st.lists(LINES | TABLE_LINES, max_size=14).map("\n".join))
def test_every_word_is_shown_once(text: str) -> None:
    shown = []
    for piece in split(text, 5):
        if isinstance(piece, Block):
            shown += plain(piece.source)
        else:
            shown += [line.plain for line in render_code(piece.text, piece.begin, piece.info)]
    assert WORD.findall("\n".join(shown)) == WORD.findall(text)


@given(st.text(alphabet=st.sampled_from(list("ab*_`#-|>$\\[]()12. \n\t漢🙂<&~")), max_size=80))
def test_any_text_can_be_rendered(text: str) -> None:
    for piece in split(text, 3):
        if isinstance(piece, Block):
            render_block(piece.source, 20)
        else:
            render_code(piece.text, piece.begin, piece.info)


def test_a_closed_block_waits_for_nothing() -> None:
    splitter = BlockSplitter()
    assert splitter.feed("# Head\n") == [Block("# Head\n", True)]
    assert splitter.feed("text\n") == []
    assert splitter.tail == "text\n"
    assert splitter.feed("\n") == [Block("text\n\n", True)]
    assert splitter.feed("- a\n") == []
    assert splitter.feed("- b\n") == [Block("- a\n", True)]
    assert splitter.feed("\n- c\n") == [Block("- b\n\n", False)]
    assert splitter.flush() == [Block("- c\n", True)]


def test_code_comes_before_it_is_closed() -> None:
    splitter = BlockSplitter()
    assert splitter.feed("```py\nx\n") == []
    assert splitter.is_in_code
    assert splitter.tail == "```py\nx\n"
    (code,) = splitter.feed("y\n" * 7)
    assert code == Code("x\n" + "y\n" * 7, 0, "py", "```py")
    (rest,) = splitter.feed("z\n```\n")
    assert rest == Code("x\n" + "y\n" * 7 + "z\n", 16, "py", None, "```")
    assert splitter.tail == ""


def test_a_fence_inside_code_does_not_close_it() -> None:
    assert sources(split("````md\n```\nx\n```\n````\n", 1)) == ["````md\n```\nx\n```\n````"]
    assert sources(split("~~~\n```\n~~~\n", 1)) == ["~~~\n```\n~~~"]
    assert sources(split("```\n    ```\n```\n", 1)) == ["```\n    ```\n```"]


def plain(source: str, width: int = 60) -> list[str]:
    return [line.plain for line in render_block(source, width)]


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("# Head *two*", ["Head two"]),
        ("a **b** _c_ `d` ~~e~~", ["a b c d e"]),
        ("one\ntwo  \nthree", ["one", "two", "three"]),
        ("[name](http://x.de) <http://y.de>", ["name (http://x.de) http://y.de"]),
        ("![alt](x.png)", ["alt (x.png)"]),
        ("- a\n  - b\n- [ ] c", ["• a", "  ◦ b", "• [ ] c"]),
        ("9. a\n10. b", ["9. a", "10. b"]),
        ("- a\n\n  b", ["• a", "", "  b"]),
        ("> a\n> > b", ["│ a", "│", "│ │ b"]),
        ("---", ["─" * 40]),
        ("<b>html</b> &amp; <!-- x -->", ["<b>html</b> & <!-- x -->"]),
        ("    indented\n      more", ["    indented", "      more"]),
        ("* a\n  ```py\n  x = 1\n  ```", ["• a", "  ```py", "  x = 1", "  ```"]),
    ],
)
def test_how_blocks_look(source: str, lines: list[str]) -> None:
    assert plain(source) == lines


@pytest.mark.parametrize(
    "formula",
    [
        r"\(a_1 * b_1 * c\)",
        r"\[ \{x\} \_ y \]",
        r"$x_1*y_1*z$",
        r"$$a_b * c_d$$",
        r"\boxed{4042}",
        "\\[\n\\begin{aligned}\nx &= *2* \\\\\ny &= _3_\n\\end{aligned}\n\\]",
        "$$\nx_1 * y * z\n$$",
    ],
)
def test_formulas_stay_as_they_are(formula: str) -> None:
    assert plain(formula) == formula.split("\n")
    if "\n" not in formula:
        assert plain(f"so {formula} is") == [f"so {formula} is"]


@pytest.mark.parametrize("text", ["it costs $5 and $6", "a $ b $ c", "$$", "\\$x$ y"])
def test_a_dollar_is_no_formula_by_itself(text: str) -> None:
    assert plain(text) == [text.replace("\\$", "$")]


def test_styles_are_the_terminals_own() -> None:
    (line,) = render_block("a **b** `c`", 40)
    assert {(line.plain[span.start : span.end], str(span.style)) for span in line.spans} == {
        ("b", "bold"),
        ("c", "cyan"),
    }
    (code, *_) = render_code("def f(): pass  # x\n", 0, "python")
    assert ("def", "magenta") in {
        (code.plain[span.start : span.end], str(span.style)) for span in code.spans
    }


def test_code_is_coloured_as_part_of_the_whole() -> None:
    text = 'x = """\nnot code: def\n"""\n'
    (line, *_) = render_code(text, 8, "python")
    assert line.plain == "not code: def"
    assert {str(span.style) for span in line.spans} == {"green"}


def test_a_language_that_nobody_knows_has_no_colours() -> None:
    (line,) = render_code("x = 1\n", 0, "no-such-language")
    assert (line.plain, line.spans) == ("x = 1", [])


TABLE = """\
| Name | Wert | Beschreibung |
|:-----|-----:|:------------:|
| 漢字 | 12 | kurz |
| b | 1,234 | eine lange Zelle mit vielen Worten |
"""


def test_a_table_has_columns() -> None:
    assert plain(TABLE, 70) == [
        "Name   Wert             Beschreibung",
        "────  ─────  ──────────────────────────────────",
        "漢字     12                 kurz",
        "b     1,234  eine lange Zelle mit vielen Worten",
    ]


def test_a_wide_table_is_narrowed_and_a_wider_one_taken_apart() -> None:
    narrowed = plain(TABLE, 30)
    assert all(cell_len(line) <= 30 for line in narrowed)
    assert narrowed[0] == "Name   Wert    Beschreibung"
    assert "b     1,234  eine lange Zelle" in narrowed
    assert plain(TABLE, 20)[:4] == ["Name: 漢字", "Wert: 12", "Beschreibung: kurz", ""]


@pytest.mark.parametrize("width", [10, 13, 40, 79])
def test_lines_fit(width: int) -> None:
    text = "漢字 🙂 some words and 漢字漢字漢字 " * 5
    for source in (text, f"- {text}\n  - {text}", f"> {text}", f"# {text}"):
        assert max(line.cell_len for line in render_block(source, width)) <= max(width, 14)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(text: str, step: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """What stays on a terminal of 40 columns, without colours."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("localr1.cli.live.terminal_size", lambda _: (40, 24))
    stdout = Terminal()
    answer = MarkdownAnswer(Output(stdout, io.StringIO(), color=False), LiveRegion(None))
    for begin in range(0, len(text), step):
        answer.add(text[begin : begin + step])
    answer.finish()
    return stdout.getvalue()


@pytest.mark.parametrize("step", [1, 5, 10_000])
def test_an_answer_is_its_blocks_with_the_space_they_need(
    step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert printed("# A\ntext\n- a\n- b\n\nend\n```\nx\n```\nlast", step, monkeypatch) == (
        "A\n\ntext\n\n• a\n• b\n\nend\n\n```\nx\n```\n\nlast\n"
    )


def test_controls_are_escaped_before_anything_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = printed("a \x1b[2J **\x07** \u202ex\n\n```\n\x9b31m\n```\n", 1, monkeypatch)
    assert shown == "a \\x1b[2J \\x07 \\u202ex\n\n```\n\\x9b31m\n```\n"


def test_what_is_open_is_painted_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    painted: list[list[str]] = []

    class Region(LiveRegion):
        can_paint = True

        def is_due(self) -> bool:
            return True

        def size(self) -> tuple[int, int]:
            return 30, 4

        def paint(self, lines: object, *, dim_from: int = 0) -> None:
            painted.append(list(lines))  # type: ignore[call-overload]

    answer = MarkdownAnswer(Output(Terminal(), io.StringIO(), color=False), Region(None))
    answer.add("open *text")
    assert painted[-1] == ["open *text"]
    answer.add("*\n\nnext")
    assert painted[-1] == ["", "next"]
    answer.add(" word" * 100)
    # Of four rows half, which are four where the terminal gets half as wide.
    assert len(painted[-1]) == 2
    assert painted[-1][-1].endswith("word")
