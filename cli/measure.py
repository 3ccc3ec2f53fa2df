"""How fast a model runs, measured as llama-bench does.

pp512: one forward pass over 512 tokens in an empty cache (prefill). tg128: 128 single-token steps
from an empty cache (decode). Token ids are drawn at random with a fixed seed, as their values do
not change the work; but where experts come from several places they do, and there the tokens are
what the model itself says, sampled with a fixed seed. One run of each goes before, unmeasured.
"""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from localr1.engine.engine import Engine
from localr1.engine.events import GenerationParams
from localr1.models.api import Model
from localr1.models.step import Step

SEED = 1234
MAX_SAMPLED = 256
"""Tokens: sampling them takes as long as decoding."""


@dataclass(frozen=True)
class Measurement:
    """One test: `prompt` tokens prefilled or `generated` tokens decoded. seconds: of each run."""

    prompt: int
    generated: int
    seconds: tuple[float, ...]

    @property
    def name(self) -> str:
        return f"pp{self.prompt}" if self.prompt else f"tg{self.generated}"

    @property
    def rates(self) -> list[float]:
        """Tokens a second of each sample."""
        return [(self.prompt or self.generated) / each for each in self.seconds]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.rates)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.rates) if len(self.rates) > 1 else 0.0


def timed(work: Callable[[], None], repetitions: int) -> tuple[float, ...]:
    """Seconds of each repetition, after one that does not count."""
    samples = []
    for _ in range(repetitions + 1):
        begin = time.perf_counter()
        work()
        samples.append(time.perf_counter() - begin)
    return tuple(samples[1:])


def random_ids(vocab_size: int, count: int) -> list[int]:
    draw = random.Random(SEED)
    return [draw.randrange(vocab_size) for _ in range(count)]


def sampled_ids(model: Model, count: int) -> list[int]:
    """What the model says of itself at temperature 1, repeated from MAX_SAMPLED tokens on."""
    cache = model.new_cache(min(count, MAX_SAMPLED))
    generator = torch.Generator().manual_seed(SEED)
    ids = random_ids(model.config.vocab_size, 1)
    for position in range(min(count, MAX_SAMPLED) - 1):
        logits = model.forward(Step(torch.tensor(ids[-1:]), position), cache)
        ids.append(int(torch.multinomial(logits[0].softmax(0), 1, generator=generator)))
    return (ids * -(-count // len(ids)))[:count]


def measure(
    model: Model, prompt: int, generated: int, repetitions: int, ids: list[int] | None = None
) -> list[Measurement]:
    """The prefill and the decode test, leaving out one of 0 tokens. ids: the tokens; None for
    random ones."""
    longest = max(prompt, generated, 1)
    tokens = torch.tensor(ids or random_ids(model.config.vocab_size, longest))
    cache = model.new_cache(longest)

    def prefill() -> None:
        cache.truncate(0)
        model.forward(Step(tokens[:prompt], 0), cache)

    def decode() -> None:
        cache.truncate(0)
        for position in range(generated):
            model.forward(Step(tokens[position : position + 1], position), cache)

    results = []
    if prompt:
        results.append(Measurement(prompt, 0, timed(prefill, repetitions)))
    if generated:
        results.append(Measurement(0, generated, timed(decode, repetitions)))
    return results


def time_to_first_token(engine: Engine, prompt: int, repetitions: int) -> tuple[float, ...]:
    """Seconds from handing the engine a prompt of that many tokens to its first new one: prefill,
    sampling and all that lies between."""
    ids = random_ids(engine.model.config.vocab_size, max(prompt, 1))
    variants = iter(range(repetitions + 1))

    def first_token() -> None:
        # Another first token each time, so that no prefix is found in the cache.
        fresh = [next(variants), *ids[1:]]
        for _ in engine.generate(fresh, GenerationParams(max_tokens=1), None):
            pass

    return timed(first_token, repetitions)
