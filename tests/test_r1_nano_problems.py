"""r1-nano's problems, scratchpads and reward, without a trained model."""

import random
import re
import sys
from pathlib import Path
from statistics import pstdev

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "r1_nano"))

from batches import IGNORED, make_rows
from evaluate import FAMOUS, PER_KIND, development_list, paired_difference, read_list
from problems import KINDS, Problem, draw, is_held_out
from reward import judge
from smalltalk import ABILITIES
from solutions import Expression, add, compare, count_letter, multiply, subtract, work
from tokenizer import ASSISTANT, EOS, USER, encode, prompt_text, reply_text, train_tokenizer
from train import AT_ONCE, AT_ONCE_FROM, CONVERSATIONS_FROM, draw_batch, guessed

DRAWS = 300


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held_out", [False, True])
def test_worked_solutions_earn_the_full_reward(kind: str, held_out: bool) -> None:
    rng = random.Random(kind)
    for _ in range(DRAWS):
        problem = draw(rng, kind, held_out=held_out)
        assert judge(problem, reply_text(problem)).right, problem


def test_scratchpads() -> None:
    assert add(47, 986).lines == ("47+986: 7+6+0=13 4+8+1=13 0+9+1=10 =1033",)
    assert subtract(503, 78).lines == ("503-78: 13-8-0=5 10-7-1=2 5-0-1=4 =425",)
    assert subtract(5, 12).lines == ("12-5: 12-5-0=7 1-0-1=0 =7", "-7")
    assert multiply(47, 86).lines == (
        "47*6: 7*6=42 4*6=24+4=28 =282",
        "47*8: 7*8=56 4*8=32+5=37 =376",
        "282+3760: 2+0+0=2 8+6+0=14 2+7+1=10 0+3+1=4 =4042",
    )
    assert compare("9.11", "9.9") == ("<", "9.11 9.90: 9=9 1<9")
    assert compare("10,5", "9,75") == (">", "10,50 09,75: 1>0")
    assert compare("2.5", "2.50")[0] == "="
    assert count_letter("Berry", "r") == (2, "b r0 e r0 r r1 r r2 y r2")
    assert count_letter("Berry", "r", compared=False) == (2, "b e r1 r2 y")


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_at_once_has_the_form_and_no_work(kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(DRAWS):
        problem = draw(rng, kind)
        short = problem.at_once()
        assert judge(problem, reply_text(short)).right, "its form is as good"
        assert (short.prompt, short.answer, short.reply) == (
            problem.prompt,
            problem.answer,
            problem.reply,
        )
        assert problem.is_worked == (kind != "chat") == (short != problem)
        assert not short.is_worked


def test_the_second_warm_up_answers_at_once_more_often_than_not() -> None:
    def share_at_once(step: int) -> float:
        boxed = [problem for problem in draw_batch(0, step, 600)[0] if problem.boxed]
        return sum(not problem.is_worked for problem in boxed) / len(boxed)

    assert share_at_once(AT_ONCE_FROM - 1) == 0
    assert share_at_once(AT_ONCE_FROM) == pytest.approx(AT_ONCE / (1 + AT_ONCE), abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_guessed_is_not_learned(kind: str) -> None:
    tokenizer = train_tokenizer(per_kind=20)
    rng = random.Random(kind)
    for _ in range(30):
        problem = draw(rng, kind)
        assert not guessed(tokenizer, problem)
        short = problem.at_once()
        prompt, reply = encode(tokenizer, [prompt_text(short.prompt), reply_text(short)])
        places = guessed(tokenizer, short)
        if not short.boxed:
            assert not places
            continue
        assert tokenizer.decode(reply[places.start : places.stop]) == short.answer
        (rows,) = make_rows([prompt], [reply], 1, torch.device("cpu"), [places])
        learned = rows.targets[rows.targets != IGNORED].tolist()
        assert learned == reply[: places.start] + reply[places.stop :]


@pytest.mark.parametrize("kind", ["addition", "subtraction", "product", "expression"])
def test_every_column_of_a_scratchpad_holds(kind: str) -> None:
    rng = random.Random(1)
    for _ in range(DRAWS):
        for line in draw(rng, kind).thought.splitlines():
            for step in re.findall(r"[\d+*-]+(?:=[\d+]+)+", line):
                *sides, result = step.split("=")
                assert _value(sides[-1]) == int(result), line
                assert _value(sides[0]) == _value(sides[-1].split("+")[0]) or len(sides) == 1, line


def _value(text: str) -> int:
    """The value of one operation, or of a sum or difference of three numbers."""
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    if "*" in text:
        return numbers[0] * numbers[1]
    return numbers[0] + (-1 if "-" in text else 1) * sum(numbers[1:])


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        (Expression(Expression(3, "+", 4), "*", 5), "(3+4)*5"),
        (Expression(5, "*", Expression(9, "-", 4)), "5*(9-4)"),
        (Expression(Expression(3, "*", 4), "-", 5), "3*4-5"),
        (Expression(30, "-", Expression(9, "-", 4)), "30-(9-4)"),
        (Expression(Expression(9, "-", 4), "-", 3), "9-4-3"),
        (Expression(2, "+", Expression(3, "*", 4)), "2+3*4"),
    ],
)
def test_brackets_stand_where_they_are_needed(expression: Expression, text: str) -> None:
    assert expression.text() == text
    assert work(expression).value == eval(text)


def test_the_famous_questions_are_never_trained_on() -> None:
    prompts = {problem.prompt: problem for problem in read_list()}
    assert all(prompts[prompt].answer == answer for _, prompt, answer in FAMOUS)
    assert is_held_out("pair 47 86")
    assert is_held_out("decimals 9.11 9.9")
    assert is_held_out("word strawberry")


def test_training_meets_no_question_of_the_list() -> None:
    listed = read_list()
    assert len(listed) == PER_KIND * len(KINDS) == 1000
    prompts = {problem.prompt for problem in listed}
    assert len(prompts) == len(listed)
    first = CONVERSATIONS_FROM - 30
    steps = [draw_batch(0, step, 48) for step in range(first, first + 100)]
    assert not any(problem.held_out for problems, _ in steps for problem in problems)
    questions = [
        turn.split(ASSISTANT)[0]
        for _, texts in steps
        for text in texts
        for turn in text.split(USER)[1:]
    ]
    assert len(questions) > 100 * 48, "some stand in a conversation"
    assert prompts.isdisjoint(questions)


def test_the_development_list_is_of_the_training_side() -> None:
    listed = development_list()
    assert listed == development_list()
    assert {problem.kind for problem in listed} == set(KINDS)
    assert not any(problem.held_out for problem in listed)
    assert {problem.prompt for problem in read_list()}.isdisjoint(each.prompt for each in listed)


def test_paired_difference() -> None:
    difference, error, probability = paired_difference(8, 2, 100)
    assert difference == pytest.approx(0.06)
    # One, minus one or nothing for each question: the mean's standard error.
    outcomes = [1] * 8 + [-1] * 2 + [0] * 90
    assert error == pytest.approx(pstdev(outcomes) / 10)
    # Two of ten tosses or fewer, on either side.
    assert probability == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert paired_difference(3, 3, 10)[2] == 1


def test_a_step_draws_the_same_problems_again() -> None:
    assert draw_batch(3, 17, 20) == draw_batch(3, 17, 20)
    assert draw_batch(3, 17, 20) != draw_batch(3, 18, 20)


def test_judge_asks_for_the_form_and_the_answer() -> None:
    problem = draw(random.Random(2), "product")
    good = reply_text(problem)
    assert judge(problem, good).reward == pytest.approx(1.2)
    wrong = good.replace(f"{{{problem.answer}}}", "{7}")
    assert (judge(problem, wrong).well_formed, judge(problem, wrong).right) == (True, False)
    for broken in (
        good.removesuffix(EOS),
        good.replace("</think>", ""),
        good.replace("</think>", "</think></think>"),
        good.replace(EOS, f" \\boxed{{{problem.answer}}}{EOS}"),
        f"\n</think>\n\n\\boxed{{{problem.answer}}}{EOS}",
        good + "1",
    ):
        assert judge(problem, broken).reward == 0


def test_a_sentence_must_be_honest_and_in_the_language_of_the_question() -> None:
    english, german = (ABILITIES[language] for language in ("en", "de"))
    problem = Problem(
        "chat", "Hello", "a greeting", f"Hello! {english}", f"Hello! {english}", False, True
    )

    def is_right(answer: str) -> bool:
        return judge(problem, f"hm\n</think>\n\n{answer}{EOS}").right

    assert all(is_right(opening + english) for opening in ("Hello! ", "", "I cannot do that. "))
    for wrong in (f"Hallo! {german}", "Hello!", f"{english} I can fly.", english[:-3]):
        assert not is_right(wrong), wrong


def test_digits_and_signs_are_tokens_of_their_own() -> None:
    tokenizer = train_tokenizer(per_kind=100)
    (ids,) = encode(tokenizer, ["282+3760: 2+0+0=2"])
    pieces = [tokenizer.decode([i], skip_special_tokens=False) for i in ids]
    assert pieces == ["2", "8", "2", "+", *"3760", ":", " ", *"2+0+0=2"]
    text = prompt_text("Was ist größer, 9,11 oder 9,9? 🙂")
    assert tokenizer.decode(encode(tokenizer, [text])[0], skip_special_tokens=False) == text
