"""Thinking on its way to the screen: whole, or a status line above its last lines, or folded."""

import time
from dataclasses import dataclass
from typing import Literal, TypeAlias

from localr1.cli.cells import wrapped
from localr1.cli.live import MIN_COLUMNS, LiveRegion

ThinkView: TypeAlias = Literal["full", "tail", "hidden"]
TAIL_LINES = 6
"""At the most."""
INDENT = "  "


@dataclass
class Pace:
    """How a reply gets on. begin: when it was asked for; first: when its first token came, by the
    same clock. prompt_tokens, tokens: read and generated. context: what both must fit."""

    context: int
    begin: float
    first: float | None = None
    prompt_tokens: int = 0
    tokens: int = 0

    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def status(self, doing: str) -> str:
        """ "Thinking… 12 s · 412 tok · 34 tok/s · ctx 9%"."""
        parts = [f"{doing}… {self.seconds():.0f} s", f"{self.tokens} tok"]
        if self.first is not None and self.tokens > 1:
            elapsed = max(time.monotonic() - self.first, 1e-3)
            parts.append(f"{(self.tokens - 1) / elapsed:.0f} tok/s")
        parts.append(f"ctx {(self.prompt_tokens + self.tokens) / self.context:.0%}")
        return " · ".join(parts)


def folded(seconds: float, tokens: int, hint: str = "") -> str:
    """What stays of a thought: "Thought for 12 s (412 tokens) — /think to show"."""
    count = "1 token" if tokens == 1 else f"{tokens:,} tokens"
    return f"Thought for {seconds:.0f} s ({count}){hint}"


class LiveThinking:
    """One status line, and below it the thought's last lines, dim, unless it is hidden."""

    def __init__(self, region: LiveRegion, pace: Pace, *, shows_tail: bool) -> None:
        self._region = region
        self._pace = pace
        self._shows_tail = shows_tail
        self._text = ""

    def add(self, text: str) -> None:
        columns, _ = self._region.size()
        # The last rows alone are ever shown; a row holds at most as many characters as cells, but
        # for marks that take none.
        self._text = (self._text + text)[-4 * columns * TAIL_LINES :]
        if self._region.is_due():
            self.paint()

    def paint(self) -> None:
        lines = [self._pace.status("Thinking")]
        if self._shows_tail:
            columns, _ = self._region.size()
            tail = list(wrapped(self._text.strip("\n"), max(columns - len(INDENT), 2)))
            lines += [INDENT + line for line in tail[-TAIL_LINES:]]
            # Room for the status is taken first.
            last = self._region.last_lines([*lines[1:], lines[0]], narrowed_to=MIN_COLUMNS)
            lines = [lines[0], *last[:-1]]
        self._region.paint(lines)

    def finish(self) -> None:
        self._region.clear()
