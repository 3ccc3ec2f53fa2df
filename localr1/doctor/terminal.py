"""Whether text, colours and the clock are fit."""

import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from localr1.doctor.finding import Finding, Verdict
from localr1.settings import Surroundings

NARROW: Final = 60
"""Columns below which tables and the status line of the chat are cut."""
TOLERANCE: Final = 86400.0
"""Seconds by which a clock may lie before what it was when localr1 was installed."""


@dataclass(frozen=True)
class TerminalFacts:
    """encoding: of stdout. colors: rich's name of what the terminal shows, "" for none. now,
    installed: seconds since 1970."""

    is_terminal: bool
    encoding: str
    locale: str
    terminal: str
    columns: int
    colors: str
    color_variable: str
    is_windows: bool
    now: float
    installed: float


def read_terminal(surroundings: Surroundings, console: Any, installed: Path) -> TerminalFacts:
    """console: rich's of stdout. installed: a file that was written when localr1 was installed."""
    stream = console.file
    try:
        written = installed.stat().st_mtime
    except OSError:
        written = 0.0
    return TerminalFacts(
        is_terminal=bool(stream.isatty()),
        encoding=str(getattr(stream, "encoding", None) or "unknown"),
        locale=surroundings.locale,
        terminal=surroundings.terminal,
        columns=int(console.width),
        colors=str(console.color_system or ""),
        color_variable=surroundings.color_variable,
        is_windows=sys.platform == "win32",
        now=time.time(),
        installed=written,
    )


def terminal_findings(facts: TerminalFacts) -> tuple[Finding, ...]:
    return (_text(facts), _colors(facts), _clock(facts))


def is_utf8(encoding: str) -> bool:
    return encoding.lower().replace("-", "").replace("_", "") in ("utf8", "utf8sig", "cp65001")


def _text(facts: TerminalFacts) -> Finding:
    value = facts.encoding + (f" ({facts.locale})" if facts.locale else "")
    if is_utf8(facts.encoding):
        return Finding("text", value)
    return Finding(
        "text",
        value,
        Verdict.NOTE,
        f"the encoding {facts.encoding} lacks characters that models write, which are shown as "
        "question marks",
        "set PYTHONUTF8=1, and in a console of old, `chcp 65001`"
        if facts.is_windows
        else "set LANG to a locale with UTF-8, such as C.UTF-8, or PYTHONUTF8=1",
    )


def _colors(facts: TerminalFacts) -> Finding:
    if not facts.is_terminal:
        # Colour on a pipe is only ever wanted by name.
        forced = facts.color_variable == "FORCE_COLOR"
        return Finding(
            "terminal",
            "none: the output goes to a file or a program" + (", in colour" if forced else ""),
        )
    shown = {"": "no colours", "standard": "8 colours", "256": "256 colours"}
    colors = shown.get(facts.colors, "full colours")
    if facts.color_variable == "NO_COLOR":
        colors += " (NO_COLOR)"
    value = f"{facts.terminal or 'a console'}, {facts.columns} columns, {colors}"
    if facts.terminal == "dumb":
        return Finding(
            "terminal",
            value,
            Verdict.NOTE,
            "TERM=dumb says that the terminal cannot move its cursor, so the chat is plain",
            "set TERM=xterm-256color if it can",
        )
    if facts.columns < NARROW:
        return Finding(
            "terminal",
            value,
            Verdict.NOTE,
            f"tables take {NARROW} columns",
            "widen the window",
        )
    return Finding("terminal", value)


def _clock(facts: TerminalFacts) -> Finding:
    value = _date(facts.now)
    if facts.now >= facts.installed - TOLERANCE:
        return Finding("clock", value)
    return Finding(
        "clock",
        value,
        Verdict.PROBLEM,
        f"that is before localr1 was installed ({_date(facts.installed)}), and with a clock that "
        "is wrong no secure connection to the Hub can be made",
        "set the clock, or switch on that the system sets it from the network",
    )


def _date(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, OSError, ValueError):
        return "no date at all"
