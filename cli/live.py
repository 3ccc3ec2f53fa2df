"""A few lines at the end of the screen that are painted again and again, and gone without a trace.

Between two paintings the cursor rests at the beginning of the region's first line. So erasing needs
no count of lines: whatever the terminal did to them meanwhile (wrapped them when it became
narrower, cut them off, scrolled), they lie behind the cursor. What was printed above is never
touched, and no line is as wide as the screen; where it is narrower than it says, as just after it
became so, lines are cut instead of wrapped, and the way back up is right all the same.

What has left the screen at the top cannot be erased. So a region is lower than the screen, by what
it may grow when the terminal becomes narrower and wraps its lines anew (`last_lines`).
"""

import time
from collections.abc import Sequence
from typing import TextIO

from localr1.cli.cells import fit, num_rows
from localr1.cli.output import (
    ERASE_FROM_LINE,
    ERASE_TO_END_OF_SCREEN,
    FALLBACK_SIZE,
    WRAP_OFF,
    WRAP_ON,
    erase_at_once,
    escape_controls,
    terminal_size,
)

REPAINT_SECONDS = 0.05
PAINTING_SHARE = 0.02
"""Of the time, that painting may take beyond that: tokens that come several at once are all seen at
once, also where the next ones take a second."""
MIN_COLUMNS = 20
MIN_ROWS = 6
"""A smaller terminal gets one line, or none."""

# ECMA-48 and xterm's "synchronized output", which a terminal that lacks it ignores.
ERASE_TO_END_OF_LINE = "\x1b[K"
UP = "\x1b[{}A"
BEGIN_FRAME = f"\x1b[?2026h{WRAP_OFF}"
END_FRAME = f"{WRAP_ON}\x1b[?2026l"
DIM, RESET = "\x1b[2m", "\x1b[0m"


class LiveRegion:
    """stream: a terminal that moves its cursor, or None: then nothing is ever painted.
    has_styles: whether lines may be dim."""

    def __init__(self, stream: TextIO | None, *, has_styles: bool = True) -> None:
        self._stream = stream
        self._has_styles = has_styles
        self._begin = time.monotonic()
        self._last_painted = 0.0
        self._seconds_spent = 0.0
        self.is_shown = False

    @property
    def can_paint(self) -> bool:
        return self._stream is not None

    def is_due(self) -> bool:
        """Whether it is time for another painting."""
        if not self.can_paint:
            return False
        now = time.monotonic()
        may_spend = PAINTING_SHARE * (now - self._begin)
        return self._seconds_spent < may_spend or now - self._last_painted >= REPAINT_SECONDS

    def size(self) -> tuple[int, int]:
        """(columns, rows) that lines may use: a column less than the terminal has, as a full line
        wraps in some, and a row less, as the cursor needs one."""
        columns, rows = FALLBACK_SIZE if self._stream is None else terminal_size(self._stream)
        return columns - 1, rows - 1

    def last_lines(self, lines: Sequence[str], *, narrowed_to: int) -> Sequence[str]:
        """The last of `lines`, as many as are all still on the screen when the terminal gets as
        narrow as `narrowed_to` columns at once. (Dragged, it does so in small steps, with a
        painting after each.)"""
        columns, rows = self.size()
        columns = max(min(narrowed_to, columns + 1), 1)
        kept = 0
        for line in reversed(lines):
            rows -= num_rows(line, columns)
            if rows < 0:
                break
            kept += 1
        return lines[len(lines) - kept :]

    def paint(self, lines: Sequence[str], *, dim_from: int = 0) -> None:
        """Show these lines in place of those before: escaped, cut to the width and, from the end,
        to the height. The lines from `dim_from` on are dim."""
        if self._stream is None or not lines:
            self.clear()
            return
        begin = time.monotonic()
        columns, rows = self.size()
        if columns + 1 < MIN_COLUMNS or rows + 1 < MIN_ROWS:
            lines = lines[:1]
        lines = lines[:rows]
        parts = [BEGIN_FRAME]
        for number, line in enumerate(lines):
            text = fit(escape_controls(line).replace("\n", " ").expandtabs(4), columns)
            styled = self._has_styles and number >= dim_from
            parts.append(f"{DIM}{text}{RESET}" if styled else text)
            parts.append(ERASE_TO_END_OF_LINE)
            parts.append("\n" if number + 1 < len(lines) else "")
        parts.append(ERASE_TO_END_OF_SCREEN)
        if len(lines) > 1:
            parts.append(UP.format(len(lines) - 1))
        parts += ["\r", END_FRAME]
        self._write("".join(parts))
        self._last_painted = time.monotonic()
        self._seconds_spent += self._last_painted - begin
        self.is_shown = True

    def clear(self) -> None:
        """Erase the region; the next text begins where its first line was."""
        if self.is_shown:
            self._write(ERASE_FROM_LINE)
            self.is_shown = False

    def erase_at_once(self) -> None:
        """`clear`, from a signal's handler."""
        if self.is_shown and self._stream is not None:
            erase_at_once(self._stream)
            self.is_shown = False

    def _write(self, text: str) -> None:
        assert self._stream is not None
        self._stream.write(text)
        self._stream.flush()
