"""Answers that are JSON, whatever the model would rather say; thinking in front of them is free."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer, tokenizer_files
from engine_cases import END, TOKENIZER, done_of, greedy, ids_of, make_engine, text_of
from fake_engine import FakeEngine, answer, conversation
from scripted_model import ScriptedModel
from torch import Tensor

from localr1.cache.sequence import Cache
from localr1.cli.answer_format import answer_schema, grammar_of
from localr1.cli.output import Output
from localr1.cli.printer import ReplyStyle
from localr1.cli.session import ChatSession
from localr1.cli.slash import run_slash_command
from localr1.engine.events import GenerationParams
from localr1.errors import LocalR1Error, NotFoundError, UnsupportedError, UsageError
from localr1.models.step import Step
from localr1.sampler import Sampler, SamplingParams
from localr1.structured import ANY_OBJECT, JsonGrammar
from localr1.tokenizer import Tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog", "Übermensch"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


class RandomModel(ScriptedModel):
    """Every token as likely as any other; the same for the same tokens before it."""

    def forward(self, step: Step, cache: Cache[Any]) -> Tensor:
        super().forward(step, cache)
        keys = cache.layer(0).k[0, : cache.length, 0]
        seed = int((keys * torch.arange(1, cache.length + 1)).sum().item()) % 2**31
        return 10 * torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))


def is_person(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() <= PERSON["properties"].keys()  # type: ignore[attr-defined]
        and isinstance(value["name"], str)
        and len(value["name"]) <= 12
        and type(value["age"]) is int
        and 0 <= value["age"] <= 150
        and value["kind"] in ("cat", "dog", "Übermensch")
        and all(type(tag) is bool for tag in value.get("tags", []))
        and len(value.get("tags", [])) <= 3
    )


def params(schema: Any, seed: int, max_tokens: int = 600) -> GenerationParams:
    grammar = JsonGrammar(TOKENIZER, schema)
    return GenerationParams(SamplingParams(1.5, seed=seed), max_tokens, grammar=grammar)


@pytest.mark.parametrize("seed", range(12))
def test_every_answer_fits_the_schema(seed: int) -> None:
    prompt = ids_of(f"<|user|>{seed}<|assistant|>")
    events = list(make_engine(RandomModel(), context=1000).generate(prompt, params(PERSON, seed)))
    assert done_of(events).reason == "stop"
    assert is_person(json.loads(text_of(events))), text_of(events)


@pytest.mark.parametrize("seed", range(6))
def test_every_answer_is_an_object(seed: int) -> None:
    """A random model may never end one: then it is cut, and says so."""
    prompt = ids_of(f"<|user|>{seed}<|assistant|>")
    engine = make_engine(RandomModel(), context=3000)
    events = list(engine.generate(prompt, params(dict(ANY_OBJECT), seed, 2000)))
    if done_of(events).reason == "stop":
        assert isinstance(json.loads(text_of(events)), dict)
    else:
        assert text_of(events).startswith("{")


def test_the_thought_is_free_and_the_answer_is_not() -> None:
    prompt = ids_of("<|user|>?<|assistant|><think>\n")
    thought = 'anything: }{ "'
    script = [*ids_of(f"{thought}</think>\n\nSure! Here it is"), *[END] * 900]
    for forced in (None, 3):
        model = ScriptedModel(lambda ids: script[len(ids) - len(prompt)])
        wanted = replace(greedy(800), grammar=JsonGrammar(TOKENIZER, PERSON), think_budget=forced)
        events = list(make_engine(model, context=1000).generate(prompt, wanted))
        assert text_of(events, "thinking").startswith(thought[: forced or None])
        assert is_person(json.loads(text_of(events)))
        assert done_of(events).closed == (None if forced is None else "budget")


def test_an_answer_that_came_with_the_end_of_the_thought_counts() -> None:
    """A vocabulary may have one token for it."""
    grammar = JsonGrammar(TOKENIZER, {"enum": ["yes"]})
    constraint = grammar.start()
    constraint.accept_text('"ye')
    assert np.flatnonzero(constraint.allowed()).tolist() == TOKENIZER.encode("s")
    with pytest.raises(UnsupportedError):
        grammar.start().accept_text("Sure")


def test_a_control_token_never_stands_for_its_name() -> None:
    constraint = JsonGrammar(TOKENIZER, {"type": "string"}).start()
    constraint.accept_text('"')
    allowed = constraint.allowed()
    assert allowed[TOKENIZER.encode("a")[0]]
    for name in TOKENIZER.control_ids.values():
        assert not allowed[name]
    constraint.accept_text('a"')
    assert np.flatnonzero(constraint.allowed()).tolist() == [END]


def test_white_space_ends() -> None:
    constraint = JsonGrammar(TOKENIZER, PERSON).start()
    constraint.accept_text("{" + 40 * " ")
    assert np.flatnonzero(constraint.allowed()).tolist() == TOKENIZER.encode('"')


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "nothing"}, "Invalid type: nothing"),
        ({"type": "array", "uniqueItems": True}, "Unimplemented keys"),
        ({"type": "string", "pattern": "("}, "regex parse error"),
        ({"$ref": "#/nothing"}, "does not exist"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "Unsatisfiable"),
        (False, "found true or false"),
        ([], "found a list"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_at_once(schema: Any, says: str) -> None:
    with pytest.raises(UsageError, match=r"a\.json: expected a JSON schema") as caught:
        JsonGrammar(TOKENIZER, schema, "a.json")
    assert says in str(caught.value)


def test_a_tokenizer_without_an_end_cannot() -> None:
    tokenizer = byte_tokenizer(eos_token_ids=(), eos_token=None)
    with pytest.raises(UnsupportedError, match="a token that ends a turn"):
        JsonGrammar(tokenizer, PERSON)


def test_a_model_whose_vocabulary_is_full() -> None:
    """No row is left for the token of our own that the tokenizer has behind the last."""
    tokenizer = Tokenizer.from_files(tokenizer_files(), 264)
    assert tokenizer.vocab_size == 264
    assert tokenizer.num_ids == 265
    allowed = JsonGrammar(tokenizer, PERSON).start().allowed()
    assert allowed.shape == (264,)
    assert np.flatnonzero(allowed).tolist() == tokenizer.encode("{")


@pytest.mark.parametrize("temperature", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("allowed", [[5], [0, 3, 7], list(range(0, 40, 2))])
def test_only_what_is_allowed_is_drawn_and_as_often_as_it_should(
    temperature: float, allowed: Sequence[int]
) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3))
    mask = np.zeros(40, bool)
    mask[list(allowed)] = True
    wanted = SamplingParams(temperature, seed=1)
    sampler, alone = Sampler(wanted), Sampler(wanted)
    for _ in range(200):
        token = sampler.sample(logits, (), mask)
        assert token == allowed[alone.sample(logits[list(allowed)])]


# In the chat.


def test_what_the_chat_asks_for(tmp_path: Path) -> None:
    path = tmp_path / "person.json"
    path.write_text(json.dumps(PERSON))
    assert answer_schema(None, None) is None
    for wanted in (answer_schema("json", None), answer_schema(None, path)):
        assert wanted is not None
        engine = make_engine(RandomModel())
        assert grammar_of(engine, wanted).start().allowed().sum() > 0
    with pytest.raises(UsageError, match="--format: expected json"):
        answer_schema("yaml", None)
    with pytest.raises(UsageError, match="one of them"):
        answer_schema("text", path)
    with pytest.raises(NotFoundError):
        answer_schema(None, tmp_path / "none.json")
    path.write_text('{"type": "object", "type": "array"}')
    with pytest.raises(LocalR1Error, match="type"):
        answer_schema(None, path)


def test_set_format(tmp_path: Path) -> None:
    engine = FakeEngine([answer("ok")])
    engine.tokenizer = TOKENIZER
    session = ChatSession(Output(io.StringIO(), io.StringIO()), conversation(engine), ReplyStyle())
    session.say("a")
    run_slash_command(session, "/set format json")
    session.say("b")
    with pytest.raises(NotFoundError):
        run_slash_command(session, f"/set format {tmp_path / 'none.json'}")
    session.say("c")
    run_slash_command(session, "/set format text")
    session.say("d")
    constrained = [each.grammar is not None for each in engine.params]
    assert constrained == [False, True, True, False]
    with pytest.raises(UsageError, match="/set format"):
        run_slash_command(session, "/set format")
