"""A reply on its way to the screen: thinking dim, the answer plain, a status line before both."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from localr1.cli.memory import peak_memory_bytes
from localr1.cli.output import Output, Progress, format_bytes
from localr1.engine.events import Delta, Done, Event
from localr1.engine.events import Progress as Prefill


@dataclass
class Reply:
    """What came of one generation. seconds: until the first token (of any kind), of thinking, and
    altogether."""

    answer: str = ""
    thinking: str = ""
    done: Done | None = None
    seconds_to_first: float = 0.0
    seconds_thinking: float = 0.0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """New tokens a second, after the first."""
        if self.done is None or self.seconds <= self.seconds_to_first:
            return 0.0
        return max(self.done.usage.completion_tokens - 1, 0) / (
            self.seconds - self.seconds_to_first
        )

    def stats_line(self) -> str:
        if self.done is None:
            return "The reply did not end."
        usage = self.done.usage
        cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
        return (
            f"{usage.prompt_tokens}{cached}+{usage.completion_tokens} tok · {self.rate:.1f} tok/s"
            f" · TTFT {self.seconds_to_first:.2f} s · peak {format_bytes(peak_memory_bytes())}"
        )

    def to_json(self) -> dict[str, Any]:
        usage = None if self.done is None else self.done.usage
        return {
            "answer": self.answer,
            "thinking": self.thinking,
            "finish_reason": None if self.done is None else self.done.reason,
            "usage": None
            if usage is None
            else {
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "completion_tokens": usage.completion_tokens,
            },
            "seconds_to_first_token": round(self.seconds_to_first, 4),
            "seconds": round(self.seconds, 4),
            "tokens_per_second": round(self.rate, 2),
        }


@dataclass(frozen=True)
class ReplyStyle:
    """answer: whether it is printed as it comes. thinking: the stream it is shown on, None for
    hidden. folded_hint: what tells the reader how to see hidden thinking."""

    answer: bool = True
    thinking: str | None = "stdout"
    folded_hint: str = ""


def print_reply(events: Iterable[Event], output: Output, style: ReplyStyle) -> Reply:
    """Prints the events of one reply as they come; returns what they made."""
    reply = Reply()
    begin = time.monotonic()
    with output.progress("Reading the prompt") as status:
        try:
            for event in events:
                now = time.monotonic() - begin
                if isinstance(event, Prefill):
                    status.update(event.done, event.total)
                elif isinstance(event, Delta):
                    if not reply.answer and not reply.thinking:
                        status.clear()
                        reply.seconds_to_first = now
                    if event.channel == "thinking":
                        show_thinking(event.text, reply, now, status, output, style)
                    else:
                        show_answer(event.text, reply, now, status, output, style)
                else:
                    reply.done = event
        finally:
            reply.seconds = time.monotonic() - begin
            status.clear()
            end_line(reply, output, style)
    return reply


def show_thinking(
    text: str, reply: Reply, now: float, status: Progress, output: Output, style: ReplyStyle
) -> None:
    reply.thinking += text
    reply.seconds_thinking = now
    if style.thinking is None:
        status.paint(f"Thinking… {now:.0f} s")
    else:
        output.text(text, dim=True, stream=style.thinking)


def show_answer(
    text: str, reply: Reply, now: float, status: Progress, output: Output, style: ReplyStyle
) -> None:
    if not reply.answer:
        status.clear()
        if reply.thinking.strip():
            end_thinking(reply, output, style)
    # A template's blank lines between thinking and answer are not part of what is read.
    shown = text if reply.answer.strip("\n") else text.lstrip("\n")
    reply.answer += text
    if style.answer:
        output.text(shown)


def end_thinking(reply: Reply, output: Output, style: ReplyStyle) -> None:
    if style.thinking is None:
        if style.folded_hint:
            output.note(f"Thought for {reply.seconds_thinking:.0f} s{style.folded_hint}")
    else:
        missing = 2 - (len(reply.thinking) - len(reply.thinking.rstrip("\n")))
        output.text("\n" * max(missing, 0), stream=style.thinking)


def end_line(reply: Reply, output: Output, style: ReplyStyle) -> None:
    """What follows starts at the left edge; a reply that did not end by itself says so."""
    if reply.answer:
        if style.answer and not reply.answer.endswith("\n"):
            output.line()
    elif reply.thinking and style.thinking and not reply.thinking.endswith("\n"):
        output.text("\n", stream=style.thinking)
    if reply.done is None:
        return
    inside = " inside its thinking" if reply.thinking and not reply.answer else ""
    if reply.done.reason == "length":
        output.note(f"(ended{inside} by max_tokens)")
    elif reply.done.reason == "context":
        output.note(f"(ended{inside}: the context is full)")
    elif reply.done.reason == "cancelled":
        output.note(f"(stopped{inside})")
