"""/load: another model in the same chat."""

from collections.abc import Iterable
from dataclasses import replace

from localr1.cli.conversation import Conversation
from localr1.cli.keyboard import interruptible
from localr1.cli.session import ChatSession
from localr1.errors import LocalR1Error, UsageError

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
        session.keeper.save_snapshot()
    conversation.engine.close()
    # Both may not fit: the memory of one is free before the other asks for its own.
    del conversation.engine
    try:
        with interruptible():
            engine = loader.load(path)
    except (LocalR1Error, MemoryError, KeyboardInterrupt):
        session.ended = session.is_without_model = True
        goes_on_with(session, replace(conversation, engine=loader.load(previous)))
        session.ended = session.is_without_model = False
        session.output.note(f"Still here: {session.conversation.engine.name}.")
        raise
    turns = conversation.turns if keeps else []
    # A grammar speaks of the tokens of one model.
    changed = replace(conversation, engine=engine, turns=turns, grammar=None)
    goes_on_with(session, changed)
    if session.keeper is not None:
        session.keeper.leave()
        session.keeper.model = str(path.absolute())
    if conversation.grammar is not None:
        session.output.note("Answers are text again: /set format asks for JSON.")
    session.output.note(f"Loaded {engine.name}; {_what_stays(len(turns))}.")


def goes_on_with(session: ChatSession, conversation: Conversation) -> None:
    """In place of the conversation so far, also for what keeps it."""
    session.conversation = conversation
    if session.keeper is not None:
        session.keeper = replace(session.keeper, conversation=conversation)


def _what_stays(messages: int) -> str:
    if not messages:
        return "the conversation starts anew"
    return f"it reads the conversation so far ({messages} messages) with your next one"


def complete_model(session: ChatSession, rest: str) -> Iterable[str]:
    return [] if session.loader is None else session.loader.names()
