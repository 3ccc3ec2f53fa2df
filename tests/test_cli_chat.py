"""The chat without a terminal: what is sent, kept and printed."""

import io
import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine, FakeTemplate, answer, conversation, endless_answer, thinking
from typer.testing import CliRunner, Result

from localr1.chat_template import R1_ASSISTANT
from localr1.cli import chat as command
from localr1.cli.interrupt import Interrupts, catch_interrupts
from localr1.cli.main import app
from localr1.cli.output import Output
from localr1.cli.printer import ReplyPrinter, ReplyStyle
from localr1.cli.session import ChatSession
from localr1.cli.slash import run_slash_command
from localr1.engine.events import Delta, Done, Usage
from localr1.errors import ContextError, UsageError


def session_of(engine: FakeEngine, **options: Any) -> tuple[ChatSession, io.StringIO, io.StringIO]:
    stdout, stderr = io.StringIO(), io.StringIO()
    output = Output(stdout, stderr)
    return ChatSession(output, conversation(engine), ReplyStyle(**options)), stdout, stderr


@pytest.fixture
def one_shot(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `localr1 chat . ARGUMENTS` on a fake engine, which it also gets for inspection."""

    def run(engine: FakeEngine, *arguments: str, stdin: str = "") -> Result:
        def load(path: Path, output: Output, **_: Any) -> Any:
            return conversation(engine)

        monkeypatch.setattr(command, "load_conversation", load)
        return CliRunner().invoke(app, ["chat", ".", *arguments], input=stdin)

    return run


def test_one_shot_prints_the_answer_alone_on_stdout(one_shot: Any) -> None:
    engine = FakeEngine([thinking("let me", " see") + answer("Par", "is.")])
    result = one_shot(engine, "-p", "capital of France?")
    assert result.exit_code == 0
    assert result.stdout == "Paris.\n"
    assert result.stderr == "let me see\n\n"
    assert engine.prompts == [[{"role": "user", "content": "capital of France?"}]]
    assert engine.closed


def test_hidden_thinking_is_not_printed(one_shot: Any) -> None:
    engine = FakeEngine([thinking("hm") + answer("Yes.")])
    result = one_shot(engine, "-p", "well?", "--hide-thinking")
    assert (result.stdout, result.stderr) == ("Yes.\n", "")


def test_stdin_follows_the_prompt(one_shot: Any) -> None:
    engine = FakeEngine([answer("ok")])
    one_shot(engine, "-p", "Summarize:", stdin="line 1\nline 2\n")
    one_shot(engine, stdin="only stdin\n")
    contents = [prompt[-1]["content"] for prompt in engine.prompts]
    assert contents == ["Summarize:\n\nline 1\nline 2", "only stdin"]


def test_a_system_prompt_comes_first(one_shot: Any) -> None:
    engine = FakeEngine([answer("ok")])
    one_shot(engine, "-p", "hi", "-s", "Be brief.")
    assert engine.prompts[0][0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "template", [FakeTemplate(has_system=False), FakeTemplate(f"{{...}}{R1_ASSISTANT}")]
)
def test_a_system_prompt_is_folded_where_there_is_none(
    template: FakeTemplate, one_shot: Any
) -> None:
    engine = FakeEngine([answer("ok")], template=template)
    one_shot(engine, "-p", "hi", "-s", "Be brief.")
    assert engine.prompts[0] == [{"role": "user", "content": "Be brief.\n\nhi"}]


def test_json_is_one_document(one_shot: Any) -> None:
    engine = FakeEngine([thinking("hm") + answer("A ", "\x1b[2J")], reason="length")
    result = one_shot(engine, "-p", "hi", "--json")
    document = json.loads(result.stdout)
    assert document["answer"] == "A \x1b[2J"
    assert document["thinking"] == "hm"
    assert document["finish_reason"] == "length"
    assert document["usage"]["completion_tokens"] == 3
    assert document["timings"]["tokens_per_second"] == 1.0
    assert "\x1b" not in result.stdout


def test_sampling_options_reach_the_engine_over_the_models_own(one_shot: Any) -> None:
    engine = FakeEngine([answer("ok")], defaults={"temperature": 0.7, "top_p": 0.8})
    one_shot(engine, "-p", "hi", "-o", "top_k=5", "--seed", "7", "--top-p", "0.5")
    (params,) = engine.params
    sampling = params.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.7, 0.5, 5, 7)
    assert params.max_tokens is None
    one_shot(engine, "-p", "hi", "--max-tokens", "9")
    assert engine.params[-1].max_tokens == 9


def test_stats_go_to_stderr(one_shot: Any) -> None:
    result = one_shot(FakeEngine([answer("a", "b", "c")]), "-p", "hi", "--stats")
    assert result.stdout == "abc\n"
    assert "3+3 tok · 1.0 tok/s · TTFT 0.25 s · peak" in result.stderr


def test_control_characters_of_a_model_are_shown(one_shot: Any) -> None:
    engine = FakeEngine([thinking("\x1b[2J") + answer("\x1b]0;title\x07 done")])
    result = one_shot(engine, "-p", "hi")
    assert result.stdout == r"\x1b]0;title\x07 done" + "\n"
    assert result.stderr.startswith(r"\x1b[2J")


@pytest.mark.parametrize(
    ("deltas", "reason", "note"),
    [
        (answer("cut"), "length", "(ended by max_tokens)"),
        (thinking("deep"), "length", "(ended inside its thinking by max_tokens)"),
        (answer("cut"), "context", "(ended: the context is full; /clear starts anew)"),
        (answer("cut"), "cancelled", "(stopped)"),
        (answer("done"), "stop", ""),
    ],
)
def test_a_reply_that_did_not_end_by_itself_says_so(
    deltas: list[Delta], reason: Any, note: str
) -> None:
    session, stdout, stderr = session_of(FakeEngine([deltas], reason=reason))
    session.say("hi")
    assert stdout.getvalue().endswith("\n")
    assert stderr.getvalue().strip() == note


def test_a_conversation_remembers_answers_without_thinking() -> None:
    engine = FakeEngine([thinking("secret") + answer("Pa", "ris"), answer("Two.")])
    session, _, _ = session_of(engine)
    session.say("capital?")
    session.say("people?")
    assert engine.prompts[1] == [
        {"role": "user", "content": "capital?"},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "people?"},
    ]


def test_an_error_leaves_the_conversation_as_it_was() -> None:
    engine = FakeEngine([answer("one")])
    session, _, _ = session_of(engine)
    session.say("first")
    engine.error = ContextError("too long")
    with pytest.raises(ContextError):
        session.say("second")
    engine.error = None
    session.say("third")
    assert [message["content"] for message in engine.prompts[-1]] == ["first", "one", "third"]


def test_an_interrupt_stops_the_reply_and_keeps_what_came() -> None:
    engine = FakeEngine([endless_answer(), answer("short")], pause=0.02)
    session, stdout, stderr = session_of(engine)
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    timer.start()
    reply = session.say("count")
    assert reply.done is not None
    assert reply.done.reason == "cancelled"
    assert 0 < reply.answer.count("word") < 10_000
    assert stdout.getvalue() == reply.answer + "\n"
    assert "(stopped)" in stderr.getvalue()
    session.say("go on")
    assert engine.prompts[-1][1] == {"role": "assistant", "content": reply.answer}


def test_one_shot_that_was_interrupted_ends_with_130(one_shot: Any) -> None:
    engine = FakeEngine([answer("a")], reason="cancelled")
    assert one_shot(engine, "-p", "hi").exit_code == 130


def test_a_second_interrupt_is_an_interrupt_again() -> None:
    with catch_interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.stop.is_set()
        assert not interrupts.answer_now.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_within_another_leaves_the_event_to_it() -> None:
    interrupts = Interrupts()

    class Event(threading.Event):
        """While it is set, which takes its lock, the next signal comes."""

        times = 0

        def set(self) -> None:
            self.times += 1
            if self.times == 1:
                interrupts.interrupt()
            super().set()

    event = interrupts.stop = Event()
    interrupts.interrupt()
    assert event.times == 1
    assert event.is_set()
    with pytest.raises(KeyboardInterrupt):
        interrupts.interrupt()


def test_a_hidden_thought_is_folded_with_a_hint() -> None:
    stderr = io.StringIO()
    output = Output(io.StringIO(), stderr)
    style = ReplyStyle(thinking="hidden", hint=" - /think to show")
    done = Done("stop", Usage(1, 0, 2, 1, 0.1, 0.1))
    thought = Delta("thinking", "hm", 412, 412)
    reply = Delta("answer", "ok", 413, 412)
    ReplyPrinter(output, style, 64).print([thought, reply, done])
    assert stderr.getvalue() == "Thought for 0 s (412 tokens) - /think to show\n"


@pytest.mark.parametrize("line", ["/help", "/?"])
def test_help_lists_every_command(line: str) -> None:
    session, stdout, _ = session_of(FakeEngine([answer("ok")]))
    run_slash_command(session, line)
    for name in ("/help", "/clear", "/set system", "/set parameter", "/show", "/think", "/bye"):
        assert name in stdout.getvalue()


@pytest.mark.parametrize("line", ["/bye", "/exit"])
def test_leaving(line: str) -> None:
    session, _, _ = session_of(FakeEngine([answer("ok")]))
    run_slash_command(session, line)
    assert session.ended


def test_clear_forgets_the_turns_and_keeps_the_settings() -> None:
    engine = FakeEngine([answer("ok")])
    session, _, _ = session_of(engine)
    run_slash_command(session, "/set system Be brief.")
    run_slash_command(session, "/set parameter temperature 0")
    session.say("one")
    run_slash_command(session, "/clear")
    session.say("two")
    assert [message["role"] for message in engine.prompts[-1]] == ["system", "user"]
    assert engine.params[-1].sampling.temperature == 0.0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/cler", "unknown command /cler, not sent to the model. Did you mean /clear?"),
        ("/set", "expected `/set system TEXT`, `/set think on|off|N`, `/set parameter"),
        ("/set parameter top_k", "expected a name and a number"),
        ("/set parameter topk 1", "Did you mean top_k?"),
        ("/set parameter top_p 2", "top_p: expected a number above 0"),
        ("/set parameter max_tokens 0", "max_tokens: expected a whole number from 1"),
    ],
)
def test_a_wrong_command_is_an_error_and_reaches_no_model(line: str, message: str) -> None:
    engine = FakeEngine([answer("ok")])
    session, _, _ = session_of(engine)
    with pytest.raises(UsageError) as caught:
        run_slash_command(session, line)
    assert message in str(caught.value)
    assert not engine.prompts
    assert not session.conversation.parameters


def test_the_last_thinking_and_stats_can_be_seen() -> None:
    session, stdout, _ = session_of(FakeEngine([thinking("hm") + answer("ok")]), thinking="hidden")
    run_slash_command(session, "/think")
    run_slash_command(session, "/stats")
    assert stdout.getvalue() == "The last reply has no thinking.\nNo reply yet.\n"
    session.say("hi")
    run_slash_command(session, "/think")
    run_slash_command(session, "/stats")
    assert "ok\nhm\n3+2 tok" in stdout.getvalue()


def test_show_names_the_settings() -> None:
    session, stdout, _ = session_of(FakeEngine([answer("ok")], defaults={"temperature": 0.25}))
    run_slash_command(session, "/set parameter top_k 3")
    run_slash_command(session, "/show")
    lines = dict(line.split(maxsplit=1) for line in stdout.getvalue().splitlines())
    assert (lines["model"], lines["temperature"], lines["top_k"]) == ("fake", "0.25", "3")
