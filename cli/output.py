"""The one object that prints: data to stdout, everything else to stderr.

No ANSI sequence reaches a pipe; NO_COLOR and FORCE_COLOR are honoured. Text that comes from a model
or a file is shown with its control characters (C0, C1, and thereby every escape and OSC sequence)
escaped, so that it cannot drive the terminal; so are the characters that reorder what is around
them, so that it cannot show one text and be another (Boucher and Anderson 2021, "Trojan Source").
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from localr1.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

# C0 without newline and tab, DEL, C1; Unicode's embeddings, overrides and isolates. The marks that
# right-to-left text needs of itself stay.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# Seconds between two repaintings of a progress line.
REPAINT_SECONDS = 0.1
FALLBACK_SIZE = (80, 24)
# ECMA-48; DEC's automatic wrapping.
ERASE_TO_END_OF_SCREEN = "\x1b[J"
WRAP_OFF, WRAP_ON = "\x1b[?7l", "\x1b[?7h"
# All from this line on. Not from the screen's very corner: tmux then keeps it to be scrolled up to.
ERASE_FROM_LINE = f"\r {ERASE_TO_END_OF_SCREEN}\r\x1b[K"


def escape_controls(text: str) -> str:
    r"""Control characters in the form \x1b or \u202e; newline and tab stay. Works on any piece of a
    stream, since each character stands for itself."""
    return CONTROL.sub(lambda match: escaped(match.group()), text)


def escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def terminal_size(stream: TextIO) -> tuple[int, int]:
    """(columns, rows) as they are now, whatever COLUMNS says."""
    try:
        size = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        return FALLBACK_SIZE
    # Some pseudo-terminals say 0 before anyone has told them.
    return size.columns or FALLBACK_SIZE[0], size.lines or FALLBACK_SIZE[1]


def erase_at_once(stream: TextIO) -> None:
    """All from the cursor's line on, past the stream's buffer, in which a signal's handler may not
    write."""
    os.write(stream.fileno(), f"{WRAP_ON}{ERASE_FROM_LINE}".encode("ascii"))


@dataclass
class Progress:
    """One line on a terminal, rewritten in place and cut to its width; nothing at all where there
    is no terminal.

    erases: whether the terminal knows how to erase, else spaces must do. If so, nothing is left of
    the line however narrow the terminal gets (as in live.py).
    """

    label: str
    stream: TextIO | None
    erases: bool = False
    last_painted: float = 0.0
    width: int = 0
    begin: float = field(default_factory=time.monotonic)

    def update(self, done: float, total: float, detail: str = "") -> None:
        """done of total, in any unit; the time left is extrapolated from the rate so far."""
        if self.stream is None:
            return
        now = time.monotonic()
        if now - self.last_painted < REPAINT_SECONDS and done < total:
            return
        self.last_painted = now
        share = min(done / total, 1.0) if total > 0 else 0.0
        elapsed = now - self.begin
        left = f", {elapsed / share - elapsed:.0f} s left" if 0.02 < share < 1 else ""
        self.paint(f"{self.label} {share:4.0%}{left}{'  ' + detail if detail else ''}")

    def paint(self, line: str) -> None:
        if self.stream is None:
            return
        from localr1.cli.cells import cells, fit

        line = fit(escape_controls(line).replace("\n", " "), terminal_size(self.stream)[0] - 1)
        width = cells(line)
        if self.erases:
            line = f"{WRAP_OFF}{line}{ERASE_TO_END_OF_SCREEN}\r{WRAP_ON}"
        else:
            line += " " * max(self.width - width, 0)
        self.stream.write(f"\r{line}")
        self.stream.flush()
        self.width = width

    def erase_at_once(self) -> None:
        """`clear`, from a signal's handler."""
        if self.stream is not None and self.width and self.erases:
            erase_at_once(self.stream)
            self.width = 0

    def clear(self) -> None:
        if self.stream is not None and self.width:
            blank = "\r" + " " * self.width + "\r"
            self.stream.write(ERASE_FROM_LINE if self.erases else blank)
            self.stream.flush()
            self.width = 0


class Output:
    """stdout, stderr: default to the process's own at the time of construction. color: as in
    Settings: False for none, True for always, None for terminals only. is_plain: no styles and
    nothing rewritten, also on a terminal: for a screen reader or a log of the session."""

    def __init__(
        self,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        *,
        color: bool | None = None,
        is_plain: bool = False,
    ) -> None:
        self.stdout = stdout or sys.stdout
        self.stderr = stderr or sys.stderr
        self.color = False if is_plain else color
        self.is_plain = is_plain
        self._consoles: dict[str, Console] = {}

    @staticmethod
    def from_environment() -> "Output":
        return Output(color=Settings.from_environment().color)

    def console(self, name: str) -> "Console":
        """rich's view of "stdout" or "stderr"; made when first needed, for rich takes 80 ms."""
        if name not in self._consoles:
            from rich.console import Console

            stream = self.stdout if name == "stdout" else self.stderr
            self._consoles[name] = Console(
                file=stream,
                force_terminal=True if self.color else None,
                color_system=None if self.color is False else "auto",
            )
        return self._consoles[name]

    def is_terminal(self, name: str) -> bool:
        """Whether a person watches this stream (colour alone, forced on a pipe, does not count)."""
        return (self.stdout if name == "stdout" else self.stderr).isatty()

    def moves_cursor(self, name: str) -> bool:
        """Whether this stream is a terminal that can erase and rewrite what it shows."""
        console = self.console(name)
        knows_how = not (console.is_dumb_terminal or console.legacy_windows)
        return self.is_terminal(name) and knows_how and not self.is_plain

    def has_styles(self, name: str) -> bool:
        """Whether text on this stream may be bold, dim or coloured."""
        return self.console(name).color_system is not None

    def text(self, text: str, *, dim: bool = False, stream: str = "stdout") -> None:
        """A piece of running text, escaped, unwrapped, without a newline of its own."""
        console = self.console(stream)
        console.out(escape_controls(text), end="", style="dim" if dim else None, highlight=False)
        console.file.flush()

    def prose(self, text: str, *, dim: bool = False, stream: str = "stdout") -> None:
        """Whole lines for the person watching: as `text`, but on a terminal broken between words
        where that would break a line inside one. No word is broken, so that a long path can be
        copied whole."""
        self.text(self._broken(text, stream) + "\n", dim=dim, stream=stream)

    def line(self, text: str = "") -> None:
        """One line of data on stdout."""
        self.text(text + "\n")

    def note(self, text: str) -> None:
        """One line for the person watching, on stderr."""
        self.prose(text, dim=True, stream="stderr")

    def error(self, text: str) -> None:
        """One line that says what failed, on stderr."""
        label = "error: "
        one_line = label + " ".join(escape_controls(text).split())
        console = self.console("stderr")
        console.out(label, end="", style="bold red")
        # A break right behind the label is the space that it has anyway.
        console.out(self._broken(one_line, "stderr")[len(label) :], highlight=False)

    def _broken(self, text: str, name: str) -> str:
        if not self.is_terminal(name):
            return text
        from localr1.cli.cells import wrapped_words

        columns = terminal_size(self.stdout if name == "stdout" else self.stderr)[0] - 1
        return "\n".join(wrapped_words(escape_controls(text), columns))

    def json(self, value: Any, *, indent: int | None = 2) -> None:
        """A JSON document on stdout. ASCII, so that no encoding can spoil it."""
        self.stdout.write(json.dumps(value, indent=indent) + "\n")
        self.stdout.flush()

    def fields(self, values: Mapping[str, str]) -> None:
        """Names and values in two columns."""
        width = max(len(name) for name in values)
        for name, value in values.items():
            self.line(f"{name:<{width}}  {value}")

    def table(
        self, header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)
    ) -> None:
        """Columns as wide as their content, aligned to the right but for those in `left`."""
        table = [list(header), *(list(row) for row in rows)]
        widths = [max(len(row[column]) for row in table) for column in range(len(header))]
        for row in table:
            cells = [
                f"{cell:<{width}}" if column in left else f"{cell:>{width}}"
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            self.line("  ".join(cells).rstrip())

    @contextmanager
    def progress(self, label: str) -> Iterator[Progress]:
        """A progress line on stderr, gone when the block ends."""
        shown = self.is_terminal("stderr") and not self.is_plain
        line = Progress(
            label, self.stderr if shown else None, shown and self.moves_cursor("stderr")
        )
        line.paint(label)
        try:
            yield line
        finally:
            line.clear()


def format_bytes(count: float) -> str:
    """Binary units, as memory and files are counted: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
