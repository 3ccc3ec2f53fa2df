"""What a cache in 8 bits changes of a model's own answers to questions of arithmetic.

    python benchmarks/cache_bits.py MODEL --per-kind 6

Each question is answered greedily with a cache as it is and with one in 8 bits: whether the texts
are the same, and the divergence of the predictions over the tokens of the first answer. (`localr1
eval kl` measures it on a plain text, which a model of chat alone may never have seen.)
"""

import argparse
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from localr1.engine.engine import Engine
from localr1.engine.events import Delta, GenerationParams
from localr1.load import load_engine
from localr1.models.step import Step
from localr1.quant import arithmetic
from localr1.sampler import SamplingParams


def answer(engine: Engine, ids: list[int], params: GenerationParams) -> str:
    engine.reset()
    return "".join(e.text for e in engine.generate(ids, params) if isinstance(e, Delta))


def predictions(engine: Engine, ids: list[int], first: int) -> Tensor:
    """Log-probabilities behind the tokens from `first` on."""
    step = Step(torch.tensor(ids), 0, all_logits=True)
    logits = engine.model.forward(step, engine.model.new_cache(len(ids)))
    return logits[first:].log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--per-kind", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    params = GenerationParams(SamplingParams(temperature=0.0), arguments.tokens)
    same, divergences, problems = 0, [], arithmetic.read_problems(arguments.per_kind)
    with (
        closing(load_engine(arguments.model, threads=arguments.threads)) as whole,
        closing(load_engine(arguments.model, threads=arguments.threads, kv_bits=8)) as narrow,
    ):
        for problem in problems:
            ids = whole.prompt([{"role": "user", "content": problem.question}]).ids
            expected = answer(whole, ids, params)
            read = list(whole.sequence.ids)
            same += answer(narrow, ids, params) == expected
            exact, found = (predictions(each, read, len(ids) - 1) for each in (whole, narrow))
            divergences.append((exact.exp() * (exact - found)).sum(-1))
    mean = torch.cat(divergences).mean().item()
    print(f"{same} of {len(problems)} answers are the same text")
    print(f"mean KL {mean:.2e} nats over {sum(map(len, divergences)):,} tokens")


if __name__ == "__main__":
    main()
