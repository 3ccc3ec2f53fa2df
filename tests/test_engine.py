"""The generation loop: what it says, what it computes again, what is left when it ends early."""

import threading
from collections.abc import Sequence

import pytest
import torch
from engine_cases import (
    END,
    TOKENIZER,
    done_of,
    greedy,
    ids_of,
    make_engine,
    reference_tokens,
    saying,
    text_of,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scripted_model import ScriptedModel, follow

from localr1.engine.engine import Engine
from localr1.engine.events import Delta, Event, GenerationParams, Progress
from localr1.engine.stop import StopMatcher
from localr1.engine.think import ThinkSplitter
from localr1.errors import ContextError, MemoryLimitError, NumericsError, TemplateError, UsageError
from localr1.sampler import SamplingParams

# What it says.


def test_a_reply_from_prompt_to_done() -> None:
    prompt = ids_of("<s><|user|>twenty tokens of text")
    engine, model = saying(prompt, "Héllo 👩!", chunk=10)
    events = list(engine.generate(prompt, greedy()))
    assert text_of(events) == "Héllo 👩!"
    progress = [(e.done, e.total) for e in events if isinstance(e, Progress)]
    total = len(prompt)
    assert progress == [(10, total), (20, total), (total, total)]
    assert model.steps[:3] == [(0, 10), (10, 10), (20, total - 20)]
    done = done_of(events)
    assert done.reason == "stop"
    assert done.usage.prompt_tokens == total
    assert done.usage.cached_tokens == done.usage.thinking_tokens == 0
    assert done.usage.completion_tokens == len(ids_of("Héllo 👩!")) + 1
    assert done.usage.prefill_seconds > 0
    assert done.usage.decode_seconds > 0


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_the_text_shown_is_the_text_of_all_tokens(reply: str) -> None:
    assume("<think>" not in reply)
    prompt = ids_of("ab")
    model = ScriptedModel(follow(2, [*TOKENIZER.encode(reply), END]))
    events = list(make_engine(model).generate(prompt, greedy()))
    assert text_of(events) == reply
    for event in events:
        assert not isinstance(event, Delta) or event.text


def test_max_tokens_and_context_end_a_reply() -> None:
    prompt = ids_of("abc")
    model = ScriptedModel()
    events = list(make_engine(model).generate(prompt, greedy(max_tokens=7)))
    assert done_of(events).reason == "length"
    assert text_of(events) == TOKENIZER.decode(reference_tokens(prompt, 7))
    events = list(make_engine(model, context=16).generate(prompt, greedy(max_tokens=99)))
    assert done_of(events).reason == "context"
    assert done_of(events).usage.completion_tokens == 13


def test_half_a_character_at_the_end_is_shown_as_replaced() -> None:
    prompt = ids_of("a")
    engine, _ = saying(prompt, "x👩")
    events = list(engine.generate(prompt, greedy(max_tokens=3)))
    assert text_of(events) == "x\ufffd"


def test_a_prompt_that_leaves_no_room_is_refused_at_once() -> None:
    model = ScriptedModel()
    engine = make_engine(model, context=20)
    with pytest.raises(ContextError, match=r"at most 19 tokens.*found 20"):
        engine.generate([1] * 20, greedy())
    assert not model.steps
    assert done_of(list(engine.generate([1] * 19, greedy()))).reason == "context"


@pytest.mark.parametrize("prompt", [[], [-1], [300], [1, 2**40]])
def test_a_prompt_that_is_none_is_refused(prompt: list[int]) -> None:
    with pytest.raises(UsageError, match="prompt"):
        make_engine(ScriptedModel()).generate(prompt, greedy())


@pytest.mark.parametrize(
    "wrong",
    [{"max_tokens": 0}, {"max_tokens": True}, {"stop": ("",)}, {"stop": ("a",) * 17}],
)
def test_parameters_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="expected"):
        GenerationParams(**wrong)  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_text() -> None:
    def run(seed: int) -> str:
        model = ScriptedModel()
        params = GenerationParams(SamplingParams(temperature=40.0, seed=seed), max_tokens=30)
        return text_of(list(make_engine(model).generate(ids_of("abc"), params)))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_the_penalty_sees_prompt_and_reply() -> None:
    prompt = ids_of("ab")
    # Always the same favourite; the penalty drives it below the others once it was said.
    model = ScriptedModel(lambda ids: 70)
    params = GenerationParams(SamplingParams(0.0, repetition_penalty=100.0), max_tokens=2)
    engine = make_engine(model)
    assert text_of(list(engine.generate(prompt, params)))[0] == TOKENIZER.decode([70])
    model.next_token = lambda ids: prompt[0]
    first = text_of(list(engine.generate(prompt, greedy(max_tokens=1))))
    assert first == "a"


# Stop texts.


@settings(max_examples=200, deadline=None)
@given(
    reply=st.text("abé👩", max_size=24),
    stops=st.lists(st.text("abé👩", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_texts_cut_anywhere_are_found_and_never_shown(reply: str, stops: list[str]) -> None:
    prompt = ids_of("x")
    engine, _ = saying(prompt, reply)
    events = list(engine.generate(prompt, greedy(stop=stops)))
    # Of several stop texts the one that is complete first ends the reply.
    ends = [reply.index(stop) + len(stop) for stop in stops if stop in reply]
    heard = reply[: min(ends)] if ends else reply
    starts = [heard.index(stop) for stop in stops if stop in heard]
    assert text_of(events) == (reply[: min(starts)] if starts else reply)
    assert done_of(events).reason == "stop"
    if ends:
        tokens = len(ids_of(reply[: min(ends)]))
        assert done_of(events).usage.completion_tokens == tokens


def test_only_what_may_become_a_stop_text_is_held_back() -> None:
    prompt = ids_of("x")
    engine, _ = saying(prompt, "abcabcd.")
    pieces = [
        e.text for e in engine.generate(prompt, greedy(stop=["abcd"])) if isinstance(e, Delta)
    ]
    assert pieces == ["abc"]
    engine, _ = saying(prompt, "ab!")
    pieces = [
        e.text for e in engine.generate(prompt, greedy(stop=["abcd"])) if isinstance(e, Delta)
    ]
    assert "".join(pieces) == "ab!"
    assert pieces[-1] == "ab!"


def test_several_stop_texts_in_one_piece_end_it_at_the_first() -> None:
    matcher = StopMatcher(["END", "STOP"])
    assert matcher.feed("ab STOP cd END ef") == "ab "
    assert matcher.has_stopped
    assert matcher.feed("more") == matcher.flush() == ""


# Thinking.


def test_marks_inside_one_piece_are_found_where_they_count() -> None:
    splitter = ThinkSplitter(False)
    assert splitter.feed("\n<think>\na</think>\n\nb</think>") == [
        ("thinking", "a"),
        ("answer", "b</think>"),
    ]
    assert ThinkSplitter(False).feed("a <think> b") == [("answer", "a <think> b")]
    assert ThinkSplitter(True).feed("<think>a</think>") == [("thinking", "<think>a")]


@settings(max_examples=150, deadline=None)
@given(thought=st.text("ab<>/\n", max_size=10), answer=st.text("ab<>/\n", max_size=10))
@pytest.mark.parametrize("opened_by", ["prompt", "model"])
def test_thinking_and_answer_are_told_apart(opened_by: str, thought: str, answer: str) -> None:
    start = "<think>" if opened_by == "model" else ""
    prompt = ids_of("x" if opened_by == "model" else "x<think>\n")
    # As bytes: the marks are cut anywhere, as by a vocabulary without tokens for them.
    reply = TOKENIZER.encode(f"{start}{thought}</think>{answer}")
    cut = [i for text in (reply,) for i in text]
    model = ScriptedModel(follow(len(prompt), [*cut, END]))
    events = list(make_engine(model).generate(prompt, greedy()))
    assert text_of(events, "thinking") == thought.lstrip("\n")
    assert text_of(events) == answer.lstrip("\n")
    usage = done_of(events).usage
    assert 0 < usage.thinking_tokens <= usage.completion_tokens


def test_thinking_tokens_are_counted() -> None:
    prompt = ids_of("x<think>\n")
    engine, _ = saying(prompt, "abc</think>de")
    usage = done_of(list(engine.generate(prompt, greedy()))).usage
    assert (usage.thinking_tokens, usage.completion_tokens) == (4, 7)


def test_stop_texts_do_not_count_inside_thinking() -> None:
    prompt = ids_of("x<think>\n")
    engine, _ = saying(prompt, "a.b</think>c.d")
    events = list(engine.generate(prompt, greedy(stop=["."])))
    assert text_of(events, "thinking") == "a.b"
    assert text_of(events) == "c"


def test_a_model_without_thinking_only_answers() -> None:
    for reply in ("a <think> b </think> c", "<thin", " \n ", "<", "  <thinking>"):
        prompt = ids_of("x")
        model = ScriptedModel(follow(1, [*TOKENIZER.encode(reply), END]))
        events = list(make_engine(model).generate(prompt, greedy()))
        assert text_of(events) == reply
        assert text_of(events, "thinking") == ""
        assert done_of(events).usage.thinking_tokens == 0


def test_a_reply_that_ends_inside_its_thoughts_is_all_thinking() -> None:
    prompt = ids_of("x<think>")
    engine, _ = saying(prompt, "ab</thi")
    events = list(engine.generate(prompt, greedy()))
    assert (text_of(events, "thinking"), text_of(events)) == ("ab</thi", "")


# What is computed again.


def test_the_next_turn_computes_only_what_is_new() -> None:
    model = ScriptedModel()
    engine = make_engine(model, chunk=64)
    first = ids_of("<s><|user|>hello<|assistant|>")
    reply = reference_tokens(first, 6)
    assert text_of(list(engine.generate(first, greedy(6)))) == TOKENIZER.decode(reply)
    # The last token was shown but not computed.
    second = [*first, *reply, *ids_of("</s><|user|>more<|assistant|>")]
    model.steps.clear()
    events = list(engine.generate(second, greedy(4)))
    cached = len(first) + 5
    assert done_of(events).usage.cached_tokens == cached
    assert model.steps[0] == (cached, len(second) - cached)
    assert text_of(events) == TOKENIZER.decode(reference_tokens(second, 4))


def test_the_same_prompt_again_computes_its_last_token_only() -> None:
    model = ScriptedModel()
    engine = make_engine(model)
    prompt = ids_of("again")
    before = text_of(list(engine.generate(prompt, greedy(3))))
    model.steps.clear()
    events = list(engine.generate(prompt, greedy(3)))
    assert text_of(events) == before
    assert model.steps[0] == (4, 1)
    engine.reset()
    model.steps.clear()
    list(engine.generate(prompt, greedy(1)))
    assert model.steps[0] == (0, 5)


@settings(max_examples=100, deadline=None)
@given(
    turns=st.lists(
        st.tuples(st.text("ab", min_size=1, max_size=30), st.integers(1, 9)), max_size=6
    ),
    chunk=st.integers(1, 9),
)
def test_any_reuse_gives_what_a_fresh_engine_gives(
    turns: list[tuple[str, int]], chunk: int
) -> None:
    engine = make_engine(ScriptedModel(), chunk=chunk)
    for text, count in turns:
        prompt = TOKENIZER.encode(text)
        assert text_of(list(engine.generate(prompt, greedy(count)))) == TOKENIZER.decode(
            reference_tokens(prompt, count)
        )


# What is left when it ends early.


def check_still_right(engine: Engine, prompt: Sequence[int]) -> None:
    """The engine gives what a fresh one would, for this prompt and for one that continues it."""
    for continued in (list(prompt), [*prompt, 5, 6, 7]):
        events = list(engine.generate(continued, greedy(4)))
        assert text_of(events) == TOKENIZER.decode(reference_tokens(continued, 4))


@pytest.mark.parametrize("passes", range(8))
def test_a_cancel_is_heard_between_chunks_and_between_tokens(passes: int) -> None:
    prompt = list(range(20, 60))  # Five chunks.
    model = ScriptedModel(cancel_at=passes)
    engine = make_engine(model)
    events = list(engine.generate(prompt, greedy(50), model.cancel))
    assert done_of(events).reason == "cancelled"
    assert len(model.steps) == passes + 1
    model.cancel_at = None
    check_still_right(engine, prompt)


def test_a_cancel_before_the_start_computes_nothing() -> None:
    model = ScriptedModel()
    model.cancel.set()
    events = list(make_engine(model).generate(ids_of("abc"), greedy(), model.cancel))
    assert events == [done_of(events)]
    assert done_of(events).reason == "cancelled"
    assert not model.steps


@pytest.mark.parametrize("passes", [0, 2, 4, 5, 7])
@pytest.mark.parametrize("failure", [MemoryLimitError("memory"), KeyboardInterrupt(), None])
def test_a_failing_pass_leaves_the_engine_usable(
    passes: int, failure: BaseException | None
) -> None:
    # Of prefill, only the last pass's logits are looked at: a NaN of an earlier one spreads to them
    # through the cache.
    passes += 4 if failure is None else 0
    prompt = list(range(20, 60))
    model = ScriptedModel()
    engine = make_engine(model)
    list(engine.generate(prompt[:12], greedy(2)))
    model.fail_at, model.failure = passes, failure
    with pytest.raises(NumericsError if failure is None else type(failure)):
        list(engine.generate(prompt, greedy(9)))
    check_still_right(engine, prompt)


def test_what_gave_nan_is_not_reused() -> None:
    model = ScriptedModel()
    engine = make_engine(model)
    prompt = ids_of("abcdefgh")
    model.fail_at = 0
    with pytest.raises(NumericsError):
        list(engine.generate(prompt, greedy(2)))
    assert done_of(list(engine.generate(prompt, greedy(2)))).usage.cached_tokens == 0


def test_a_cache_that_is_ahead_of_the_books_is_cut() -> None:
    """As when Ctrl-C falls between the model's return and the engine's note of it."""
    engine = make_engine(ScriptedModel())
    prompt = ids_of("abcdefgh")
    list(engine.generate(prompt, greedy(3)))
    del engine.sequence.ids[4:]
    check_still_right(engine, prompt)


def test_a_generation_left_alone_can_be_followed_by_another() -> None:
    engine = make_engine(ScriptedModel())
    prompt = ids_of("abc")
    events = engine.generate(prompt, greedy(50))
    for _ in range(4):
        next(events)
    events.close()
    check_still_right(engine, prompt)


def test_one_generation_at_a_time() -> None:
    engine = make_engine(ScriptedModel())
    running = engine.generate(ids_of("abc"), greedy(50))
    next(running)
    with pytest.raises(UsageError, match="already"):
        list(engine.generate(ids_of("abc"), greedy(1)))
    running.close()
    assert done_of(list(engine.generate(ids_of("abc"), greedy(1)))).reason == "length"


def test_a_cancel_from_another_thread_ends_it() -> None:
    engine = make_engine(ScriptedModel(), context=4096)
    cancel = threading.Event()
    events: list[Event] = []

    def run() -> None:
        events.extend(engine.generate(ids_of("abc"), greedy(), cancel))

    thread = threading.Thread(target=run)
    thread.start()
    cancel.set()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert done_of(events).reason == "cancelled"


def test_a_model_without_a_template_says_so() -> None:
    with pytest.raises(TemplateError, match="no chat template"):
        _ = make_engine(ScriptedModel()).template


def test_many_generations_leave_nothing_behind() -> None:
    engine = make_engine(ScriptedModel(), context=64)
    prompt = ids_of("abc")
    for number in range(300):
        list(engine.generate([*prompt, number % 250], greedy(3)))
    assert engine.sequence.cache.nbytes <= 2 * 4 * 64
    assert len(engine.sequence.ids) == engine.sequence.cache.length
    assert not torch.is_inference_mode_enabled()


# What is read ahead.


def test_what_was_read_ahead_is_not_read_again() -> None:
    model = ScriptedModel()
    engine = make_engine(model)
    history = ids_of("<s><|user|>hello<|assistant|>hi")
    assert engine.read_ahead(history, threading.Event()) == len(history)
    assert engine.read_ahead(history[:5], threading.Event()) == 0, "it is there already"
    prompt = [*history, *ids_of("<|user|>more<|assistant|>")]
    events = list(engine.generate(prompt, greedy(4)))
    assert done_of(events).usage.cached_tokens == len(history)
    assert text_of(events) == TOKENIZER.decode(reference_tokens(prompt, 4))


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_reading_ahead_can_be_stopped_and_fails_without_harm(passes: int) -> None:
    history = list(range(20, 220))
    model = ScriptedModel(cancel_at=passes)
    engine = make_engine(model)
    engine.read_ahead(history, model.cancel)
    assert len(model.steps) == passes + 1
    model.cancel_at = None
    check_still_right(engine, history)
    model.fail_at, model.failure = passes, MemoryLimitError("memory")
    with pytest.raises(MemoryLimitError):
        engine.read_ahead(history[::-1], threading.Event())
    check_still_right(engine, history)
