"""A reply on its way to the screen: thinking in its view, the answer, a status line before both."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from localr1.cli.answer_view import MarkdownAnswer
from localr1.cli.chat_options import CLOSED
from localr1.cli.keyboard import erased_when_stopped
from localr1.cli.live import LiveRegion
from localr1.cli.output import Output
from localr1.cli.reply import Reply
from localr1.cli.text_view import HiddenText, PlainText, TextView
from localr1.cli.thinking_view import LiveThinking, Pace, ThinkView, folded
from localr1.engine.events import Delta, Done, Event
from localr1.engine.events import Progress as Prefill

ENDINGS = {
    "length": "ended{} by max_tokens",
    "context": "ended{}: the context is full; /clear starts anew",
    "cancelled": "stopped{}",
}


@dataclass(frozen=True)
class ReplyStyle:
    """How replies look. has_answer: whether the answer is printed at all. has_markdown: whether it
    is rendered, where stdout is a terminal that can do so. thinking, stream: how much of a thought
    is shown, and where. hint: follows "Thought for 3 s"; None: that is not said."""

    has_answer: bool = True
    has_markdown: bool = False
    thinking: ThinkView = "full"
    stream: str = "stdout"
    hint: str | None = None


class ReplyPrinter:
    """Prints the events of one reply as they come. context: of the model, in tokens."""

    def __init__(self, output: Output, style: ReplyStyle, context: int) -> None:
        self.output = output
        self.style = style
        self.reply = Reply()
        self._pace = Pace(context, time.monotonic())
        self._regions: list[LiveRegion] = []
        self._thinking = self._thinking_view()
        self._answer = self._answer_view()

    def print(self, events: Iterable[Event]) -> Reply:
        """Returns what the events made. What was printed ends with a line break in any case."""
        status = self.output.progress("Reading the prompt")
        with status as line, erased_when_stopped([line, *self._regions]):
            try:
                for event in events:
                    if isinstance(event, Prefill):
                        self._pace.prompt_tokens = event.total
                        line.update(event.done, event.total)
                        continue
                    line.clear()
                    if isinstance(event, Done):
                        self.reply.done = event
                    else:
                        self._show(event)
            finally:
                line.clear()
                self._end()
        return self.reply

    def _show(self, delta: Delta) -> None:
        pace, reply = self._pace, self.reply
        pace.first = pace.first or time.monotonic()
        pace.tokens = delta.tokens
        reply.thinking_tokens = delta.thinking_tokens
        if delta.channel == "thinking":
            reply.thinking += delta.text
            reply.seconds_thinking = pace.seconds()
            self._thinking.add(delta.text)
            return
        if not reply.answer and reply.thinking:
            self._end_thinking()
            if isinstance(self._thinking, PlainText):
                self.output.text("\n", stream=self.style.stream)
        reply.answer += delta.text
        self._answer.add(delta.text)

    def _end_thinking(self) -> None:
        reply, hint = self.reply, self.style.hint
        self._thinking.finish()
        is_folded = not isinstance(self._thinking, PlainText)
        if is_folded and hint is not None and reply.thinking.strip():
            self.output.note(folded(reply.seconds_thinking, reply.thinking_tokens, hint))

    def _end(self) -> None:
        reply = self.reply
        if reply.answer:
            self._answer.finish()
        elif reply.thinking:
            if reply.done is not None:
                reply.thinking_tokens = reply.done.usage.thinking_tokens
            self._end_thinking()
        if reply.done is None:
            return
        if reply.done.closed is not None:
            self.output.note(f"({CLOSED[reply.done.closed]})")
        if reply.done.reason in ENDINGS:
            inside = " inside its thinking" if reply.thinking and not reply.answer else ""
            self.output.note(f"({ENDINGS[reply.done.reason].format(inside)})")

    def _thinking_view(self) -> TextView:
        style = self.style
        region = self._region(style.stream)
        if style.thinking == "full" or (style.thinking == "tail" and not region.can_paint):
            return PlainText(self.output, style.stream, dim=True)
        if not region.can_paint:
            return HiddenText()
        return LiveThinking(region, self._pace, shows_tail=style.thinking == "tail")

    def _answer_view(self) -> TextView:
        if not self.style.has_answer:
            return HiddenText()
        region = self._region("stdout")
        # Without styles the marks are all that says what is a heading or stands out.
        has_styles = self.output.has_styles("stdout")
        if self.style.has_markdown and region.can_paint and has_styles:
            return MarkdownAnswer(self.output, region)
        return PlainText(self.output, "stdout")

    def _region(self, name: str) -> LiveRegion:
        if not self.output.moves_cursor(name):
            return LiveRegion(None)
        stream = self.output.stdout if name == "stdout" else self.output.stderr
        region = LiveRegion(stream, has_styles=self.output.has_styles(name))
        self._regions.append(region)
        return region
