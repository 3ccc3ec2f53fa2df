"""The chat at a terminal: keys, blocks, paste, history; once whole in a pseudo-terminal."""

import io
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine, answer, conversation
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.input.base import PipeInput
from prompt_toolkit.output import DummyOutput

from localr1.cli import repl
from localr1.cli.output import Output
from localr1.cli.printer import ReplyStyle
from localr1.cli.session import ChatSession
from localr1.errors import OutputError

ENTER, CTRL_J, ALT_ENTER, CTRL_C, CTRL_D = "\r", "\n", "\x1b\r", "\x03", "\x04"
PASTE, PASTE_END = "\x1b[200~", "\x1b[201~"


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe:
        yield pipe


def messages_of(keyboard: PipeInput, keys: str) -> tuple[list[str], int]:
    """What the keys send to the model, and the exit code."""
    engine = FakeEngine([answer("ok")])
    output = Output(io.StringIO(), io.StringIO())
    session = ChatSession(output, conversation(engine), ReplyStyle())
    keyboard.send_text(keys)
    prompt = repl.make_prompt(session, None, terminal_input=keyboard, terminal_output=DummyOutput())
    code = repl.converse(session, prompt)
    return [messages[-1]["content"] for messages in engine.prompts], code


@pytest.mark.parametrize(
    ("keys", "messages"),
    [
        (f"hello{ENTER}", ["hello"]),
        (f"  one  {ENTER}two{ENTER}", ["one", "two"]),
        (f"one\\{ENTER}two{ENTER}", ["one\ntwo"]),
        (f"one{CTRL_J}two{ENTER}", ["one\ntwo"]),
        (f"one{ALT_ENTER}two{ENTER}", ["one\ntwo"]),
        (f'"""one{ENTER}{ENTER}two"""{ENTER}', ["one\n\ntwo"]),
        (f'"""one"""{ENTER}', ["one"]),
        (f"{PASTE}one\ntwo\n{PASTE_END}three{ENTER}", ["one\ntwo\nthree"]),
        (f"{ENTER}   {ENTER}x{ENTER}", ["x"]),
        (f" /not a command{ENTER}", ["/not a command"]),
        (f"/nonsense{ENTER}x{ENTER}", ["x"]),
        (f"half{CTRL_C}whole{ENTER}", ["whole"]),
    ],
)
def test_keys(keyboard: PipeInput, keys: str, messages: list[str]) -> None:
    assert messages_of(keyboard, keys + CTRL_D) == (messages, 0)


def test_a_paste_is_not_sent_by_itself(keyboard: PipeInput) -> None:
    assert messages_of(keyboard, f"{PASTE}one\ntwo\n{PASTE_END}{CTRL_C}{CTRL_D}") == ([], 0)


@pytest.mark.parametrize("leave", [f"/bye{ENTER}", f"/exit{ENTER}", CTRL_D])
def test_leaving_is_exit_code_0(keyboard: PipeInput, leave: str) -> None:
    assert messages_of(keyboard, f"x{ENTER}{leave}") == (["x"], 0)


def test_two_interrupts_leave_with_130(keyboard: PipeInput) -> None:
    assert messages_of(keyboard, CTRL_C + CTRL_C) == ([], 130)


def test_two_interrupts_far_apart_do_not_leave(
    keyboard: PipeInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repl, "LEAVE_SECONDS", 0.0)
    assert messages_of(keyboard, f"{CTRL_C}{CTRL_C}x{ENTER}{CTRL_D}") == (["x"], 0)


@pytest.mark.parametrize(
    ("text", "is_open"),
    [('"""', True), ('"""a', True), ('"""a"""', False), ('""""""', False), ('a """', False)],
)
def test_blocks(text: str, is_open: bool) -> None:
    assert repl.is_open_block(text) == is_open


def test_the_history_is_the_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "chat_history"
    history = repl.open_history(path)
    history.append_string("a secret\nof two lines")
    assert list(repl.open_history(path).load_history_strings()) == ["a secret\nof two lines"]
    if os.name != "nt":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.chmod(0o644)
        repl.open_history(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_history_that_cannot_be_kept_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where the directory should be")
    with pytest.raises(OutputError, match="Use --no-history"):
        repl.open_history(tmp_path / "state" / "chat_history")


TERMINAL_PROGRAM = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from fake_engine import FakeEngine, answer, conversation, endless_answer
from localr1.cli import chat, main
engine = FakeEngine([endless_answer(), answer("Paris", ".")], pause=0.02)
chat.load_conversation = lambda *_, **__: conversation(engine)
main.main(["chat", "."])
"""


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_a_whole_conversation_in_a_terminal(tmp_path: Path) -> None:
    import pexpect

    environment = {**os.environ, "LOCALR1_HOME": str(tmp_path), "TERM": "xterm-256color"}
    child = pexpect.spawn(
        sys.executable,
        ["-c", TERMINAL_PROGRAM, str(Path(__file__).parent)],
        env=environment,
        encoding="utf-8",
        timeout=30,
        dimensions=(24, 80),
    )
    child.expect(">>>")
    child.send("count\r")
    child.expect("word3")
    child.sendintr()
    child.expect(r"\(stopped\)")
    child.expect(">>>")
    child.send("/cler\r")
    child.expect("Did you mean /clear")
    child.expect(">>>")
    child.send("capital of France?\r")
    child.expect("Paris.")
    child.expect(">>>")
    child.send(CTRL_D)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    history = (tmp_path / "state" / "chat_history").read_text()
    assert "+capital of France?" in history


def test_a_pipe_is_no_terminal() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from localr1.cli.main import main; main(['chat', '.'])"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert "Give one with -p or on stdin." in result.stderr
