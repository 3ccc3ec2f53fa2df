"""What reaches a stream: data apart from messages, no escapes on a pipe, none from a model."""

import io
import json
import unicodedata

import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localr1.cli import output as output_module
from localr1.cli.output import Output, Progress, escape_controls, format_bytes
from localr1.settings import Settings


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def a_capable_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\n\ttext", "plain\n\ttext"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("a\rb\x00\x7f\x85", r"a\x0db\x00\x7f\x85"),
        ("naïve 漢字 🙂", "naïve 漢字 🙂"),
    ],
)
def test_control_characters_are_shown(text: str, shown: str) -> None:
    assert escape_controls(text) == shown


@given(st.text())
def test_no_control_character_survives(text: str) -> None:
    left = escape_controls(text)
    assert all(char in "\n\t" or unicodedata.category(char) != "Cc" for char in left)


@given(st.text(), st.integers(0, 50))
def test_escaping_does_not_depend_on_where_a_stream_is_cut(text: str, cut: int) -> None:
    assert escape_controls(text[:cut]) + escape_controls(text[cut:]) == escape_controls(text)


def test_a_pipe_gets_no_escape_sequence() -> None:
    stdout, stderr = io.StringIO(), io.StringIO()
    output = Output(stdout, stderr)
    output.text("answer \x1b[31m", dim=True)
    output.note("note")
    output.error("broken")
    with output.progress("working") as status:
        status.update(1, 2)
    assert "\x1b" not in stdout.getvalue() + stderr.getvalue()
    assert "\r" not in stderr.getvalue()
    assert "working" not in stderr.getvalue()


def test_a_terminal_gets_dim_text_and_a_progress_line_that_goes_away() -> None:
    stdout, stderr = Terminal(), Terminal()
    output = Output(stdout, stderr)
    output.text("thinking", dim=True)
    assert stdout.getvalue().startswith("\x1b[2m")
    with output.progress("working") as status:
        status.update(2, 2)
    assert "working 100%" in stderr.getvalue()
    assert stderr.getvalue().endswith("\r \x1b[J\r\x1b[K")


@pytest.mark.parametrize(
    ("variables", "stream", "styled"),
    [
        ({}, Terminal, True),
        ({"NO_COLOR": "1"}, Terminal, False),
        ({"FORCE_COLOR": "1"}, io.StringIO, True),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, Terminal, False),
        ({"NO_COLOR": ""}, Terminal, True),
    ],
)
def test_no_color_and_force_color(
    variables: dict[str, str],
    stream: type[io.StringIO],
    styled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    stderr = stream()
    output = Output(io.StringIO(), stderr, color=Settings.from_environment().color)
    output.text("dim", dim=True, stream="stderr")
    output.error("broken")
    assert ("\x1b[" in stderr.getvalue()) == styled


def test_data_and_messages_go_to_their_own_stream() -> None:
    stdout, stderr = io.StringIO(), io.StringIO()
    output = Output(stdout, stderr)
    output.line("data")
    output.json({"é": 1}, indent=None)
    output.note("note")
    output.error("first\nsecond")
    assert stdout.getvalue() == 'data\n{"\\u00e9": 1}\n'
    assert json.loads(stdout.getvalue().splitlines()[1]) == {"é": 1}
    assert stderr.getvalue() == "note\nerror: first second\n"


def test_long_lines_are_not_wrapped() -> None:
    stdout = io.StringIO()
    Output(stdout, io.StringIO()).line("word " * 100)
    assert stdout.getvalue() == "word " * 100 + "\n"


def test_columns_are_aligned() -> None:
    stdout = io.StringIO()
    Output(stdout, io.StringIO()).table(("name", "size"), [("a", "1"), ("longer", "1,000")])
    assert stdout.getvalue() == "name     size\na           1\nlonger  1,000\n"


def test_a_progress_line_overwrites_a_longer_one() -> None:
    stream = Terminal()
    line = Progress("", stream)
    line.paint("a long line")
    line.paint("short")
    assert stream.getvalue() == "\ra long line\rshort      "


def test_a_progress_line_never_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_module, "terminal_size", lambda _: (10, 24))
    stream = Terminal()
    line = Progress("", stream)
    line.paint("0123456789\n")
    line.clear()
    assert stream.getvalue() == "\r01234567…\r         \r"


def test_of_a_progress_line_nothing_is_left_when_the_terminal_wrapped_it() -> None:
    screen = pyte.Screen(20, 6)
    stream = Terminal()
    line = Progress("", stream, erases=True)
    line.paint("a status that is wider than this terminal")
    pyte.Stream(screen).feed("above\r\n" + stream.getvalue())
    assert screen.display[2].strip() == "", "cut, as the terminal is narrower than it says"
    assert (screen.cursor.x, screen.cursor.y) == (0, 1)
    stream.truncate(0)
    line.clear()
    # As terminals wrap it anew: the cursor stays at the beginning of the line.
    pyte.Stream(screen).feed("status of\r\ntwo rows\x1b[A" + stream.getvalue())
    assert "".join(screen.display).split() == ["above"]


def test_a_size_that_is_not_known() -> None:
    assert output_module.terminal_size(io.StringIO()) == output_module.FALLBACK_SIZE


def test_a_message_is_broken_between_words_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(output_module, "terminal_size", lambda _: (24, 24))
    path = "/a/path/that/is/longer/than/the/terminal"
    for stream, broken in ((Terminal(), True), (io.StringIO(), False)):
        output = Output(io.StringIO(), stream, is_plain=True)
        output.error(f"{path}: there is no such file or directory")
        output.note("a note that does not fit")
        assert stream.getvalue() == (
            f"error: {path}:\nthere is no such file\nor directory\na note that does not\nfit\n"
            if broken
            else f"error: {path}: there is no such file or directory\na note that does not fit\n"
        )


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (96_000_000, "91.6 MiB"), (2**40, "1.0 TiB")],
)
def test_bytes_in_binary_units(count: int, text: str) -> None:
    assert format_bytes(count) == text
