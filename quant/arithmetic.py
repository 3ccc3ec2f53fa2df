"""How many questions of arithmetic a model answers right: 875 of them, in English and German.

Sums, differences, products, expressions of two steps, decimals to compare, letters to count, and
short stories, 125 of each. They are the ones held out from the training of the embedded r1-nano
(examples/r1_nano), so its accuracy on them is not memory; any other model may be asked as well.
Answers count only inside \\boxed{}, as reasoning models are trained to give them.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from localr1.engine.engine import Engine
from localr1.engine.events import Delta, Done, GenerationParams
from localr1.sampler import SamplingParams

PROBLEMS = Path(__file__).parent / "data" / "arithmetic.jsonl"
"""A line each: [kind, question, answer]."""
DEFAULT_MAX_TOKENS = 1024
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
"""Braces within, one deep, as in \\boxed{\\text{equal}}."""
WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}")
SPACING = re.compile(r"\\[,;! ]|[\s$]")


@dataclass(frozen=True)
class Problem:
    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Attempt:
    """reply: the answer without the thinking. boxed: what stood in its last box, or None.
    was_cut: whether the token limit ended it. tokens: generated, thinking included."""

    problem: Problem
    reply: str
    boxed: str | None
    was_cut: bool
    tokens: int

    @property
    def is_right(self) -> bool:
        return self.boxed is not None and means(self.boxed, self.problem.answer)


@dataclass(frozen=True)
class Accuracy:
    """right of total."""

    right: int
    total: int

    @property
    def share(self) -> float:
        return self.right / self.total

    @property
    def standard_error(self) -> float:
        """Of the share, for independent questions."""
        return math.sqrt(self.share * (1 - self.share) / self.total)


AttemptProgress = Callable[[int, int, int], None]
"""Called with problems done, problems in all, and right ones so far."""


def read_problems(per_kind: int | None = None) -> list[Problem]:
    """The list, or the first `per_kind` of each kind."""
    lines = PROBLEMS.read_text(encoding="utf-8").splitlines()
    problems = [Problem(*json.loads(line)) for line in lines]
    if per_kind is None:
        return problems
    taken: dict[str, int] = {}
    kept = []
    for problem in problems:
        taken[problem.kind] = taken.get(problem.kind, 0) + 1
        if taken[problem.kind] <= per_kind:
            kept.append(problem)
    return kept


def means(boxed: str, answer: str) -> bool:
    """Whether what stands in a box is the answer, written in any usual way: spaces, LaTeX around
    it, either decimal mark, commas between thousands. "9.90" for "9.9" is another text."""
    plain = SPACING.sub("", WRAPPED.sub(r"\1", boxed)).rstrip(".").casefold()
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+", plain) and re.fullmatch(r"-?\d+", answer):
        plain = plain.replace(",", "")
    return plain.replace(",", ".") == answer.replace(",", ".")


def attempt(
    engine: Engine,
    problem: Problem,
    *,
    instruction: str = "",
    max_tokens: int = DEFAULT_MAX_TOKENS,
) -> Attempt:
    """One question in a conversation of its own, answered with the most probable tokens.

    instruction: follows the question on a line of its own. Raises what `Engine.generate` raises.
    """
    question = f"{problem.question}\n{instruction}" if instruction else problem.question
    prompt = engine.prompt([{"role": "user", "content": question}])
    params = GenerationParams(
        SamplingParams(temperature=0.0),
        max_tokens=max_tokens,
        starts_in_thinking=prompt.starts_in_thinking,
    )
    reply, done = "", None
    for event in engine.generate(prompt.ids, params):
        if isinstance(event, Delta) and event.channel == "answer":
            reply += event.text
        elif isinstance(event, Done):
            done = event
    assert done is not None
    boxes = BOXED.findall(reply)
    return Attempt(
        problem=problem,
        reply=reply.strip(),
        boxed=boxes[-1] if boxes else None,
        was_cut=done.reason in ("length", "context"),
        tokens=done.usage.completion_tokens,
    )


def attempt_all(
    engine: Engine,
    problems: Sequence[Problem],
    *,
    instruction: str = "",
    max_tokens: int = DEFAULT_MAX_TOKENS,
    progress: AttemptProgress | None = None,
) -> list[Attempt]:
    """`attempt` for each problem, in order."""
    attempts: list[Attempt] = []
    right = 0
    for problem in problems:
        attempts.append(attempt(engine, problem, instruction=instruction, max_tokens=max_tokens))
        right += attempts[-1].is_right
        if progress is not None:
            progress(len(attempts), len(problems), right)
    return attempts


def accuracy(attempts: Iterable[Attempt]) -> Accuracy:
    results = [each.is_right for each in attempts]
    return Accuracy(sum(results), len(results))


def by_kind(attempts: Sequence[Attempt]) -> dict[str, Accuracy]:
    """In the order of the list."""
    kinds = dict.fromkeys(each.problem.kind for each in attempts)
    return {
        kind: accuracy(each for each in attempts if each.problem.kind == kind) for kind in kinds
    }
