"""Which answers count, and what `localr1 eval arithmetic` makes of them."""

import json
from collections import Counter
from pathlib import Path
from typing import cast

import pytest
from fake_engine import FakeEngine
from typer.testing import CliRunner

from localr1 import load
from localr1.cli.main import app
from localr1.engine.engine import Engine
from localr1.engine.events import Delta, Reason
from localr1.quant import arithmetic
from localr1.quant.arithmetic import Problem, means

THOUGHT = Delta("thinking", "hm \\boxed{1}")


def answering(*answers: str, reason: Reason = "stop") -> FakeEngine:
    return FakeEngine([[THOUGHT, Delta("answer", answer)] for answer in answers], reason)


def attempt(engine: FakeEngine, answer: str = "4042", instruction: str = "") -> arithmetic.Attempt:
    problem = Problem("product", "What is 47 * 86?", answer)
    return arithmetic.attempt(cast(Engine, engine), problem, instruction=instruction)


def test_the_list_is_875_different_questions_of_seven_kinds() -> None:
    problems = arithmetic.read_problems()
    counts = Counter(problem.kind for problem in problems)
    assert counts == dict.fromkeys(counts, 125)
    assert len(counts) == 7
    assert len({problem.question for problem in problems}) == 875
    assert all(means(problem.answer, problem.answer) for problem in problems)


def test_a_few_of_each_kind_are_the_first_of_each() -> None:
    few = arithmetic.read_problems(per_kind=2)
    assert [problem.kind for problem in few[:4]] == ["addition"] * 2 + ["subtraction"] * 2
    assert len(few) == 14
    assert set(few) <= set(arithmetic.read_problems())


@pytest.mark.parametrize(
    ("boxed", "answer"),
    [
        ("4042", "4042"),
        (" 4042 ", "4042"),
        ("4,042", "4042"),
        ("4\\,042", "4042"),
        ("4042.", "4042"),
        ("$-17$", "-17"),
        ("9.9", "9.9"),
        ("9,9", "9.9"),
        ("9.9", "9,9"),
        ("\\text{equal}", "equal"),
        ("Equal", "equal"),
    ],
)
def test_an_answer_may_be_written_in_any_usual_way(boxed: str, answer: str) -> None:
    assert means(boxed, answer)


@pytest.mark.parametrize(
    ("boxed", "answer"),
    [("4043", "4042"), ("404", "4042"), ("9.90", "9.9"), ("9.11", "9.9"), ("", "0"), ("17", "-17")],
)
def test_another_answer_is_wrong(boxed: str, answer: str) -> None:
    assert not means(boxed, answer)


def test_the_last_box_of_the_answer_counts_and_boxes_of_the_thinking_do_not() -> None:
    assert attempt(answering("\\boxed{1}, no: \\boxed{4042}")).is_right
    assert not attempt(answering("\\boxed{4042}, no: \\boxed{1}")).is_right
    unboxed = attempt(answering("It is 1."), answer="1")
    assert (unboxed.boxed, unboxed.is_right) == (None, False)


def test_each_question_is_asked_alone_greedily_with_the_instruction_below_it() -> None:
    engine = answering("\\boxed{4042}")
    attempt(engine, instruction="Box it.")
    attempt(engine)
    assert [messages[0]["content"] for messages in engine.prompts] == [
        "What is 47 * 86?\nBox it.",
        "What is 47 * 86?",
    ]
    assert all(len(messages) == 1 for messages in engine.prompts)
    assert {params.sampling.temperature for params in engine.params} == {0.0}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """What every path loads."""
    engine = answering("\\boxed{54}", "no idea")
    monkeypatch.setattr(load, "load_engine", lambda *_, **__: engine)
    return engine


def run(tmp_path: Path, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["eval", "arithmetic", str(tmp_path), *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_counts_by_kind(model: FakeEngine, tmp_path: Path) -> None:
    assert arithmetic.read_problems(1)[0].answer == "54"
    report = json.loads(run(tmp_path, "--per-kind", "1", "--json"))
    assert report["kinds"]["addition"] == {"right": 1, "total": 1}
    assert report["kinds"]["product"] == {"right": 0, "total": 1}
    assert (report["right"], report["total"]) == (1, 7)
    assert report["accuracy"] == pytest.approx(1 / 7)
    assert report["standard_error"] == pytest.approx((1 / 7 * 6 / 7 / 7) ** 0.5)
    assert [wrong["found"] for wrong in report["wrong"]] == [None] * 6
    assert model.closed


def test_the_table_shows_shares_errors_and_wrong_answers(model: FakeEngine, tmp_path: Path) -> None:
    shown = run(tmp_path, "--per-kind", "1", "--show-wrong")
    assert "all 1 of 7 14.3 % ± 13.2" in " ".join(shown.split())
    assert "What is 47 * 86?  expected 4042, found nothing in a box" in shown


def test_replies_that_were_cut_off_are_told(model: FakeEngine, tmp_path: Path) -> None:
    model.reason = "length"
    assert "7 replies were cut off at 1024 tokens" in run(tmp_path, "--per-kind", "1")


def test_a_model_that_never_boxes_gets_a_hint(model: FakeEngine, tmp_path: Path) -> None:
    model.replies = [[Delta("answer", "54")]]
    assert "No answer stood in a box" in run(tmp_path, "--per-kind", "1")
