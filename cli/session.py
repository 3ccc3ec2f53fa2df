"""One chat at a terminal: the conversation, how it is shown, and the last reply."""

from dataclasses import dataclass, field

from localr1.cli.chat_options import CLOSED
from localr1.cli.conversation import Conversation
from localr1.cli.interrupt import catch_interrupts
from localr1.cli.output import Output
from localr1.cli.printer import Reply, ReplyPrinter, ReplyStyle
from localr1.cli.settling import Settling


@dataclass
class ChatSession:
    """goes_on: whether more messages are to come, for which it is worth getting ready."""

    output: Output
    conversation: Conversation
    style: ReplyStyle
    stats: bool = False
    last_reply: Reply | None = None
    ended: bool = False
    goes_on: bool = False
    settling: Settling = field(default_factory=Settling)

    def say(self, text: str) -> Reply:
        """Sends one message and prints the reply; Ctrl-C while the model thinks asks it to answer;
        else it stops the reply and keeps what came."""
        self.settling.stop()
        with catch_interrupts() as interrupts:
            events = self.conversation.reply(text, interrupts.stop, interrupts.answer_now)
            try:
                printer = ReplyPrinter(self.output, self.style)
                self.last_reply = printer.print(interrupts.watch(events))
            finally:
                events.close()
        done = self.last_reply.done
        if done is not None and done.closed is not None:
            self.output.note(f"({CLOSED[done.closed]})")
        if self.stats:
            self.output.note(self.last_reply.stats_line())
        self.settle()
        return self.last_reply

    def settle(self) -> None:
        """In the background, read what the next prompt will begin with."""
        if self.goes_on and self.conversation.turns:
            conversation = self.conversation
            self.settling.start(
                lambda cancel: conversation.engine.read_ahead(conversation.coming_prompt(), cancel)
            )

    def close(self) -> None:
        self.settling.stop()
