"""What `/set` changes of how the model answers: think, nothink, full, format."""

from pathlib import Path

from localr1.cli.answer_format import JSON, TEXT, answer_schema
from localr1.cli.chat_options import NO_THINKING, drops_oldest
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


def set_full(session: ChatSession, value: str) -> None:
    """value: "stop" or "drop-oldest", at the end of the context."""
    drops = bool(drops_oldest("/set full", value))
    session.conversation.drops_oldest = drops
    dropped = "the oldest turns are dropped" if drops else "the chat stops"
    session.output.note(f"Where the context is full, {dropped}.")


def set_format(session: ChatSession, value: str) -> None:
    """value: "text", "json", or a file with a JSON schema."""
    if not value:
        raise UsageError("/set format", expected="`text`, `json` or a file with a JSON schema")
    is_file = value not in (TEXT, JSON)
    wanted = answer_schema(*((None, Path(value)) if is_file else (value, None)))
    session.conversation.set_answers(wanted)
    session.output.note(
        "Answers are text." if wanted is None else f"Answers are JSON: {wanted.name}."
    )
