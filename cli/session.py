"""One chat at a terminal: the conversation, how it is shown, and the last reply."""

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from localr1.cli.conversation import Conversation
from localr1.cli.interrupt import catch_interrupts
from localr1.cli.keeper import SessionKeeper
from localr1.cli.output import Output
from localr1.cli.printer import ReplyPrinter, ReplyStyle
from localr1.cli.reply import Reply
from localr1.cli.settling import Settling
from localr1.errors import OutputError, UsageError

WARNED_SHARE = 0.8
"""Of the context, from which on the end is told of."""

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
    """goes_on: whether more messages are to come, for which it is worth getting ready. keeper:
    keeps the conversation on disk, None for no sessions. draft: what the next prompt begins with.
    loader: where /load finds models. over_ssh: the terminal is on another machine than the program.
    attached: texts that go in front of the next message. is_without_model: /load could bring back
    neither model: there is nothing more to do than leave.
    """

    output: Output
    conversation: Conversation
    style: ReplyStyle
    stats: bool = False
    last_reply: Reply | None = None
    ended: bool = False
    goes_on: bool = False
    keeper: SessionKeeper | None = None
    draft: str = ""
    loader: ModelLoader | None = None
    over_ssh: bool = False
    attached: list[str] = field(default_factory=list)
    is_without_model: bool = False
    settling: Settling = field(default_factory=Settling)
    _is_warned: bool = field(default=False, repr=False)

    def say(self, text: str) -> Reply:
        """Sends one message and prints the reply; Ctrl-C while the model thinks asks it to answer;
        else it stops the reply and keeps what came."""
        with catch_interrupts() as interrupts:
            self.settling.stop()  # Which may take as long as a pass over some tokens.
            self._tell_of_failure()
            events = self.conversation.reply(text, interrupts.stop, interrupts.answer_now)
            if dropped := self.conversation.dropped:
                turns = "turn was" if dropped == 1 else f"{dropped} turns were"
                self.output.note(f"(the context is full: the oldest {turns} dropped)")
            printer = ReplyPrinter(self.output, self.style, self.conversation.engine.context)
            try:
                printer.print(interrupts.watch(events))
            finally:
                # Also what a second Ctrl-C cut off can be shown by /think and /stats.
                self.last_reply = printer.reply
                events.close()
        if self.stats:
            self.output.note(self.last_reply.stats_line())
        self._warn_of_the_end()
        if self.keeper is not None and self.conversation.turns:
            self.keeper.save()
        self.settle()
        return self.last_reply

    def send(self, text: str) -> Reply:
        """`say`, with what is attached in front; where that fails, it stays attached."""
        reply = self.say(self.with_attached(text))
        self.attached.clear()
        return reply

    def with_attached(self, text: str) -> str:
        return "\n".join([*self.attached, text])

    def settle(self) -> None:
        """In the background, read what the next prompt will begin with, and keep it on disk."""
        if self.goes_on and self.conversation.turns and not self.is_without_model:
            self.settling.start(self._get_ready)

    def kept(self) -> SessionKeeper:
        """Raises UsageError where sessions are not kept."""
        if self.keeper is None:
            raise UsageError("sessions are not kept", fix="Start the chat without --no-session.")
        return self.keeper

    def take_draft(self) -> str:
        draft, self.draft = self.draft, ""
        return draft

    def close(self) -> None:
        """Ends what runs in the background, the session, and the engine: /load may have brought
        another one. Raises OutputError where the session cannot be written."""
        self.settling.stop()
        if self.is_without_model:
            return
        try:
            if self.keeper is not None:
                self.keeper.close()
        finally:
            self.conversation.engine.close()

    def _warn_of_the_end(self) -> None:
        """Once, when little of the context is left."""
        assert self.last_reply is not None
        done, conversation = self.last_reply.done, self.conversation
        if done is None:
            return
        usage, context = done.usage, conversation.engine.context
        used = usage.prompt_tokens + usage.completion_tokens - usage.thinking_tokens
        was_warned, self._is_warned = self._is_warned, used >= WARNED_SHARE * context
        if self._is_warned and not was_warned and self.goes_on:
            then = "it stops there (`/set full drop-oldest` drops the oldest turns instead)"
            if conversation.drops_oldest:
                then = "the oldest turns are dropped there (`/set full stop` stops instead)"
            full = f"{used / context:.0%} full ({used:,} of {context:,} tokens)"
            self.output.note(f"The context is {full}: {then}.")

    def _tell_of_failure(self) -> None:
        """Once, of what failed while the user typed: a disk that is full, as a rule."""
        error, self.settling.error = self.settling.error, None
        if isinstance(error, OutputError):
            self.output.error(str(error))

    def _get_ready(self, cancel: threading.Event) -> None:
        conversation = self.conversation
        num_read = conversation.engine.read_ahead(conversation.coming_prompt(), cancel)
        if self.keeper is not None and num_read and not cancel.is_set():
            self.keeper.save_snapshot(if_small=True)
