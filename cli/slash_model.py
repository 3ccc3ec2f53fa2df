"""/load: another model in the same chat."""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from localr1.cli.conversation import Conversation
from localr1.cli.keyboard import interruptible
from localr1.cli.session import ChatSession
from localr1.errors import LocalR1Error, UsageError

if TYPE_CHECKING:
    from localr1.engine.engine import Engine

KEEP = "keep"


def load_model(session: ChatSession, rest: str) -> None:
    """`/load MODEL`, `/load MODEL keep`. The present model makes room before the other is loaded;
    where that fails it comes back, and where that fails too the chat ends. Raises UsageError,
    NotFoundError, and what loading raises."""
    loader = session.loader
    name, _, last = rest.rpartition(" ")
    keeps = last == KEEP and bool(name)
    name = (name if keeps else rest).strip()
    if not name or loader is None:
        raise UsageError("/load", expected="a model's directory, .gguf file or name")
    path = loader.find(name)
    conversation = session.conversation
    previous = loader.path
    if session.keeper is not None:
        session.keeper.save_settings()
        session.keeper.save_snapshot()
    conversation.engine.close()
    # Both may not fit: the memory of one is free before the other asks for its own.
    del conversation.engine
    try:
        with interruptible():
            engine = loader.load(path)
    except (LocalR1Error, MemoryError, KeyboardInterrupt):
        session.ended = session.is_without_model = True
        _go_on(session, conversation, loader.load(previous), conversation.turns)
        session.ended = session.is_without_model = False
        session.output.note(f"Still here: {session.conversation.engine.name}.")
        raise
    turns = conversation.turns if keeps else []
    answers = _go_on(session, conversation, engine, turns)
    if session.keeper is not None:
        session.keeper.leave()
        session.keeper.model = str(path.absolute())
    session.output.note(f"Loaded {engine.name}; {_what_stays(len(turns))}. {answers}".rstrip())


def _go_on(
    session: ChatSession, before: Conversation, engine: "Engine", turns: list[dict[str, str]]
) -> str:
    """In place of the conversation so far, also for what keeps it. Returns a sentence where answers
    are no mere text, or no longer what they were to be."""
    session.conversation = replace(before, engine=engine, turns=turns)
    if session.keeper is not None:
        session.keeper = replace(session.keeper, conversation=session.conversation)
    return session.conversation.keep_answers(before.answers)  # A grammar is of one model's tokens.


def _what_stays(messages: int) -> str:
    if not messages:
        return "the conversation starts anew"
    return f"it reads the conversation so far ({messages} messages) with your next one"


def complete_model(session: ChatSession, rest: str) -> Iterable[str]:
    return [] if session.loader is None else session.loader.names()
