"""Sessions and earlier turns as a person uses them: the embedded model in a pseudo-terminal."""

import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from localr1.cli.models import model_to_run
from localr1.cli.output import Output
from localr1.settings import Settings

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
PROGRAM = "import sys; from localr1.cli.main import main; main(['chat', *sys.argv[1:]])"


class Chat:
    """`localr1 chat ARGUMENTS`, as far as its first prompt."""

    def __init__(self, home: Path, *arguments: str) -> None:
        import pexpect

        environment = {**os.environ, "LOCALR1_HOME": str(home), "TERM": "xterm-256color"}
        self.child: Any = pexpect.spawn(
            sys.executable,
            ["-c", PROGRAM, *arguments],
            env=environment,
            encoding="utf-8",
            timeout=120,
            dimensions=(40, 110),
        )
        self.child.expect(">>>")
        self.began = self.child.before

    def say(self, line: str, *expected: str) -> str:
        """Until the next prompt; returns what was shown."""
        self.child.send(line + "\r")
        for each in expected:
            self.child.expect(each)
        self.child.expect(">>>")
        return str(self.child.before)

    def leave(self, keys: str = "\x04") -> None:
        import pexpect

        self.child.send(keys)
        self.child.expect(pexpect.EOF)
        self.child.close()
        assert self.child.exitstatus == 0


@pytest.fixture(scope="module")
def model() -> str:
    output = Output(io.StringIO(), io.StringIO())
    return str(model_to_run("r1-nano", Settings.from_environment(), output))


def test_a_conversation_is_left_and_taken_up_again(model: str, tmp_path: Path) -> None:
    options = ["--temperature", "0", "--threads", "1"]
    chat = Chat(tmp_path, model, *options, "--think-budget", "15", "--stats")
    chat.say("What is 47 * 86?", "budget and was closed", "tok/s")
    chat.say("/set think on", "as long as it takes")
    chat.say("Was ist 36 plus 58?", "94", "cached", "tok/s")
    chat.say("/edit 2 What is 12 * 12?", "144", "tok/s")
    chat.say("/regen", "144", "tok/s")
    chat.say("/save numbers", "Saved as numbers")
    assert "numbers" in chat.say("/sessions", "TITLE")
    chat.leave("/exit\r")

    chat = Chat(tmp_path, "--continue", *options, "--stats")
    assert "Resumed 'numbers' (2 messages)" in chat.began
    assert "tokens taken up in" in chat.began
    chat.say("/edit", "goes on from before message 2", "12 \\* 12")
    chat.say("", "144", "tok/s")  # The message that came back to the prompt.
    chat.say("/resume numbers", "Resumed 'numbers'")
    chat.say("/sessions rm numbers", "Deleted")
    chat.say("/set nothink", "without thinking")
    chat.say("/set full drop-oldest", "are dropped")
    chat.say("/set format json", "Answers are JSON")
    chat.say("/set parameter max_tokens 60", "max_tokens")
    chat.say("What is 3 + 4?", r"\{")
    chat.leave()


def test_an_interrupt_while_it_thinks_brings_the_answer(model: str, tmp_path: Path) -> None:
    chat = Chat(tmp_path, model, "--threads", "1", "--no-session", "-o", "temperature=100")
    # At this temperature it never ends a thought by itself.
    chat.child.send("Think.\r")
    chat.child.expect("\n.*\n")
    chat.child.sendintr()
    chat.child.expect("closed|stopped")
    chat.child.sendintr()
    chat.child.expect(">>>")
    chat.leave()
    assert not (tmp_path / "state" / "sessions").exists()
