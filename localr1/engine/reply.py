"""Tokens to pieces of text: decoded, split into thinking and answer, ended by stop texts."""

from collections.abc import Sequence

from localr1.engine.events import Delta
from localr1.engine.stop import StopMatcher
from localr1.engine.think import ThinkSplitter
from localr1.tokenizer import Tokenizer


class Reply:
    """in_thinking: whether the prompt left a thinking block open."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], in_thinking: bool) -> None:
        self._stream = tokenizer.stream()
        self._splitter = ThinkSplitter(in_thinking)
        self._stops = StopMatcher(stops)

    @property
    def in_thinking(self) -> bool:
        return self._splitter.in_thinking

    @property
    def has_stopped(self) -> bool:
        return self._stops.has_stopped

    def step(self, token: int) -> list[Delta]:
        text = self._stream.step(token)
        return [] if text is None else self._deltas(text)

    def flush(self) -> list[Delta]:
        """The rest, when no token follows."""
        deltas = self._deltas(self._stream.flush())
        for channel, text in self._splitter.flush():
            shown = text if channel == "thinking" else self._stops.feed(text)
            deltas += [Delta(channel, shown)] if shown else []
        rest = self._stops.flush()
        return [*deltas, Delta("answer", rest)] if rest else deltas

    def _deltas(self, text: str) -> list[Delta]:
        deltas = []
        for channel, piece in self._splitter.feed(text):
            shown = piece if channel == "thinking" else self._stops.feed(piece)
            if shown:
                deltas.append(Delta(channel, shown))
        return deltas
