"""One chat at a terminal: the conversation, how it is shown, and the last reply."""

from dataclasses import dataclass

from localr1.cli.conversation import Conversation
from localr1.cli.interrupt import stop_on_interrupt
from localr1.cli.output import Output
from localr1.cli.printer import Reply, ReplyPrinter, ReplyStyle


@dataclass
class ChatSession:
    output: Output
    conversation: Conversation
    style: ReplyStyle
    stats: bool = False
    last_reply: Reply | None = None
    ended: bool = False

    def say(self, text: str) -> Reply:
        """Sends one message and prints the reply; Ctrl-C stops it and keeps what came."""
        with stop_on_interrupt() as stop:
            events = self.conversation.reply(text, stop)
            try:
                self.last_reply = ReplyPrinter(self.output, self.style).print(events)
            finally:
                events.close()
        if self.stats:
            self.output.note(self.last_reply.stats_line())
        return self.last_reply
