"""Token ids to text as they come, never half a character."""

from collections.abc import Callable

from localr1.errors import TokenizerError

REPLACEMENT = "\ufffd"
MAX_HELD = 3
"""Replacement characters at the end that may still become one character: one for each byte of an
incomplete character of at most four (some decoders write one for all of them together)."""
WINDOW = 32
"""Tokens without a clean end after which the window is cut: text that never ends cleanly (a model
that says U+FFFD for ever) must not cost more with every token."""


class TokenStream:
    """One sequence of tokens, decoded a window at a time.

    A window starts where the text last ended on a whole character. decode: ids to text. anchor: an
    ordinary token or none; later windows are decoded behind it, since some decoders drop the space
    in front of the first token of what they are given.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], vocab_size: int, anchor: list[int]
    ) -> None:
        self._decode = decode
        self._vocab_size = vocab_size
        self._anchor = anchor
        self._context: list[int] = []
        self._context_length = 0
        self._window: list[int] = []
        self._sent = 0  # Characters of the window's text that were returned.

    def step(self, identifier: int) -> str | None:
        """The text that token `identifier` completes, None when there is none yet."""
        if not 0 <= identifier < self._vocab_size:
            raise TokenizerError(
                "token id", expected=f"from 0 to {self._vocab_size - 1}", found=identifier
            )
        self._window.append(identifier)
        text = self._text_of(self._window)
        end = len(text)
        while end > 0 and len(text) - end < MAX_HELD and text[end - 1] == REPLACEMENT:
            end -= 1
        new = text[self._sent : end]
        self._sent = max(self._sent, end)
        if text and end == len(text):
            self._next_window([], 0)
        elif len(self._window) > WINDOW:
            self._cut(text)
        return new or None

    def flush(self) -> str:
        """What is left at the end: half characters as U+FFFD. The stream starts anew."""
        text = self._text_of(self._window)[self._sent :] if self._window else ""
        self._context, self._context_length, self._window, self._sent = [], 0, [], 0
        return text

    def _next_window(self, window: list[int], sent: int) -> None:
        if self._context is not self._anchor:
            self._context = self._anchor
            self._context_length = len(self._decode(self._anchor)) if self._anchor else 0
        self._window = window
        self._sent = sent

    def _text_of(self, window: list[int]) -> str:
        return self._decode(self._context + window)[self._context_length :]

    def _cut(self, text: str) -> None:
        """Start a window near the end, at a place that divides the text without changing it and
        behind which nothing was returned yet that is not decoded again."""
        anchor_length = len(self._decode(self._anchor)) if self._anchor else 0
        last = len(self._window) - MAX_HELD
        for start in range(last, max(last - 4 * MAX_HELD, 0), -1):
            head = self._text_of(self._window[:start])
            tail = self._window[start:]
            if len(head) > self._sent:
                continue
            if head + self._decode(self._anchor + tail)[anchor_length:] == text:
                self._next_window(tail, self._sent - len(head))
                return
