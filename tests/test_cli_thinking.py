"""Thinking as the chat lets a user steer it."""

import io
import signal
import threading
import time

import pytest
from fake_engine import FakeEngine, answer, conversation, endless_answer, thinking, wait_until

from localr1.cli.chat_options import NO_THINKING
from localr1.cli.conversation import Conversation
from localr1.cli.output import Output
from localr1.cli.printer import ReplyStyle
from localr1.cli.session import ChatSession
from localr1.cli.slash import run_slash_command
from localr1.embedded import R1_NANO
from localr1.engine.events import Delta, Done
from localr1.errors import UsageError
from localr1.load import load_engine


def session_of(engine: FakeEngine) -> tuple[ChatSession, io.StringIO]:
    stderr = io.StringIO()
    return ChatSession(Output(io.StringIO(), stderr), conversation(engine), ReplyStyle()), stderr


@pytest.mark.parametrize(
    ("line", "thinks", "budget"),
    [
        ("/set think", True, None),
        ("/set think on", True, None),
        ("/set think off", False, None),
        ("/set nothink", False, None),
        ("/set think 300", True, 300),
    ],
)
def test_set_think(line: str, thinks: bool, budget: int | None) -> None:
    engine = FakeEngine([answer("ok")])
    session, _ = session_of(engine)
    session.say("one")
    run_slash_command(session, line)
    session.say("two")
    assert [options["thinking"] for options in engine.options] == [None, thinks]
    assert [params.think_budget for params in engine.params] == [None, budget]


@pytest.mark.parametrize("value", ["-1", "two", "1.5", "on 3"])
def test_what_is_no_way_to_think_is_refused(value: str) -> None:
    session, _ = session_of(FakeEngine([answer("ok")]))
    with pytest.raises(UsageError, match="/set think: expected `on`, `off` or a number"):
        run_slash_command(session, f"/set think {value}")
    assert session.conversation.thinking is None


def test_a_model_without_thinking_says_so() -> None:
    session, stderr = session_of(FakeEngine([answer("ok")], can_think=False))
    run_slash_command(session, "/set nothink")
    assert stderr.getvalue() == NO_THINKING + "\n"


def test_an_interrupt_while_it_thinks_asks_for_the_answer_and_a_second_stops_it() -> None:
    engine = FakeEngine([thinking(*["hm "] * 60) + endless_answer()], pause=0.01)
    session, stderr = session_of(engine)

    def interrupt_twice() -> None:
        time.sleep(0.2)
        signal.raise_signal(signal.SIGINT)
        wait_until(lambda: "word3" in stdout())
        signal.raise_signal(signal.SIGINT)

    def stdout() -> str:
        stream = session.output.stdout
        assert isinstance(stream, io.StringIO)
        return stream.getvalue()

    thread = threading.Thread(target=interrupt_twice)
    thread.start()
    reply = session.say("why?")
    thread.join()
    assert reply.done is not None
    assert reply.done.closed == "asked"
    assert reply.done.reason == "cancelled"
    assert 0 < reply.thinking.count("hm") < 60
    assert reply.answer.startswith("word0")
    assert "(asked to answer: the thought was closed)" in stderr.getvalue()


def say(chat: Conversation, text: str) -> tuple[str, str, Done]:
    events = list(chat.reply(text, threading.Event()))
    said = {"thinking": "", "answer": ""}
    for event in events:
        if isinstance(event, Delta):
            said[event.channel] += event.text
    assert isinstance(events[-1], Done)
    return said["thinking"], said["answer"], events[-1]


@pytest.mark.parametrize("thinks", [True, False])
def test_a_turn_reads_only_what_is_new(thinks: bool) -> None:
    """Though the thoughts between the turns are gone."""
    engine = load_engine(R1_NANO, threads=1, context=1024)
    chat = Conversation(engine, {"temperature": 0.0, "max_tokens": 80})
    chat.set_thinking(thinks, 20)
    session = ChatSession(Output(io.StringIO(), io.StringIO()), chat, ReplyStyle(), goes_on=True)
    for number, text in enumerate(("What is 47 * 86?", "And 3 + 4?", "Hello!")):
        session.settling.wait()
        history = chat.coming_prompt()
        reply = session.say(text)
        assert reply.done is not None
        usage = reply.done.usage
        if number:
            assert history == engine.sequence.ids[: len(history)]
            assert usage.cached_tokens == len(history)
            # <User>, the message, <Assistant>, the thinking block: no word of what was said before.
            new = engine.tokenizer.encode(text)
            assert usage.prompt_tokens - usage.cached_tokens <= len(new) + 7
    session.close()
    assert session.settling.error is None
    engine.close()


def test_the_embedded_model_thinks_as_long_as_it_may() -> None:
    engine = load_engine(R1_NANO, threads=1)
    chat = Conversation(engine, {"temperature": 0.0})
    long, _, whole = say(chat, "What is 47 * 86?")
    assert whole.closed is None
    chat.clear()
    chat.set_thinking(True, 20)
    short, text, done = say(chat, "What is 47 * 86?")
    assert done.closed == "budget"
    assert short.startswith(long[:10])
    assert done.usage.thinking_tokens - done.usage.forced_tokens <= 20
    assert text.strip()
    chat.clear()
    chat.set_thinking(False)
    thought, text, done = say(chat, "What is 47 * 86?")
    assert thought == ""
    assert text.strip()
    assert done.usage.thinking_tokens == 0
    assert done.usage.forced_tokens == 0
    engine.close()
