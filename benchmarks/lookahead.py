"""Decoding with drafts from what came before, beside decoding without: one and the other in turn.

    python benchmarks/lookahead.py MODEL --pairs 5

Prompts whose answer repeats much of them, and others. Greedy; the tokens are compared. The ratio is
taken pair by pair; what the engine learned of the machine it keeps from pair to pair, as in a chat.
"""

import argparse
import statistics
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from localr1.engine.engine import Engine
from localr1.engine.events import Delta, Done, GenerationParams, Usage
from localr1.load import load_engine
from localr1.sampler import SamplingParams

PASSAGE = (
    "def area(width, height):\n    return width * height\n\n"
    "def volume(width, height, depth):\n    return area(width, height) * depth\n\n"
    "def surface(width, height, depth):\n"
    "    return 2 * (area(width, height) + area(width, depth) + area(height, depth))\n"
)
PROMPTS = {
    "repeats": f"Repeat this program exactly, twice:\n\n{PASSAGE}",
    "free": "Tell me a story about a lighthouse keeper and a whale.",
    "sum": "What is 4783 * 8652?",
}


@dataclass(frozen=True)
class Run:
    text: str
    usage: Usage

    @property
    def speed(self) -> float:
        """Tokens a second after the first."""
        return (self.usage.completion_tokens - 1) / self.usage.decode_seconds


def run(engine: Engine, ids: list[int], params: GenerationParams) -> Run:
    events = list(engine.generate(ids, params))
    done = events[-1]
    assert isinstance(done, Done)
    return Run("".join(e.text for e in events if isinstance(e, Delta)), done.usage)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    params = GenerationParams(SamplingParams(temperature=0.0), arguments.tokens)
    with closing(load_engine(arguments.model, threads=arguments.threads)) as engine:
        if not engine.looks_ahead:
            raise SystemExit("this model's bits depend on the tokens of a pass: nothing is drafted")
        for name, prompt in PROMPTS.items():
            ids = engine.prompt([{"role": "user", "content": prompt}]).ids
            ratios, speeds, drafted, accepted, tokens = [], [], 0, 0, 0
            for _ in range(arguments.pairs):
                plain = run(engine, ids, params)
                ahead = run(engine, ids, replace(params, looks_ahead=True))
                if ahead.text != plain.text:
                    raise SystemExit(f"{name}: other tokens")
                ratios.append(ahead.speed / plain.speed)
                speeds.append(plain.speed)
                drafted += ahead.usage.drafted_tokens
                accepted += ahead.usage.accepted_tokens
                tokens += ahead.usage.completion_tokens
            print(
                f"{name:8} {tokens // arguments.pairs:4} tokens, {accepted} of {drafted} drafted "
                f"right: {statistics.median(ratios):.2f} times {statistics.median(speeds):.1f} "
                f"tok/s ({min(ratios):.2f}-{max(ratios):.2f})"
            )


if __name__ == "__main__":
    main()
