"""`localr1 chat` between other programs: what each stream gets, and the exit codes."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_engine import FakeEngine, answer, conversation
from terminal_programs import fake_chat

from localr1.cli import chat
from localr1.cli.main import main
from localr1.errors import ContextError, KernelError, LocalR1Error, MemoryLimitError

PROGRAM = """
engine = FakeEngine([thinking("hm ", "so") + answer("# Head", "\\n\\n**b** \\x1b[2J")])
"""
ENDLESS = "engine = FakeEngine([endless_answer()], pause=0.01)"


def run(
    command: list[str], stdin: bytes = b"", **environment: str
) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONUTF8": "1", **environment},
    )


def test_the_answer_is_alone_on_stdout_and_is_not_rendered() -> None:
    result = run(fake_chat(PROGRAM, "-p", "hi"))
    assert result.returncode == 0
    assert result.stdout.decode().splitlines() == ["# Head", "", r"**b** \x1b[2J"]
    assert result.stderr.decode().splitlines() == ["hm so", ""]


def test_bytes_that_are_no_text_are_replaced_and_told_of() -> None:
    result = run(fake_chat(PROGRAM, "-p", "hi", "--hide-thinking"), b"Gr\xfc\xdfe\n")
    assert result.returncode == 0
    assert result.stderr.decode().splitlines() == [
        "stdin is no UTF-8 throughout: 2 characters replaced."
    ]


def test_json_has_what_a_program_wants() -> None:
    result = run(fake_chat(PROGRAM, "-p", "hi", "--json"))
    document = json.loads(result.stdout)
    assert result.stderr == b""
    assert document["answer"] == "# Head\n\n**b** \x1b[2J"
    assert document["usage"] == {
        "prompt_tokens": 3,
        "cached_tokens": 0,
        "completion_tokens": 4,
        "thinking_tokens": 2,
        "drafted_tokens": 0,
        "accepted_tokens": 0,
    }
    timings = document["timings"]
    assert timings.pop("thinking_s") >= 0
    assert timings == {
        "time_to_first_token_s": 0.25,
        "decode_s": 2.0,
        "prompt_tokens_per_second": 12.0,
        "tokens_per_second": 1.5,
    }
    assert document["peak_memory_bytes"] > 1 << 20


Called = Callable[..., int]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Called:
    """Runs a command line in this process, as main() does; returns the exit code."""

    def call(engine: FakeEngine, *arguments: str) -> int:
        monkeypatch.setattr(chat, "load_conversation", lambda *_, **__: conversation(engine))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        with pytest.raises(SystemExit) as left:
            main(["chat", *arguments])
        return int(left.value.code or 0)

    return call


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([".", "-p", " "], 2, "the prompt is empty"),
        ([".", "--json"], 2, "the prompt is empty"),
        ([".", "-p", "x", "--think-view", "some"], 2, "--think-view"),
        ([".", "-p", "x", "-o", "top_k"], 2, "expected NAME=VALUE"),
        (["no-such-model", "-p", "x"], 4, "there is no such file or directory"),
    ],
)
def test_what_cannot_be_meant_or_found(
    arguments: list[str],
    status: int,
    message: str,
    called: Called,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert called(FakeEngine([answer("x")]), *arguments) == status
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("error", "status"), [(MemoryLimitError, 3), (ContextError, 1), (KernelError, 1)]
)
def test_an_error_of_the_model_is_one_sentence(
    error: type[LocalR1Error], status: int, called: Called, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine([answer("x")], error=error("it broke", fix="Do this."))
    assert called(engine, ".", "-p", "hi") == status
    assert capsys.readouterr().err == "error: it broke. Do this.\n"
    assert engine.closed


def test_a_reader_that_goes_away_is_no_error_of_ours() -> None:
    child = subprocess.Popen(
        fake_chat(ENDLESS, "-p", "hi"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stderr is not None
    assert child.stdout.read(5) == b"word0"
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait(timeout=60) == 1
    child.stderr.close()


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_an_interrupt_keeps_what_came_and_is_130(tmp_path: Path) -> None:
    with (tmp_path / "answer").open("wb") as stdout:
        child = subprocess.Popen(
            fake_chat(ENDLESS, "-p", "hi"), stdout=stdout, stderr=subprocess.PIPE
        )
        end = time.monotonic() + 60
        while (tmp_path / "answer").stat().st_size < 20:
            assert time.monotonic() < end
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=60) == 130
    assert child.stderr is not None
    assert child.stderr.read().decode() == "(stopped)\n"
    child.stderr.close()
    text = (tmp_path / "answer").read_text()
    assert text.startswith("word0 word1")
    assert text.endswith("\n")
