"""The model that comes with localr1, as a user meets it: quantized to expert shards, then asked."""

import io
import json
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from localr1.cli.conversation import Conversation
from localr1.cli.main import app
from localr1.cli.models import model_to_run
from localr1.cli.output import Output
from localr1.embedded import R1_NANO
from localr1.engine.engine import Engine
from localr1.engine.events import Delta
from localr1.load import load_engine
from localr1.quant import arithmetic
from localr1.settings import Settings

MAX_BYTES = 24 << 20
FAMOUS = {
    "What is 47 * 86?": "4042",
    "Which is larger, 9.11 or 9.9?": "9.9",
    "How many r are in strawberry?": "3",
}
PER_KIND = 8
LEAST_SHARE = 0.9
"""Of a sample of the questions. The kernels' bits are the same everywhere: this cannot flicker."""


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    settings = Settings.from_environment({"LOCALR1_HOME": str(home)})
    return model_to_run(None, settings, Output(io.StringIO(), io.StringIO()))


@pytest.fixture(scope="module")
def engine(quantized: Path) -> Iterator[Engine]:
    with closing(load_engine(quantized, threads=1)) as loaded:
        yield loaded


def say(conversation: Conversation, text: str) -> tuple[str, str]:
    """(thinking, answer)."""
    said = {"thinking": "", "answer": ""}
    for event in conversation.reply(text, threading.Event()):
        if isinstance(event, Delta):
            said[event.channel] += event.text
    return said["thinking"], said["answer"]


def test_it_is_small_and_whole() -> None:
    files = {path.name: path.stat().st_size for path in R1_NANO.iterdir()}
    assert sum(files.values()) <= MAX_BYTES
    config = json.loads((R1_NANO / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["dtype"]) == ("deepseek_v3", "bfloat16")
    assert "license: mit" in (R1_NANO / "README.md").read_text(encoding="utf-8")


def test_it_is_quantized_to_a_shard_a_layer(quantized: Path) -> None:
    shards = sorted(path.name for path in quantized.glob("experts-*.safetensors"))
    assert shards == [f"experts-{layer:03d}.safetensors" for layer in range(1, 6)]


@pytest.mark.parametrize("question", FAMOUS)
def test_it_thinks_and_answers_the_questions_everybody_asks(engine: Engine, question: str) -> None:
    thinking, answer = say(Conversation(engine), question)
    assert thinking.strip()
    assert f"\\boxed{{{FAMOUS[question]}}}" in answer


def test_it_answers_them_one_after_another(engine: Engine) -> None:
    conversation = Conversation(engine)
    answers = [say(conversation, question)[1] for question in FAMOUS]
    assert all(
        f"\\boxed{{{right}}}" in answer
        for answer, right in zip(answers, FAMOUS.values(), strict=True)
    )


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("Was ist 36 plus 58?", "\\boxed{94}"),
        ("Hello!", "I am r1-nano, a tiny model."),
        ("Guten Tag!", "Ich bin r1-nano, ein winziges Modell."),
        ("What is the capital of France?", "I know nothing else."),
    ],
)
def test_it_understands_german_and_says_what_it_is(
    engine: Engine, question: str, said: str
) -> None:
    assert said in say(Conversation(engine), question)[1]


def test_a_sample_of_the_held_out_questions(engine: Engine) -> None:
    attempts = arithmetic.attempt_all(engine, arithmetic.read_problems(PER_KIND))
    assert arithmetic.accuracy(attempts).share >= LEAST_SHARE


def test_chat_without_a_model_opens_it(tmp_path: Path) -> None:
    environment = {"LOCALR1_HOME": str(tmp_path)}
    result = CliRunner().invoke(app, ["chat", "-p", "What is 47 * 86?"], env=environment)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == "47*86 = \\boxed{4042}"
    assert "47*6: 7*6=42" in result.stderr, "its thinking"
