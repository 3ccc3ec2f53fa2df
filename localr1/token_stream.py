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

    A window starts where the text last ended on a whole character. The tokens of the window before
    it are decoded again with it, since some decoders drop the space in front of the first token.
    """

    def __init__(self, decode: Callable[[list[int]], str], vocab_size: int) -> None:
        self._decode = decode
        self._vocab_size = vocab_size
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
        text = self._window_text()
        end = len(text)
        while end > 0 and len(text) - end < MAX_HELD and text[end - 1] == REPLACEMENT:
            end -= 1
        new = text[self._sent : end]
        self._sent = max(self._sent, end)
        if end == len(text) and text:
            self._start_window(self._window, [], 0)
        elif len(self._window) > WINDOW:
            self._cut(text)
        return new or None

    def flush(self) -> str:
        """What is left at the end: half characters as U+FFFD. The stream starts anew."""
        text = self._window_text()[self._sent :] if self._window else ""
        self._start_window([], [], 0)
        return text

    def _window_text(self) -> str:
        return self._decode(self._context + self._window)[self._context_length :]

    def _start_window(self, context: list[int], window: list[int], sent: int) -> None:
        self._context = context
        self._context_length = len(self._decode(context)) if context else 0
        self._window = window
        self._sent = sent

    def _cut(self, text: str) -> None:
        """Start a window near the end, at a place that divides the text without changing it."""
        for start in range(len(self._window) - MAX_HELD - 1, len(self._window) - 3 * MAX_HELD, -1):
            head, tail = self._window[:start], self._window[start:]
            head_text = self._decode(self._context + head)[self._context_length :]
            if head_text + self._decode(tail) == text:
                self._context, self._context_length = [], 0
                self._window, self._sent = tail, max(0, self._sent - len(head_text))
                return
