"""Thinking and answer, told apart in a stream whose pieces may cut the marks anywhere."""

from localr1.chat_template import THINK_CLOSE, THINK_OPEN
from localr1.engine.events import Channel
from localr1.engine.stop import held_back


class ThinkSplitter:
    """Splits a reply into ("thinking" | "answer", text) pieces, without the marks.

    A reply thinks if its prompt left a thinking block open, or if it begins with <think> (white
    space before that is dropped); a <think> further on is text like any other. The first </think>
    ends it. Line breaks behind either mark are dropped.
    """

    def __init__(self, starts_in_thinking: bool) -> None:
        self.in_thinking = starts_in_thinking
        self._is_at_start = not starts_in_thinking
        self._drops_newlines = starts_in_thinking
        self._held = ""

    def feed(self, text: str) -> list[tuple[Channel, str]]:
        """The pieces that are certain now, none of them empty."""
        text = self._held + text
        self._held = ""
        if self._is_at_start:
            stripped = text.lstrip()
            if len(stripped) < len(THINK_OPEN) and THINK_OPEN.startswith(stripped):
                self._held = text
                return []
            self._is_at_start = False
            if stripped.startswith(THINK_OPEN):
                text = stripped[len(THINK_OPEN) :]
                self.in_thinking = self._drops_newlines = True
        pieces: list[tuple[Channel, str]] = []
        if self.in_thinking:
            thought, closed, rest = text.partition(THINK_CLOSE)
            if not closed:
                return self._hold_thought(text)
            self._add(pieces, "thinking", thought)
            self.in_thinking = False
            self._drops_newlines = True
            text = rest
        self._add(pieces, "answer", text)
        return pieces

    def flush(self) -> list[tuple[Channel, str]]:
        """What was held back, now that nothing follows."""
        pieces: list[tuple[Channel, str]] = []
        text, self._held = self._held, ""
        self._is_at_start = False
        self._add(pieces, "thinking" if self.in_thinking else "answer", text)
        return pieces

    def _hold_thought(self, text: str) -> list[tuple[Channel, str]]:
        keep = len(text) - held_back(text, [THINK_CLOSE])
        pieces: list[tuple[Channel, str]] = []
        self._held = text[keep:]
        self._add(pieces, "thinking", text[:keep])
        return pieces

    def _add(self, pieces: list[tuple[Channel, str]], channel: Channel, text: str) -> None:
        if self._drops_newlines:
            text = text.lstrip("\n")
            self._drops_newlines = not text
        if text:
            pieces.append((channel, text))
