"""One chat at a terminal: the conversation, how it is shown, and the last reply."""

from dataclasses import dataclass

from localr1.cli.chat_options import CLOSED
from localr1.cli.conversation import Conversation
from localr1.cli.interrupt import catch_interrupts
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
        """Sends one message and prints the reply; Ctrl-C while the model thinks asks it to answer;
        else it stops the reply and keeps what came."""
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
        return self.last_reply
