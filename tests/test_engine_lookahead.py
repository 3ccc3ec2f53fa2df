"""Tokens computed along on the chance that they come next: the same tokens, in fewer passes."""

import io
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_cases import done_of, greedy, ids_of, make_engine, text_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_model import ScriptedModel
from torch import Tensor

from localr1.cache.sequence import Cache
from localr1.cli.models import model_to_run
from localr1.cli.output import Output
from localr1.embedded import R1_NANO
from localr1.engine.draft_length import EXPLORE, DraftLength
from localr1.engine.engine import Engine
from localr1.engine.events import Event, GenerationParams
from localr1.engine.ngrams import NgramIndex
from localr1.errors import MemoryLimitError
from localr1.load import load_engine
from localr1.models.step import Step
from localr1.sampler import SamplingParams
from localr1.settings import Settings

# What is drafted.


def test_a_run_that_came_before_is_continued_as_it_was() -> None:
    index = NgramIndex()
    index.extend([1, 2, 3, 4, 5, 9, 1, 2])
    assert index.propose(3) == (2, [3, 4, 5])
    assert index.propose(1) == (2, [3])
    index.extend([7])
    assert index.propose(3) == (0, []), "2, 7 is new"
    index.extend([1, 2])
    assert index.propose(2) == (2, [7, 1]), "the last time counts"
    assert NgramIndex().propose(4) == (0, [])


def test_the_longest_run_is_the_one_that_counts() -> None:
    index = NgramIndex()
    index.extend([6, 1, 2, 3, 10, 8, 2, 3, 20, 6, 1, 2, 3])
    assert index.propose(1) == (4, [10]), "6, 1, 2, 3 came once, and 2, 3 later"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 7))
def test_what_is_proposed_followed_the_same_run(ids: list[int], count: int) -> None:
    index = NgramIndex()
    index.extend(ids)
    run, found = index.propose(count)
    assert len(found) <= count
    assert bool(run) == bool(found)
    if found:
        ends = [end for end in range(run, len(ids)) if ids[end:][: len(found)] == found]
        assert ids[-run:] in [ids[end - run : end] for end in ends]


# How much is drafted.


RUN = 3


def learn(acceptance: float, costs: dict[int, float], choices: int = 2000) -> DraftLength:
    """Fed with passes that cost so much."""
    chance = torch.Generator().manual_seed(1)
    length = DraftLength()
    for _ in range(choices):
        chosen = length.choose(RUN)
        length.measured(chosen, costs[chosen])
        for _ in range(chosen):
            right = bool(torch.rand(1, generator=chance).item() < acceptance)
            length.judged(RUN, right)
            if not right:
                break
    return length


@pytest.mark.parametrize(
    ("acceptance", "costs", "best"),
    [
        (0.95, {0: 1.0, 1: 1.0, 3: 1.1, 7: 1.2}, 7),  # Weights come from memory.
        (0.95, {0: 1.0, 1: 1.5, 3: 3.4, 7: 7.8}, 1),
        (0.7, {0: 1.0, 1: 2.0, 3: 4.0, 7: 8.0}, 0),  # Arithmetic takes the time.
        (0.05, {0: 1.0, 1: 1.1, 3: 1.3, 7: 1.7}, 0),  # Nothing comes again.
    ],
)
def test_what_pays_is_what_is_drafted(
    acceptance: float, costs: dict[int, float], best: int
) -> None:
    length = learn(acceptance, costs)
    assert length.best(RUN) == best
    chosen = []
    for _ in range(EXPLORE * 4):
        chosen.append(length.choose(RUN))
        length.measured(chosen[-1], costs[chosen[-1]])
    assert chosen.count(best) == len(chosen) - 4
    assert len(set(chosen)) > 1, "others are tried now and then"


def test_what_cannot_pay_is_not_even_tried() -> None:
    """Each drafted token costs as much as one by itself, and most are wrong."""
    length = DraftLength()
    for _ in range(200):
        chosen = length.choose(RUN)
        assert chosen <= 1
        length.measured(chosen, 1.0 + chosen)
        if chosen:
            length.judged(RUN, False)
    assert length.best(RUN) == 0


def test_a_longer_run_is_believed_more() -> None:
    length = learn(0.2, {0: 1.0, 1: 1.3, 3: 1.5, 7: 2.0})
    for _ in range(50):
        length.judged(RUN + 1, True)
    assert length.best(RUN) == 0
    assert length.best(RUN + 1) == 7 or length.choose(RUN + 1) > 0


def test_a_pass_that_something_delayed_counts_little() -> None:
    length = learn(0.95, {0: 1.0, 1: 1.0, 3: 1.1, 7: 1.2})
    length.measured(7, 100.0)
    assert length.best(RUN) == 7
    length.measured(5, 1e-9)  # Less was found than was asked for: no length that is tried.
    assert length.best(RUN) == 7


# The same tokens.


def ahead(params: GenerationParams) -> GenerationParams:
    return replace(params, looks_ahead=True)


class Echo(ScriptedModel):
    """Says the prompt's beginning again and again, now and then something else."""

    def forward(self, step: Step, cache: Cache[Any]) -> Tensor:
        logits = super().forward(step, cache)
        return logits * 0.1


def echo(ids: list[int]) -> int:
    return 40 + len(ids) % 50 if len(ids) % 23 == 0 else 40 + len(ids) % 7


class Always(DraftLength):
    """Whatever was measured: times of these models are of no meaning."""

    def choose(self, run: int) -> int:
        return 3


def always_drafting(model: ScriptedModel, context: int) -> Engine:
    engine = make_engine(model, context=context)
    engine._draft_length = Always()
    return engine


def run(engine: Engine, prompt: list[int], params: GenerationParams) -> list[Event]:
    return list(engine.generate(prompt, params))


@pytest.mark.parametrize("temperature", [0.0, 0.8, 3.0])
@pytest.mark.parametrize("budget", [None, 20])
def test_tokens_are_those_of_a_run_without(temperature: float, budget: int | None) -> None:
    prompt = ids_of("<|user|>abcabcabcabc<|assistant|>" + ("<think>\n" if budget else ""))
    params = GenerationParams(
        SamplingParams(temperature, seed=3, repetition_penalty=1.02), 150, think_budget=budget
    )
    plain, looking = (always_drafting(Echo(echo), 400) for _ in range(2))
    expected, found = run(plain, prompt, params), run(looking, prompt, ahead(params))
    for channel in ("thinking", "answer"):
        assert text_of(found, channel) == text_of(expected, channel)
    usage = done_of(found).usage
    if temperature < 1.0:
        assert usage.accepted_tokens > (50 if temperature == 0.0 else 0)
    assert usage.drafted_tokens >= usage.accepted_tokens
    assert done_of(expected).usage.drafted_tokens == 0
    assert usage.completion_tokens == done_of(expected).usage.completion_tokens
    model = looking.sequence.model
    assert isinstance(model, ScriptedModel)
    if temperature == 0.0 and budget is None:
        assert len(model.steps) < 150 - 50
    # And so does the next turn, from a cache with a draft behind its end.
    more = [*prompt, *ids_of("more")]
    assert text_of(run(looking, more, ahead(params))) == text_of(run(plain, more, params))


def test_the_context_has_room_for_every_draft() -> None:
    prompt = ids_of("abababab")
    for context in range(len(prompt) + 1, len(prompt) + 40):
        engine = always_drafting(Echo(echo), context)
        events = run(engine, prompt, ahead(greedy()))
        assert done_of(events).reason == "context"
        expected = run(make_engine(Echo(echo), context=context), prompt, greedy())
        assert text_of(events) == text_of(expected)


@pytest.mark.parametrize("passes", range(3, 20, 2))
def test_a_pass_that_fails_leaves_the_engine_usable(passes: int) -> None:
    prompt = ids_of("abababab")
    model = Echo(echo)
    engine = always_drafting(model, 300)
    model.fail_at, model.failure = passes, MemoryLimitError("memory")
    with pytest.raises(MemoryLimitError):
        run(engine, prompt, ahead(greedy(200)))
    expected = text_of(run(make_engine(Echo(echo), context=300), prompt, greedy(60)))
    assert text_of(run(engine, prompt, ahead(greedy(60)))) == expected


# Of real models, to the last bit.


@pytest.fixture(scope="module")
def nano() -> Iterator[Engine]:
    settings = Settings.from_environment()
    path = model_to_run("r1-nano", settings, Output(io.StringIO(), io.StringIO()))
    with closing(load_engine(path, threads=1)) as engine:
        yield engine


def test_a_pass_over_several_tokens_gives_the_bits_of_passes_over_one(nano: Engine) -> None:
    model = nano.model
    assert nano.looks_ahead
    assert model.same_bits(8)
    ids = torch.tensor(nano.tokenizer.encode("47*6: 7*6=42, 4*6=24; 47*80: 7*8=56, 4*8=32. " * 3))
    whole = model.new_cache(len(ids))
    rows = [model.forward(Step(ids[i : i + 1], i), whole) for i in range(len(ids))]
    expected = torch.cat(rows)
    for size in (2, 4, 8):
        cache = model.new_cache(len(ids))
        found = torch.cat(
            [
                model.forward(Step(ids[i : i + size], i, all_logits=True), cache)
                for i in range(0, len(ids), size)
            ]
        )
        assert torch.equal(found, expected), size


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_embedded_model_says_the_same(nano: Engine, temperature: float) -> None:
    prompt = nano.prompt([{"role": "user", "content": "What is 47 * 86?"}])
    params = GenerationParams(SamplingParams(temperature, seed=11), 300)
    expected = run(nano, prompt.ids, params)
    nano.reset()
    found = run(nano, prompt.ids, ahead(params))
    assert done_of(found).usage.drafted_tokens > 0
    for channel in ("thinking", "answer"):
        assert text_of(found, channel) == text_of(expected, channel)
    assert found[-1].usage.completion_tokens == expected[-1].usage.completion_tokens  # type: ignore[union-attr]


def test_where_bits_would_differ_nothing_is_drafted() -> None:
    """Unquantized weights are torch's work, whose products depend on their sizes."""
    with closing(load_engine(R1_NANO, threads=1)) as engine:
        assert not engine.looks_ahead
        prompt = engine.prompt([{"role": "user", "content": "What is 47 * 86?"}])
        events = run(engine, prompt.ids, ahead(greedy(60)))
        assert done_of(events).usage.drafted_tokens == 0
