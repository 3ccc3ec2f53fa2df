"""`/set think`, `/set nothink`: whether the model thinks, and for how long."""

from localr1.cli.chat_options import NO_THINKING
from localr1.cli.session import ChatSession
from localr1.errors import UsageError


def set_thinking(session: ChatSession, value: str) -> None:
    """value: "on", "off" or a budget in tokens."""
    conversation = session.conversation
    if value == "on":
        conversation.set_thinking(True)
        note = "The model thinks, for as long as it takes."
    elif value == "off":
        conversation.set_thinking(False)
        note = "The model answers without thinking."
    elif value.isascii() and value.isdigit():
        conversation.set_thinking(True, int(value))
        note = f"The model thinks for at most {int(value):,} tokens, then it answers."
    else:
        raise UsageError(
            "/set think", expected="`on`, `off` or a number of tokens", found=repr(value)[:40]
        )
    session.output.note(note if conversation.engine.can_think else NO_THINKING)
