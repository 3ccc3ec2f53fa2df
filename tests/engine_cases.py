"""Engines that say what a test wants, and what is read off their events."""

from collections.abc import Sequence

from byte_tokenizer import byte_tokenizer
from scripted_model import ScriptedModel, follow, hashed

from localr1.engine.engine import Engine
from localr1.engine.events import Delta, Done, Event, GenerationParams
from localr1.sampler import SamplingParams

TOKENIZER = byte_tokenizer()
END = TOKENIZER.control_ids["</s>"]
GREEDY = SamplingParams(temperature=0.0)


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, allow_special=True)


def make_engine(model: ScriptedModel, context: int = 256, chunk: int = 8) -> Engine:
    return Engine(model, TOKENIZER, None, context, chunk=chunk)


def saying(prompt: Sequence[int], reply: str, **options: int) -> tuple[Engine, ScriptedModel]:
    """An engine that answers `prompt` with `reply` and ends."""
    model = ScriptedModel(follow(len(prompt), [*ids_of(reply), END, *[END] * 50]))
    return make_engine(model, **options), model


def greedy(max_tokens: int | None = None, stop: Sequence[str] = ()) -> GenerationParams:
    return GenerationParams(GREEDY, max_tokens, tuple(stop))


def text_of(events: Sequence[Event], channel: str = "answer") -> str:
    return "".join(e.text for e in events if isinstance(e, Delta) and e.channel == channel)


def done_of(events: Sequence[Event]) -> Done:
    assert sum(isinstance(event, Done) for event in events) == 1
    done = events[-1]
    assert isinstance(done, Done)
    return done


def reference_tokens(prompt: Sequence[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(hashed(ids))
    return ids[len(prompt) :]
