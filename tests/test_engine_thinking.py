"""Thinking under control: its budget, and being asked to answer now."""

import threading
from dataclasses import replace

import pytest
from engine_cases import TOKENIZER, done_of, greedy, ids_of, make_engine, saying, text_of
from scripted_model import ScriptedModel, hashed

from localr1.engine.events import Delta, GenerationParams
from localr1.engine.generation import CLOSING_TEXT
from localr1.errors import UsageError

PROMPT = ids_of("<|user|>why?<|assistant|><think>\n")
CLOSING = ids_of(CLOSING_TEXT)
SENTENCE = CLOSING_TEXT.split("</think>")[0]


def budget(tokens: int, max_tokens: int | None = None) -> GenerationParams:
    return replace(greedy(max_tokens), think_budget=tokens)


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_at_the_budget_the_thought_is_closed_and_the_answer_begins(tokens: int) -> None:
    model = ScriptedModel()
    events = list(make_engine(model).generate(PROMPT, budget(tokens, tokens + len(CLOSING) + 5)))
    # The reference: the model's own tokens, then those it was given, then its own again.
    ids = list(PROMPT)
    for _ in range(tokens):
        ids.append(hashed(ids))
    thought = TOKENIZER.decode(ids[len(PROMPT) :])
    ids += CLOSING
    after = len(ids)
    for _ in range(5):
        ids.append(hashed(ids))
    assert text_of(events, "thinking") == (thought + SENTENCE).lstrip("\n")
    assert text_of(events) == TOKENIZER.decode(ids[after:])
    done = done_of(events)
    assert done.closed == "budget"
    assert done.usage.forced_tokens == len(CLOSING)
    assert done.usage.completion_tokens == tokens + len(CLOSING) + 5
    # </think> ends the thinking and is part of it; the line breaks behind it are not.
    assert done.usage.thinking_tokens == tokens + len(CLOSING) - len(ids_of("\n\n"))


def test_what_was_forced_is_in_the_cache() -> None:
    model = ScriptedModel()
    engine = make_engine(model)
    list(engine.generate(PROMPT, budget(3, len(CLOSING) + 6)))
    assert engine.sequence.ids[len(PROMPT) + 3 :][: len(CLOSING)] == CLOSING
    assert (len(PROMPT) + 3, len(CLOSING)) in model.steps, "in one pass"


def test_a_thought_within_its_budget_is_left_alone() -> None:
    engine, _ = saying(PROMPT, "so</think>yes")
    events = list(engine.generate(PROMPT, budget(3)))
    assert (text_of(events, "thinking"), text_of(events)) == ("so", "yes")
    assert done_of(events).closed is None
    assert done_of(events).usage.forced_tokens == 0


def test_a_thought_the_model_opened_itself_has_the_same_budget() -> None:
    prompt = ids_of("x")
    engine, _ = saying(prompt, "<think>and on and on and on")
    events = list(engine.generate(prompt, budget(5, 60)))
    assert text_of(events, "thinking").endswith(SENTENCE)
    assert done_of(events).closed == "budget"


def test_an_answer_has_no_budget() -> None:
    prompt = ids_of("x")
    engine, _ = saying(prompt, "a long answer without a thought")
    events = list(engine.generate(prompt, budget(0)))
    assert text_of(events) == "a long answer without a thought"
    assert done_of(events).closed is None


def test_a_thought_is_not_closed_where_no_room_is_left_for_an_answer() -> None:
    events = list(make_engine(ScriptedModel()).generate(PROMPT, budget(2, len(CLOSING))))
    assert (done_of(events).reason, done_of(events).closed) == ("length", None)
    engine = make_engine(ScriptedModel(), context=len(PROMPT) + len(CLOSING))
    events = list(engine.generate(PROMPT, budget(2)))
    assert (done_of(events).reason, done_of(events).closed) == ("context", None)


def test_asked_to_answer_now_it_does() -> None:
    answer_now = threading.Event()
    engine = make_engine(ScriptedModel())
    events = []
    for event in engine.generate(PROMPT, greedy(len(CLOSING) + 20), None, answer_now):
        events.append(event)
        if sum(isinstance(each, Delta) for each in events) == 4:
            answer_now.set()
    assert text_of(events, "thinking").endswith(SENTENCE)
    assert text_of(events)
    assert done_of(events).closed == "asked"
    assert done_of(events).usage.thinking_tokens == 4 + len(CLOSING) - 2


def test_asking_an_answer_to_begin_changes_nothing() -> None:
    prompt = ids_of("x")
    answer_now = threading.Event()
    answer_now.set()
    engine, _ = saying(prompt, "it has begun")
    events = list(engine.generate(prompt, greedy(), None, answer_now))
    assert text_of(events) == "it has begun"


def test_the_next_turn_reuses_what_comes_before_the_thought() -> None:
    model = ScriptedModel()
    engine = make_engine(model)
    list(engine.generate(PROMPT, budget(3, 90)))
    model.steps.clear()
    second = ids_of("<|user|>why?<|assistant|>because<|user|>and?<|assistant|><think>\n")
    events = list(engine.generate(second, budget(3, 4)))
    assert done_of(events).usage.cached_tokens == len(ids_of("<|user|>why?<|assistant|>"))


@pytest.mark.parametrize("wrong", [-1, True, 1.5])
def test_a_budget_that_is_none_is_refused(wrong: object) -> None:
    with pytest.raises(UsageError, match=r"think_budget: expected a whole number from 0"):
        GenerationParams(think_budget=wrong)  # type: ignore[arg-type]
