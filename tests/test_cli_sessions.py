"""Conversations taken up again: at the command line, by slash commands, and to the last bit."""

import io
import json
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import TOKENIZER
from fake_engine import FakeEngine, answer, conversation
from typer.testing import CliRunner

from localr1.cli import chat as command
from localr1.cli import session_table
from localr1.cli.cells import cells
from localr1.cli.conversation import Conversation
from localr1.cli.keeper import SessionKeeper
from localr1.cli.loading import EngineLoader
from localr1.cli.main import app
from localr1.cli.output import Output
from localr1.cli.printer import ReplyStyle
from localr1.cli.session import ChatSession
from localr1.cli.slash import run_slash_command
from localr1.embedded import R1_NANO
from localr1.engine.engine import Engine
from localr1.engine.events import Delta
from localr1.errors import ContextError, NotFoundError, OutputError, UsageError
from localr1.load import load_engine
from localr1.sessions.archive import SessionArchive


@pytest.fixture
def archive(tmp_path: Path) -> SessionArchive:
    return SessionArchive(tmp_path / "sessions")


def chat_of(
    engine: Any, archive: SessionArchive | None, **options: Any
) -> tuple[ChatSession, io.StringIO, io.StringIO]:
    stdout, stderr = io.StringIO(), io.StringIO()
    chat = Conversation(engine, **options)
    keeper = None if archive is None else SessionKeeper(archive, chat, "/a/model")
    session = ChatSession(Output(stdout, stderr), chat, ReplyStyle(), goes_on=True, keeper=keeper)
    return session, stdout, stderr


def contents(session: ChatSession) -> list[str]:
    return [turn["content"] for turn in session.conversation.turns]


# What is kept, and when.


def test_a_conversation_is_kept_after_every_turn(archive: SessionArchive) -> None:
    session, _, _ = chat_of(FakeEngine([answer("one"), answer("two")]), archive)
    assert archive.sessions() == []
    run_slash_command(session, "/set parameter temperature 0.25")
    run_slash_command(session, "/set think 300")
    for count, text in enumerate(("first", "second"), start=1):
        session.say(text)
        (stored,) = archive.sessions()
        assert stored.num_messages == count
    assert stored.document is not None
    assert stored.document.parameters == {"temperature": 0.25}
    assert (stored.document.thinking, stored.document.think_budget) == (True, 300)
    session.close()


def test_a_turn_that_failed_leaves_what_was_kept(archive: SessionArchive) -> None:
    engine = FakeEngine([answer("one")])
    session, _, _ = chat_of(engine, archive)
    session.say("first")
    engine.error = ContextError("too long")
    with pytest.raises(ContextError):
        session.say("second")
    assert archive.sessions()[0].num_messages == 1
    session.close()


def test_without_sessions_nothing_is_kept_and_that_is_said() -> None:
    session, _, _ = chat_of(FakeEngine([answer("one")]), None)
    session.say("first")
    for line in ("/save", "/resume last", "/sessions"):
        with pytest.raises(UsageError, match="Start the chat without --no-session"):
            run_slash_command(session, line)


def test_resume_brings_back_the_conversation_and_its_settings(archive: SessionArchive) -> None:
    session, _, _ = chat_of(FakeEngine([answer("one")]), archive, system="Be brief.")
    run_slash_command(session, "/set parameter top_k 3")
    session.say("first")
    run_slash_command(session, "/save trip to Rome")
    session.close()
    engine = FakeEngine([answer("two")])
    session, _, stderr = chat_of(engine, archive)
    session.say("something else")
    run_slash_command(session, "/resume trip to Rome")
    assert "Resumed 'trip to Rome' (1 messages): it is read anew" in stderr.getvalue()
    assert contents(session) == ["first", "one"]
    assert session.conversation.parameters == {"top_k": 3}
    assert session.conversation.system == "Be brief."
    session.say("more")
    assert engine.prompts[-1][0] == {"role": "system", "content": "Be brief."}
    assert len(archive.sessions()) == 2
    session.close()


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


def speaking(*replies: list[Delta], **options: Any) -> FakeEngine:
    """With a tokenizer that a grammar can be made for."""
    return FakeEngine(list(replies), tokenizer=TOKENIZER, **options)


def test_the_form_of_answers_and_what_happens_at_the_end_are_kept(
    archive: SessionArchive, tmp_path: Path
) -> None:
    path = tmp_path / "Städte.json"
    path.write_text(json.dumps(SCHEMA), encoding="utf-8")
    session, _, _ = chat_of(speaking(answer("one")), archive)
    run_slash_command(session, f"/set format {path}")
    run_slash_command(session, "/set full drop-oldest")
    session.say("first")
    session.close()
    path.unlink()
    engine = speaking(answer("two"))
    session, stdout, stderr = chat_of(engine, archive)
    run_slash_command(session, "/resume last")
    assert f"Answers are JSON: {path}." in stderr.getvalue()
    run_slash_command(session, "/show")
    shown = dict(line.split("  ", 1) for line in stdout.getvalue().splitlines() if "  " in line)
    assert shown["answers"].strip() == f"JSON: {path}"
    assert shown["when full"].strip() == "the oldest turns are dropped"
    session.say("second")
    assert engine.params[0].grammar is not None
    assert session.conversation.drops_oldest
    run_slash_command(session, "/set format text")
    session.say("third")
    session.close()
    document = archive.load(archive.find("last"))
    assert (document.schema, document.drops_oldest) == (None, True)


def test_what_is_set_after_the_last_answer_is_kept_too(archive: SessionArchive) -> None:
    session, _, _ = chat_of(speaking(answer("one")), archive)
    session.say("first")
    first = archive.find("last")
    run_slash_command(session, "/set parameter top_k 7")
    run_slash_command(session, "/clear")
    assert archive.load(first).parameters == {}, "set for what comes after it"
    assert len(archive.load(first).turns) == 2
    session.say("second")
    second = archive.find("last")
    run_slash_command(session, "/set system Be brief.")
    run_slash_command(session, f"/resume {first}")
    assert archive.load(second).system == "Be brief."
    run_slash_command(session, "/set think 9")
    session.close()
    assert archive.load(first).think_budget == 9
    assert archive.find("last") == second, "nothing was said in the other"


def test_a_form_that_cannot_be_followed_here_is_told(archive: SessionArchive) -> None:
    session, _, _ = chat_of(speaking(answer("one")), archive)
    run_slash_command(session, "/set format json")
    session.say("first")
    session.close()
    stored = archive.load(archive.find("last"))
    stored.schema = {"type": "no such type"}
    archive.save(stored)
    engine = speaking(answer("two"))
    session, _, stderr = chat_of(engine, archive)
    run_slash_command(session, "/resume last")
    assert "Answers are text: any object: expected a JSON schema" in stderr.getvalue()
    session.say("second")
    assert engine.params[0].grammar is None
    session.close()


def test_slash_commands_about_sessions(archive: SessionArchive) -> None:
    session, stdout, _ = chat_of(FakeEngine([answer("ok")]), archive)
    with pytest.raises(UsageError, match="/save: expected a conversation"):
        run_slash_command(session, "/save")
    run_slash_command(session, "/sessions")
    assert "No session yet" in stdout.getvalue()
    session.say("hello there")
    opened = archive.find("last")
    run_slash_command(session, "/resume")
    assert stdout.getvalue().splitlines()[-1].split()[0] == opened
    assert stdout.getvalue().endswith("(open) hello there\n")
    for line in ("/resume last", "/sessions what", "/sessions rm"):
        with pytest.raises(UsageError):
            run_slash_command(session, line)
    with pytest.raises(NotFoundError):
        run_slash_command(session, "/resume nothing")
    run_slash_command(session, "/clear")
    session.say("another")
    assert len(archive.sessions()) == 2, "/clear begins another session"
    run_slash_command(session, f"/sessions rm {opened}")
    assert [each.title for each in archive.sessions()] == ["another"]
    run_slash_command(session, "/sessions rm last")
    assert archive.sessions() == []
    session.say("one more")
    assert len(archive.sessions()) == 1, "what was deleted while open begins anew"
    session.close()


def test_a_session_that_is_open_elsewhere_is_left_to_it(archive: SessionArchive) -> None:
    first, _, _ = chat_of(FakeEngine([answer("ok")]), archive)
    first.say("hello")
    second, _, _ = chat_of(FakeEngine([answer("ok")]), archive)
    second.say("mine")
    with pytest.raises(OutputError, match="open in another localr1"):
        run_slash_command(second, f"/resume {archive.sessions()[-1].id}")
    assert contents(second) == ["mine", "ok"]
    for session in (first, second):
        session.close()


def test_a_row_of_a_session_is_one_row_of_the_terminal(
    archive: SessionArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("漢字 und ein langer Anfang, der nicht in die Zeile passt", "kurz"):
        session, stdout, _ = chat_of(FakeEngine([answer("ok")]), archive)
        session.say(text)
        session.close()
    monkeypatch.setattr(Output, "is_terminal", lambda *_: True)
    for columns, title in ((80, "漢字 und ein lang…"), (200, "漢字 und ein langer Anfang, ")):
        monkeypatch.setattr(session_table, "terminal_size", lambda _, c=columns: (c, 24))
        session_table.print_sessions(session.output, archive.sessions())
        *_, short, long = stdout.getvalue().splitlines()
        assert short.endswith("  kurz")
        assert title in long
        assert cells(long) < columns


# Earlier turns.


def test_regen_answers_the_last_message_again() -> None:
    engine = FakeEngine([answer("one"), answer("two"), answer("three")])
    session, _, _ = chat_of(engine, None)
    with pytest.raises(UsageError, match="/regen"):
        run_slash_command(session, "/regen")
    session.say("first")
    session.say("second")
    run_slash_command(session, "/regen")
    assert contents(session) == ["first", "one", "second", "three"]
    asked = [each for each in engine.prompts if each[-1]["content"] == "second"]
    assert len(asked) == 2
    assert asked[0] == asked[1]
    engine.error = ContextError("too long")
    with pytest.raises(ContextError):
        run_slash_command(session, "/regen")
    assert contents(session) == ["first", "one", "second", "three"], "as it was"


def test_edit_branches_and_leaves_what_was(archive: SessionArchive) -> None:
    engine = FakeEngine([answer("one"), answer("two"), answer("three")])
    session, _, _ = chat_of(engine, archive)
    for line in ("/edit", "/edit 1 x"):
        with pytest.raises(UsageError, match="/edit: expected a message to edit"):
            run_slash_command(session, line)
    session.say("first")
    session.say("second")
    for wrong in ("/edit 0", "/edit 3 x"):
        with pytest.raises(UsageError, match="a message from 1 to 2"):
            run_slash_command(session, wrong)
    run_slash_command(session, "/edit 1 premier")
    assert contents(session) == ["premier", "three"]
    kept = sorted(each.num_messages for each in archive.sessions())
    assert kept == [1, 2], "the conversation as it was is a session of its own"
    run_slash_command(session, "/edit")
    assert contents(session) == []
    assert session.take_draft() == "premier"
    assert session.take_draft() == ""
    session.close()


# At the command line.


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs a command line on a fake engine, in a home of its own."""
    monkeypatch.setenv("LOCALR1_HOME", str(tmp_path))

    def run(engine: FakeEngine, *arguments: str, code: int = 0) -> str:
        def load(path: Path, output: Output, **_: Any) -> Conversation:
            return conversation(engine)

        monkeypatch.setattr(command, "load_conversation", load)
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == code, (result.output, result.exception)
        return result.output

    return run


def test_options_that_say_different_things_are_refused(run: Any) -> None:
    engine = FakeEngine([answer("ok")])
    with pytest.raises(AssertionError, match="--resume and --continue"):
        run(engine, "chat", ".", "-p", "hi", "--continue", "--resume", "last")
    for options in (
        ["--no-think", "--think-budget", "9"],
        ["--hide-thinking", "--think-view", "full"],
    ):
        with pytest.raises(AssertionError, match="expected one of them, found both"):
            run(engine, "chat", ".", "-p", "hi", *options)
    assert not engine.prompts


def test_one_answer_is_no_session_unless_it_goes_on_with_one(run: Any, tmp_path: Path) -> None:
    archive = SessionArchive(tmp_path / "state" / "sessions")
    run(FakeEngine([answer("ok")]), "chat", ".", "-p", "hi")
    assert archive.sessions() == []
    session, _, _ = chat_of(FakeEngine([answer("one")]), archive)
    assert session.keeper is not None
    session.keeper.model = str(R1_NANO)
    session.say("first")
    session.close()
    for arguments in (["--resume", "last"], ["--continue"]):
        engine = FakeEngine([answer("more")])
        output = run(engine, "chat", *arguments, "-p", "go on", "-o", "top_k=7")
        assert "Resumed 'first'" in output
        assert engine.prompts[0][0]["content"] == "first"
        assert engine.params[0].sampling.top_k == 7
    assert archive.sessions()[0].num_messages == 3
    for more, constrained, drops in (
        (["--format", "json", "--on-full", "drop-oldest"], True, True),
        ([], True, True),
        (["--format", "text"], False, True),
        (["--on-full", "stop"], False, False),
    ):
        engine = speaking(answer("more"))
        run(engine, "chat", "--continue", "-p", "go on", *more)
        assert (engine.params[0].grammar is not None) == constrained
        assert archive.load(archive.find("last")).drops_oldest == drops
    run(FakeEngine([answer("x")]), "chat", "--resume", "none", "-p", "a", code=1)


def test_a_session_goes_on_with_the_context_and_the_cache_it_was_held_with(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = SessionArchive(tmp_path / "state" / "sessions")
    session, _, _ = chat_of(FakeEngine([answer("one")]), archive)
    assert session.keeper is not None
    session.keeper.model, session.keeper.context, session.keeper.kv_bits = str(R1_NANO), 512, 8
    session.say("first")
    session.close()
    seen: list[tuple[int | None, int | None]] = []

    def loader(*arguments: Any) -> EngineLoader:
        made = EngineLoader(*arguments)
        seen.append((made.context, made.kv_bits))
        return made

    monkeypatch.setattr(command, "EngineLoader", loader)
    for more in ([], ["--context", "256"], [], ["--kv-bits", "16"], [str(R1_NANO)]):
        run(FakeEngine([answer("more")]), "chat", "--continue", "-p", "go on", *more)
    assert seen == [(512, 8), (256, 8), (256, 8), (256, 16), (None, None)]


def test_sessions_are_listed_and_deleted(run: Any, tmp_path: Path) -> None:
    engine = FakeEngine([answer("x")])
    assert "No session is kept" in run(engine, "sessions")
    archive = SessionArchive(tmp_path / "state" / "sessions")
    for text in ("first", "second"):
        session, _, _ = chat_of(FakeEngine([answer("one")]), archive)
        session.say(text)
        session.close()
    listed = run(engine, "sessions").splitlines()
    assert listed[0].split() == ["ID", "CHANGED", "MESSAGES", "CACHE", "TITLE"]
    assert [line.split()[-1] for line in listed[1:]] == ["second", "first"]
    documents = json.loads(run(engine, "sessions", "--json"))
    assert [each["title"] for each in documents] == ["second", "first"]
    run(engine, "sessions", "rm", documents[0]["id"], code=1)  # Nobody can be asked.
    run(engine, "sessions", "rm", "-y", documents[0]["id"])
    assert [each.title for each in archive.sessions()] == ["first"]
    (left,) = archive.sessions()
    output = run(engine, "sessions", "rm", "-y", "--json", "last")
    (document,) = json.loads(output[output.index("[") :])
    assert document == {"id": left.id, "title": "first", "deleted": True}
    with pytest.raises(AssertionError, match="--json before a command"):
        run(engine, "sessions", "--json", "rm", "-y", "last")


# To the last bit.


@pytest.fixture(scope="module")
def nano() -> Iterator[Any]:
    from localr1.cli.models import model_to_run
    from localr1.settings import Settings

    settings = Settings.from_environment()
    path = model_to_run("r1-nano", settings, Output(io.StringIO(), io.StringIO()))
    engines: list[Engine] = []

    def load() -> Engine:
        engines.append(load_engine(path, threads=1, context=1024))
        return engines[-1]

    yield load
    for engine in engines:
        engine.close()


def cache_of(engine: Engine) -> list[torch.Tensor]:
    cache = engine.sequence.cache
    length = len(engine.sequence.ids)
    return [t[..., :length, :].clone() for i in range(cache.num_layers) for t in cache.tensors(i)]


def test_who_resumes_goes_on_with_the_same_bits_as_who_stayed(
    nano: Any, archive: SessionArchive
) -> None:
    options = {"parameters": {"temperature": 0.7, "seed": 5, "max_tokens": 120}}
    stayed, _, _ = chat_of(nano(), archive, **options)
    for text in ("What is 47 * 86?", "Was ist 36 plus 58?"):
        stayed.say(text)
        stayed.settling.wait()
    run_slash_command(stayed, "/save numbers")
    stayed.settling.wait()
    assert stayed.keeper is not None
    stayed.keeper.leave()

    left, _, stderr = chat_of(nano(), archive)
    run_slash_command(left, "/resume numbers")
    left.settling.wait()
    assert "tokens taken up in" in stderr.getvalue()
    engines = [each.conversation.engine for each in (stayed, left)]
    assert engines[0].sequence.ids == engines[1].sequence.ids
    replies = [each.say("Which is larger, 9.11 or 9.9?") for each in (stayed, left)]
    for session in (stayed, left):
        session.settling.wait()
    assert replies[0].thinking == replies[1].thinking
    assert replies[0].answer == replies[1].answer
    new = len(engines[0].tokenizer.encode("Which is larger, 9.11 or 9.9?"))
    for reply in replies:
        assert reply.done is not None
        usage = reply.done.usage
        assert usage.prompt_tokens - usage.cached_tokens <= new + 7, "only what is new is read"
    for one, other in zip(*(cache_of(engine) for engine in engines), strict=True):
        assert torch.equal(one, other)
    left.close()


def test_what_cannot_be_taken_up_is_read_anew_and_gives_the_same_answer(
    nano: Any, archive: SessionArchive
) -> None:
    options = {"parameters": {"temperature": 0.0, "max_tokens": 60}}
    first, _, _ = chat_of(nano(), archive, **options)
    first.say("What is 47 * 86?")
    first.close()
    path = archive.snapshot_path(archive.find("last"))
    whole = path.read_bytes()
    answers = []
    for data, reason in (
        (whole, "tokens taken up in"),
        (whole[:-200] + bytes([whole[-200] ^ 1]) + whole[-199:], "it is read anew: "),
        (whole[:2000], "it is read anew: "),
        (None, "it is read anew, as nothing was kept"),
    ):
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        again, _, stderr = chat_of(nano(), archive)
        assert again.keeper is not None
        again.output.note(again.keeper.resume(archive.find("last")))
        assert reason in stderr.getvalue()
        events = again.conversation.reply("Say it again.", threading.Event())
        answers.append("".join(event.text for event in events if isinstance(event, Delta)))
        again.conversation.cut(2)
        again.close()
        path.write_bytes(whole)
    assert len(set(answers)) == 1


def test_the_session_of_another_model_is_read_anew(nano: Any, archive: SessionArchive) -> None:
    first, _, _ = chat_of(nano(), archive, parameters={"max_tokens": 20})
    first.say("Hello!")
    first.close()
    with closing(load_engine(R1_NANO, threads=1, context=1024)) as unquantized:
        again, _, stderr = chat_of(unquantized, archive)
        assert again.keeper is not None
        again.output.note(again.keeper.resume(archive.find("last")))
        assert "as the model, its revision or its quantization is another." in stderr.getvalue()
        assert unquantized.sequence.ids == []
        again.close()
