"""Slash commands that reach out of the conversation: files, the clipboard, other models, Tab."""

import base64
import io
import os
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
from engine_cases import TOKENIZER
from fake_engine import FakeEngine, FakeTokenizer, answer, conversation, thinking
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from localr1.cli import clipboard
from localr1.cli.completion import ChatCompleter
from localr1.cli.output import Output
from localr1.cli.printer import ReplyStyle
from localr1.cli.reply import Reply
from localr1.cli.session import ChatSession
from localr1.cli.slash import COMMANDS, run_slash_command
from localr1.cli.slash_files import split_path
from localr1.cli.text_files import MAX_BYTES, decode_text, read_text_file
from localr1.engine.engine import Engine
from localr1.errors import LocalR1Error, MemoryLimitError, NotFoundError, UsageError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@dataclass
class FakeLoader:
    """engines: what load() gives, one after another; an exception is raised."""

    engines: list[FakeEngine | BaseException] = field(default_factory=list)
    path: Path = Path("first")
    loaded: list[Path] = field(default_factory=list)

    def find(self, name: str) -> Path:
        if name == "missing":
            raise NotFoundError("missing: there is no such file or directory")
        return Path(name)

    def load(self, path: Path) -> Engine:
        self.loaded.append(path)
        engine = self.engines.pop(0)
        if isinstance(engine, BaseException):
            raise engine
        self.path = path
        return cast(Engine, engine)

    def names(self) -> list[str]:
        return ["first", "r1-nano"]


def session_of(engine: FakeEngine, stdout: io.StringIO | None = None) -> ChatSession:
    output = Output(stdout or io.StringIO(), io.StringIO())
    return ChatSession(output, conversation(engine), ReplyStyle(), loader=FakeLoader())


@pytest.fixture
def session() -> ChatSession:
    return session_of(FakeEngine([answer("ok")]))


def said(session: ChatSession) -> str:
    stream = session.output.stdout
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


def noted(session: ChatSession) -> str:
    stream = session.output.stderr
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


def prompts(session: ChatSession) -> list[str]:
    """What was sent, newest last."""
    engine = cast(FakeEngine, session.conversation.engine)
    return [messages[-1]["content"] for messages in engine.prompts]


def test_help_fits_a_screen(session: ChatSession) -> None:
    run_slash_command(session, "/help")
    lines = said(session).splitlines()
    assert len(lines) <= 23  # The prompt needs the last of 24.
    assert max(map(len, lines)) <= 79


def test_a_file_goes_in_front_of_the_next_message(session: ChatSession, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes("Grüße\r\nzwei\n".encode())
    run_slash_command(session, f"/read {tmp_path / 'notes.txt'}")
    assert noted(session) == "notes.txt: 11 tokens, in front of your next message.\n"
    assert not prompts(session)
    session.send("What is it?")
    # As DeepSeek-R1's model card has it.
    assert prompts(session) == [
        "[file name]: notes.txt\n[file content begin]\nGrüße\nzwei\n[file content end]\nWhat is it?"
    ]
    assert session.with_attached("next") == "next"


def test_a_file_with_a_question_is_sent_at_once(session: ChatSession, tmp_path: Path) -> None:
    path = tmp_path / "mit Leerzeichen – ü.txt"
    path.write_text("x", encoding="utf-8")
    run_slash_command(session, f'/read "{path}" Was steht da?')
    assert prompts(session)[0].startswith(f"[file name]: {path.name}\n")
    assert prompts(session)[0].endswith("[file content end]\nWas steht da?")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a.txt why", ("a.txt", "why")),
        ("a.txt", ("a.txt", "")),
        ('"a b.txt"  why not', ("a b.txt", "why not")),
        ("'a b.txt'", ("a b.txt", "")),
        ('"a b.txt', ("a b.txt", "")),
    ],
)
def test_file_names_in_quotes(text: str, parts: tuple[str, str]) -> None:
    assert split_path(text) == parts


def test_what_is_no_text_file(session: ChatSession, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "large").write_bytes(b"x" * (MAX_BYTES + 1))
    for name, error, message in (
        ("", UsageError, "expected a text file, found a directory"),
        ("binary", UsageError, "expected a text file, found binary data"),
        ("large", UsageError, "expected at most 16 MiB of text, found more"),
        ("missing", NotFoundError, "there is no such file. Tab completes"),
        ("a\0b", LocalR1Error, "cannot be read"),
    ):
        with pytest.raises(error, match=message):
            run_slash_command(session, f'/read "{tmp_path / name}"')
    with pytest.raises(UsageError, match="expected the name of a text file"):
        run_slash_command(session, "/read")
    assert not session.attached


@pytest.mark.parametrize(
    ("data", "text", "replaced"),
    [
        ("ä".encode(), "ä", 0),
        (b"\xef\xbb\xbf\xc3\xa4", "ä", 0),
        ("ä\n".encode("utf-16"), "ä\n", 0),
        (b"a\r\nb\rc", "a\nb\nc", 0),
        ("Grüße".encode("latin-1"), "Gr\ufffd\ufffde", 2),
        ("\ufffd".encode(), "\ufffd", 0),
        (b"", "", 0),
    ],
)
def test_text_of_unknown_origin(data: bytes, text: str, replaced: int) -> None:
    assert decode_text(data) == (text, replaced)


def test_a_file_that_is_no_utf8_says_so(session: ChatSession, tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_bytes("Grüße".encode("latin-1"))
    assert read_text_file(tmp_path / "old.txt")[1] == 2
    run_slash_command(session, f"/read {tmp_path / 'old.txt'}")
    assert "old.txt is no UTF-8 throughout: 2 characters replaced." in noted(session)


def test_clear_takes_files_away_too(session: ChatSession, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    run_slash_command(session, f"/read {tmp_path / 'a.txt'}")
    run_slash_command(session, "/clear")
    assert not session.attached


CODE = "Look:\n\n```py\nx = 1\n```\n\nand\n\n~~~\ny\n~~~\n"


def test_an_answer_is_copied_through_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("shutil.which", lambda _: None)
    stdout = Terminal()
    session = session_of(FakeEngine([thinking("hm") + answer(CODE)]), stdout)
    with pytest.raises(UsageError, match="expected an answer, found none yet"):
        run_slash_command(session, "/copy")
    session.say("hi")
    for command, wanted in (("/copy", CODE), ("/copy code", "x = 1\ny\n")):
        stdout.truncate(0)
        run_slash_command(session, command)
        (sent,) = stdout.getvalue().replace("\0", "").split("\x1b]52;c;")[1:]
        assert base64.b64decode(sent.removesuffix("\x07")).decode() == wanted
    assert "handed to the terminal's clipboard (OSC 52)" in noted(session)
    with pytest.raises(UsageError, match="nothing or `code`"):
        run_slash_command(session, "/copy all")


def test_there_may_be_no_clipboard(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    session.say("hi")
    with pytest.raises(LocalR1Error, match="there is no clipboard here"):
        run_slash_command(session, "/copy")
    with pytest.raises(UsageError, match="expected code in the last answer, found none"):
        run_slash_command(session, "/copy code")


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for a tool is a shell script")
@pytest.mark.parametrize(("status", "how"), [(0, "copied (fake-copy)."), (1, "OSC 52")])
def test_a_tool_is_asked_first(
    status: int, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "fake-copy"
    tool.write_text(f"#!/bin/sh\ncat > {tmp_path}/copied\nexit {status}\n")
    tool.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(clipboard, "tools", lambda: [["no-such-tool"], ["fake-copy"]])
    output = Output(Terminal(), io.StringIO())
    assert how in clipboard.copy_text("Grüße", output, over_ssh=False)
    assert (tmp_path / "copied").read_text() == "Grüße"
    # Far away the terminal is nearer.
    assert "OSC 52" in clipboard.copy_text("x", output, over_ssh=True)


def test_too_much_for_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(LocalR1Error, match="75,000 bytes"):
        clipboard.copy_text("x" * 80_000, Output(Terminal(), io.StringIO()), over_ssh=False)


def test_every_platform_has_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    for platform, first in (("darwin", "pbcopy"), ("win32", "clip"), ("linux", "wl-copy")):
        monkeypatch.setattr(sys, "platform", platform)
        assert clipboard.tools()[0][0] == first


def loader_of(session: ChatSession) -> FakeLoader:
    assert isinstance(session.loader, FakeLoader)
    return session.loader


def test_another_model_begins_anew_or_goes_on(session: ChatSession) -> None:
    first = cast(FakeEngine, session.conversation.engine)
    second = FakeEngine([answer("two")], name="second")
    third = FakeEngine([answer("three")], name="third")
    loader_of(session).engines = [second, third]
    run_slash_command(session, "/set parameter top_k 3")
    session.say("one")
    run_slash_command(session, "/load second")
    assert first.closed
    assert not second.closed
    session.say("two")
    assert [len(messages) for messages in second.prompts] == [1]
    assert second.params[0].sampling.top_k == 3
    run_slash_command(session, "/load third keep")
    session.say("three")
    assert [message["content"] for message in third.prompts[0]] == ["two", "two", "three"]
    assert loader_of(session).loaded == [Path("second"), Path("third")]


def test_answers_keep_their_form_with_another_model(session: ChatSession) -> None:
    first = cast(FakeEngine, session.conversation.engine)
    first.tokenizer = TOKENIZER
    second = FakeEngine([answer("two")], name="second", tokenizer=TOKENIZER)
    silent = FakeTokenizer()
    silent.eos_ids, silent.control_ids = frozenset(), {}  # type: ignore[attr-defined]
    third = FakeEngine([answer("three")], name="third", tokenizer=silent)
    loader_of(session).engines = [MemoryLimitError("too large"), first, second, third]
    run_slash_command(session, "/set format json")
    with pytest.raises(MemoryLimitError):
        run_slash_command(session, "/load second")
    assert session.conversation.answers is not None
    run_slash_command(session, "/load second")
    session.say("one")
    assert second.params[0].grammar is not None
    run_slash_command(session, "/load third")
    assert "Answers are text: structured answers: expected a model with" in noted(session)
    session.say("two")
    assert third.params[0].grammar is None


def test_a_model_that_is_not_there_changes_nothing(session: ChatSession) -> None:
    engine = cast(FakeEngine, session.conversation.engine)
    for line, error in (("/load missing", NotFoundError), ("/load", UsageError)):
        with pytest.raises(error):
            run_slash_command(session, line)
    assert session.conversation.engine is cast(Engine, engine)
    assert not engine.closed


@pytest.mark.parametrize("error", [MemoryLimitError("too large"), KeyboardInterrupt()])
def test_where_loading_fails_the_first_model_comes_back(
    error: BaseException, session: ChatSession
) -> None:
    session.say("one")
    again = FakeEngine([answer("again")], name="first")
    loader_of(session).engines = [error, again]
    with pytest.raises(type(error)):
        run_slash_command(session, "/load second")
    assert loader_of(session).loaded == [Path("second"), Path("first")]
    assert "Still here: first." in noted(session)
    session.say("two")
    assert [message["content"] for message in again.prompts[0]] == ["one", "ok", "two"]
    assert not session.ended


def test_where_both_fail_the_chat_ends(session: ChatSession) -> None:
    loader_of(session).engines = [MemoryLimitError("too large"), MemoryLimitError("gone")]
    with pytest.raises(MemoryLimitError, match="gone"):
        run_slash_command(session, "/load second")
    assert session.ended
    session.close()


def test_a_thought_is_broken_between_words(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Output, "is_terminal", lambda *_: True)
    monkeypatch.setattr("localr1.cli.output.terminal_size", lambda _: (20, 24))
    session.last_reply = Reply(thinking="\n  one two three four five six\n\nseven\n")
    run_slash_command(session, "/think")
    assert said(session) == "one two three four\nfive six\n\nseven\n"


def test_tokens(session: ChatSession) -> None:
    run_slash_command(session, "/tokens ab ü")
    run_slash_command(session, "/tokens")
    assert said(session).splitlines() == [
        "4 tokens: a|b| |ü",
        "context  64 tokens",
        "used     3 (5%)",
        "left     61 for your next message and its reply",
    ]


def completions(session: ChatSession, text: str) -> list[str]:
    completer = ChatCompleter(session)
    event = CompleteEvent(completion_requested=True)
    return [
        text[: len(text) + each.start_position] + each.text
        for each in completer.get_completions(Document(text), event)
    ]


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("/cle", ["/clear"]),
        ("/ex", ["/exit"]),
        ("/lo", ["/load "]),
        ("/load ", ["/load first", "/load r1-nano"]),
        ("/load r", ["/load r1-nano"]),
        ("/set p", ["/set parameter "]),
        ("/set parameter top", ["/set parameter top_k", "/set parameter top_p"]),
        ("/clear ", []),
        ("/nonsense x", []),
        ("a message /cle", []),
        ("/cle\nmore", []),
    ],
)
def test_tab(session: ChatSession, typed: str, completed: list[str]) -> None:
    assert completions(session, typed) == completed


def test_tab_completes_every_command(session: ChatSession) -> None:
    offered = {text.strip() for text in completions(session, "/")}
    assert {f"/{name}" for name in COMMANDS} <= offered


def test_tab_completes_files(
    session: ChatSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.txt", "a b.txt", "ä.txt", ".hidden"):
        (tmp_path / name).write_text("x")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert completions(session, "/read ") == [
        '/read "a b.txt"',
        "/read a.txt",
        f"/read folder{os.sep}",
        "/read ä.txt",
    ]
    assert completions(session, "/read ä") == ["/read ä.txt"]
    assert completions(session, '/read "a ') == ['/read "a b.txt"']
    assert completions(session, "/read .h") == ["/read .hidden"]
    assert completions(session, f"/read {tmp_path}{os.sep}fo") == [
        f"/read {tmp_path}{os.sep}folder{os.sep}"
    ]
    assert completions(session, "/read nowhere/x") == []
