"""One chat at a terminal: the conversation, how it is shown, and the last reply."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from localr1.cli.chat_options import CLOSED
from localr1.cli.conversation import Conversation
from localr1.cli.interrupt import catch_interrupts
from localr1.cli.output import Output
from localr1.cli.printer import ReplyPrinter, ReplyStyle
from localr1.cli.reply import Reply
from localr1.cli.settling import Settling

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
    """goes_on: whether more messages are to come, for which it is worth getting ready. loader:
    where /load finds models. over_ssh: the terminal is on another machine than the program.
    attached: texts that go in front of the next message. is_without_model: /load could bring back
    neither model: there is nothing more to do than leave."""

    output: Output
    conversation: Conversation
    style: ReplyStyle
    stats: bool = False
    last_reply: Reply | None = None
    ended: bool = False
    goes_on: bool = False
    loader: ModelLoader | None = None
    over_ssh: bool = False
    attached: list[str] = field(default_factory=list)
    is_without_model: bool = False
    settling: Settling = field(default_factory=Settling)

    def say(self, text: str) -> Reply:
        """Sends one message and prints the reply; Ctrl-C while the model thinks asks it to answer;
        else it stops the reply and keeps what came."""
        self.settling.stop()
        with catch_interrupts() as interrupts:
            events = self.conversation.reply(text, interrupts.stop, interrupts.answer_now)
            printer = ReplyPrinter(self.output, self.style, self.conversation.engine.context)
            try:
                printer.print(interrupts.watch(events))
            finally:
                # Also what a second Ctrl-C cut off can be shown by /think and /stats.
                self.last_reply = printer.reply
                events.close()
        done = self.last_reply.done
        if done is not None and done.closed is not None:
            self.output.note(f"({CLOSED[done.closed]})")
        if self.stats:
            self.output.note(self.last_reply.stats_line())
        self.settle()
        return self.last_reply

    def with_attached(self, text: str, *, keep: bool = False) -> str:
        """The attached texts and `text` as one message; they are used up unless `keep`."""
        message = "\n".join([*self.attached, text])
        if not keep:
            self.attached.clear()
        return message

    def settle(self) -> None:
        """In the background, read what the next prompt will begin with."""
        if self.goes_on and self.conversation.turns and not self.is_without_model:
            conversation = self.conversation
            self.settling.start(
                lambda cancel: conversation.engine.read_ahead(conversation.coming_prompt(), cancel)
            )

    def close(self) -> None:
        """Ends what runs in the background, and the engine: /load may have brought another one."""
        self.settling.stop()
        if not self.is_without_model:
            self.conversation.engine.close()
