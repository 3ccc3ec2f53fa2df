"""A reply on its way to the screen: thinking dim, the answer plain, a status line before both."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from localr1.cli.experts import usage_document, usage_line
from localr1.cli.memory import peak_memory_bytes
from localr1.cli.output import Output, Progress, format_bytes
from localr1.engine.events import Delta, Done, Event
from localr1.engine.events import Progress as Prefill

ENDINGS = {
    "length": "ended{} by max_tokens",
    "context": "ended{}: the context is full; /clear starts anew",
    "cancelled": "stopped{}",
}


@dataclass
class Reply:
    """What came of one generation. seconds_thinking: from the start to the last of it."""

    answer: str = ""
    thinking: str = ""
    done: Done | None = None
    seconds_thinking: float = 0.0

    @property
    def rate(self) -> float:
        """New tokens a second, after the first."""
        if self.done is None or self.done.usage.decode_seconds <= 0:
            return 0.0
        return max(self.done.usage.completion_tokens - 1, 0) / self.done.usage.decode_seconds

    def stats_line(self) -> str:
        if self.done is None:
            return "The reply did not end."
        usage = self.done.usage
        cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
        drafted = ""
        if usage.drafted_tokens:
            drafted = f" · drafts {usage.accepted_tokens} of {usage.drafted_tokens} right"
        experts = "" if usage.experts is None else f"\n{usage_line(usage.experts)}"
        return (
            f"{usage.prompt_tokens}{cached}+{usage.completion_tokens} tok · {self.rate:.1f} tok/s"
            f" · TTFT {usage.prefill_seconds:.2f} s · peak {format_bytes(peak_memory_bytes())}"
            f"{drafted}{experts}"
        )

    def to_json(self) -> dict[str, Any]:
        assert self.done is not None
        usage = self.done.usage
        return {
            "answer": self.answer,
            "thinking": self.thinking,
            "finish_reason": self.done.reason,
            **({} if self.done.closed is None else {"thinking_closed": self.done.closed}),
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "completion_tokens": usage.completion_tokens,
                "thinking_tokens": usage.thinking_tokens,
                "drafted_tokens": usage.drafted_tokens,
                "accepted_tokens": usage.accepted_tokens,
            },
            "time_to_first_token_s": round(usage.prefill_seconds, 4),
            "tokens_per_second": round(self.rate, 2),
            **({} if usage.experts is None else {"experts": usage_document(usage.experts)}),
        }


@dataclass(frozen=True)
class ReplyStyle:
    """answer: whether it is printed as it comes. thinking: the stream it is shown on, None for
    hidden. folded_hint: follows "Thought for 3 s" where thinking was hidden; "" prints neither."""

    answer: bool = True
    thinking: str | None = "stdout"
    folded_hint: str = ""


class ReplyPrinter:
    """Prints the events of one reply as they come."""

    def __init__(self, output: Output, style: ReplyStyle) -> None:
        self.output = output
        self.style = style
        self.reply = Reply()
        self._begin = time.monotonic()

    def print(self, events: Iterable[Event]) -> Reply:
        """Returns what the events made. What was printed ends with a line break in any case."""
        with self.output.progress("Reading the prompt") as status:
            try:
                for event in events:
                    if isinstance(event, Prefill):
                        status.update(event.done, event.total)
                    elif isinstance(event, Done):
                        self.reply.done = event
                    elif event.channel == "thinking":
                        self._think(event, status)
                    else:
                        self._answer(event, status)
            finally:
                status.clear()
                self._end()
        return self.reply

    def _think(self, delta: Delta, status: Progress) -> None:
        self.reply.thinking += delta.text
        self.reply.seconds_thinking = time.monotonic() - self._begin
        if self.style.thinking is None:
            status.paint(f"Thinking… {self.reply.seconds_thinking:.0f} s")
        else:
            status.clear()
            self.output.text(delta.text, dim=True, stream=self.style.thinking)

    def _answer(self, delta: Delta, status: Progress) -> None:
        status.clear()
        if not self.reply.answer and self.reply.thinking:
            if self.style.thinking is not None:
                self._finish_line(self.reply.thinking, self.style.thinking)
                self.output.text("\n", stream=self.style.thinking)
            elif self.style.folded_hint:
                seconds = f"{self.reply.seconds_thinking:.0f} s"
                self.output.note(f"Thought for {seconds}{self.style.folded_hint}")
        self.reply.answer += delta.text
        if self.style.answer:
            self.output.text(delta.text)

    def _end(self) -> None:
        reply, style = self.reply, self.style
        if reply.answer:
            if style.answer:
                self._finish_line(reply.answer, "stdout")
        elif reply.thinking and style.thinking is not None:
            self._finish_line(reply.thinking, style.thinking)
        if reply.done is not None and reply.done.reason in ENDINGS:
            inside = " inside its thinking" if reply.thinking and not reply.answer else ""
            self.output.note(f"({ENDINGS[reply.done.reason].format(inside)})")

    def _finish_line(self, text: str, stream: str) -> None:
        if not text.endswith("\n"):
            self.output.text("\n", stream=stream)
