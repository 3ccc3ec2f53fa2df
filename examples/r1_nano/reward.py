"""The rule-based reward (DeepSeek-R1, arXiv 2501.12948, section 2.2.2): format and accuracy.

No learned judge: the reply either has the asked form or not, and the answer is either right or not.
"""

import re
from dataclasses import dataclass
from typing import Final

from problems import Problem
from smalltalk import ABILITIES, OPENINGS
from tokenizer import END_THINK, EOS

FORMAT_REWARD: Final = 0.2
ANSWER_REWARD: Final = 1.0
BOXED: Final = re.compile(r"\\boxed\{([^{}]*)\}")


@dataclass(frozen=True)
class Verdict:
    """Whether a reply has the form <think>...</think> answer, and whether its answer is right."""

    well_formed: bool
    right: bool

    @property
    def reward(self) -> float:
        return FORMAT_REWARD * self.well_formed + ANSWER_REWARD * self.right


def judge(problem: Problem, reply: str) -> Verdict:
    """Judges the text after the opening <think>, special tokens included.

    Well formed: one </think>, something before it, one end token at the very end, and exactly one
    box (none where the question asks for a sentence). Only a well-formed reply can be right.
    """
    if reply.count(END_THINK) != 1 or reply.count(EOS) != 1 or not reply.endswith(EOS):
        return Verdict(False, False)
    thought, answer = reply.removesuffix(EOS).split(END_THINK)
    boxes = BOXED.findall(answer)
    if not thought.strip() or "<" in answer or len(boxes) != problem.boxed:
        return Verdict(False, False)
    if problem.boxed:
        return Verdict(True, boxes[0].strip() == problem.answer)
    return Verdict(True, is_honest(answer.strip(), problem.answer))


def is_honest(found: str, expected: str) -> bool:
    """Whether a sentence says what the model is and can do, in the language of the expected one. A
    greeting may be taken for a question about the model, or for what it cannot do: nothing in the
    training tells the sense of a sentence that was never in it."""
    return any(
        found == openings[language] + ability and expected.endswith(ability)
        for openings in OPENINGS.values()
        for language, ability in ABILITIES.items()
    )
