"""One chat at a terminal: the conversation, how it is shown, and the last reply."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from localr1.cli.conversation import Conversation
from localr1.cli.interrupt import stop_on_interrupt
from localr1.cli.output import Output
from localr1.cli.printer import ReplyPrinter, ReplyStyle
from localr1.cli.reply import Reply

if TYPE_CHECKING:
    from localr1.engine.engine import Engine


class ModelLoader(Protocol):
    """Where /load finds models. path: of the one that was loaded last."""

    path: Path

    def find(self, name: str) -> Path: ...

    def load(self, path: Path) -> "Engine": ...

    def names(self) -> list[str]: ...


@dataclass
class ChatSession:
    """attached: texts that go in front of the next message. over_ssh: the terminal is on another
    machine than the program."""

    output: Output
    conversation: Conversation
    style: ReplyStyle
    stats: bool = False
    loader: ModelLoader | None = None
    over_ssh: bool = False
    last_reply: Reply | None = None
    attached: list[str] = field(default_factory=list)
    ended: bool = False

    def say(self, text: str) -> Reply:
        """Sends one message and prints the reply; Ctrl-C stops it and keeps what came."""
        with stop_on_interrupt() as stop:
            events = self.conversation.reply(text, stop)
            printer = ReplyPrinter(self.output, self.style, self.conversation.engine.context)
            try:
                printer.print(events)
            finally:
                # Also what a second Ctrl-C cut off can be shown by /think and /stats.
                self.last_reply = printer.reply
                events.close()
        if self.stats:
            self.output.note(self.last_reply.stats_line())
        return self.last_reply

    def with_attached(self, text: str, *, keep: bool = False) -> str:
        """The attached texts and `text` as one message; they are used up unless `keep`."""
        message = "\n".join([*self.attached, text])
        if not keep:
            self.attached.clear()
        return message
