"""The whole path on a real model: GGUF from a package, quantized here, chatting through the CLI."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from localr1.cli.conversation import Conversation
from localr1.engine.events import Delta, Done
from localr1.load import load_engine
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe

pytestmark = pytest.mark.smollm2


@pytest.fixture(scope="module")
def int8(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "smollm2-int8"
    quantize(smollm2_gguf, out, Recipe.uniform(8, 32))
    return out


@pytest.fixture
def conversation(int8: Path) -> Iterator[Conversation]:
    engine = load_engine(int8, context=1024)
    with closing(engine):
        yield Conversation(engine, {"temperature": 0.0, "max_tokens": 60})


def say(conversation: Conversation, text: str) -> tuple[str, Done]:
    events = list(conversation.reply(text, threading.Event()))
    done = events[-1]
    assert isinstance(done, Done)
    return "".join(event.text for event in events if isinstance(event, Delta)), done


def test_a_capital_and_what_follows_from_it(conversation: Conversation) -> None:
    answer, done = say(conversation, "What is the capital of Japan?")
    assert answer == "The capital of Japan is Tokyo."
    assert done.reason == "stop"
    answer, done = say(conversation, "What language do people speak there?")
    assert "Japanese" in answer  # "there" is Japan only for who remembers the first turn.
    assert done.usage.cached_tokens >= 40
    conversation.clear()
    answer, _ = say(conversation, "What language do people speak there?")
    assert "Japanese" not in answer


PIRATE = re.compile(r"pirate|captain|arr\b|seven seas|ahoy", re.IGNORECASE)
"""Which words it finds depends on the last bits of float attention, and so on the machine."""


def test_a_system_prompt_changes_who_answers(conversation: Conversation) -> None:
    plain, _ = say(conversation, "Who are you?")
    assert not PIRATE.search(plain)
    conversation.clear()
    conversation.system = "You are a pirate. Answer like a pirate."
    answer, _ = say(conversation, "Who are you?")
    assert PIRATE.search(answer)


def test_one_prompt_at_the_command_line(int8: Path) -> None:
    arguments = ["chat", str(int8), "-p", "What is the capital", "--temperature", "0"]
    command = [sys.executable, "-c", "from localr1.cli.main import main; main()", *arguments]
    run = subprocess.run(
        command, input="of Japan?", capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout == "The capital of Japan is Tokyo.\n"
    as_json = subprocess.run(
        [*command, "--json"],
        input="of Japan?",
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    document = json.loads(as_json.stdout)
    assert document["answer"] == "The capital of Japan is Tokyo."
