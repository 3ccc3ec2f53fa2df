"""Long conversations: told of before the context is full, and a choice where it is."""

import io
from typing import Any

import pytest
from byte_tokenizer import byte_tokenizer
from fake_engine import FakeEngine, answer, conversation
from scripted_model import ScriptedModel

from localr1.chat_template import ChatTemplate
from localr1.cli.conversation import Conversation
from localr1.cli.output import Output
from localr1.cli.printer import ReplyStyle
from localr1.cli.session import ChatSession
from localr1.cli.slash import run_slash_command
from localr1.engine.engine import Engine
from localr1.errors import ContextError, UsageError

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def engine() -> Any:
    """Of 200 tokens, a byte each; it answers with letters."""
    template = ChatTemplate(TEMPLATE, "<s>", "</s>")
    model = ScriptedModel(lambda ids: 65 + len(ids) % 26)
    made = Engine(model, byte_tokenizer(), template, 200)
    yield made
    made.close()


def session_of(engine: Any, **options: Any) -> tuple[ChatSession, io.StringIO]:
    stderr = io.StringIO()
    chat = Conversation(engine, {"temperature": 0.0, "max_tokens": 20}, **options)
    output = Output(io.StringIO(), stderr)
    return ChatSession(output, chat, ReplyStyle(), goes_on=True), stderr


def messages(session: ChatSession) -> list[str]:
    return [turn["content"] for turn in session.conversation.turns[::2]]


def test_the_end_is_told_of_once_and_then_it_stops(engine: Engine) -> None:
    session, stderr = session_of(engine)
    warned = []
    for number in range(5):
        session.say(f"{number}" + 12 * "x")
        warned.append("full (" in stderr.getvalue())
        stderr.truncate(0)
    # Two control tokens and 33 others a turn: 160 of 200 from the fifth on.
    assert warned == [False, False, False, False, True]
    with pytest.raises(ContextError, match=r"expected at most 199 tokens.*found 21\d.*/set full"):
        session.say("x" * 40)
    assert len(messages(session)) == 5, "nothing is lost"
    session.say("y")
    assert "full (" not in stderr.getvalue()
    session.close()


def test_the_oldest_turns_make_room_where_they_may(engine: Engine) -> None:
    session, stderr = session_of(engine)
    run_slash_command(session, "/set full drop-oldest")
    for number in range(12):
        session.say(f"{number}" + 12 * "x")
        reply = session.last_reply
        assert reply is not None
        assert len(reply.answer) == 20, "a reply has room"
    kept = messages(session)
    assert kept[-1].startswith("11x")
    assert kept == [f"{number}" + 12 * "x" for number in range(12 - len(kept), 12)]
    assert 3 <= len(kept) < 6
    assert "(the context is full: the oldest 2 turns were dropped)" in stderr.getvalue()
    assert "the oldest turns are dropped there" in stderr.getvalue()
    session.close()


def test_a_message_that_never_fits_drops_nothing(engine: Engine) -> None:
    session, _ = session_of(engine, drops_oldest=True)
    session.say("hello")
    with pytest.raises(ContextError, match="the message alone fills the context"):
        session.say("x" * 300)
    assert messages(session) == ["hello"]
    session.close()


def test_what_to_do_at_the_end_is_one_of_two() -> None:
    chat = conversation(FakeEngine([answer("ok")]))
    session = ChatSession(Output(io.StringIO(), io.StringIO()), chat, ReplyStyle())
    for line in ("/set full", "/set full both"):
        with pytest.raises(UsageError, match="/set full: expected stop or drop-oldest"):
            run_slash_command(session, line)
