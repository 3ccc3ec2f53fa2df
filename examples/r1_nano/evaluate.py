"""Accuracy on the fixed list of held-out problems, by kind.

python examples/r1_nano/evaluate.py MODEL_DIR            greedy, all 1,000 problems
python examples/r1_nano/evaluate.py MODEL_DIR --against OTHER_DIR     both, question by question
python examples/r1_nano/evaluate.py --write              writes the list anew
"""

import argparse
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from export import load_directory
from model import R1Nano
from problems import KINDS, Problem, draw
from reward import judge
from sampling import generate
from tokenizer import encode, prompt_text
from tokenizers import Tokenizer

ARITHMETIC: Final = Path(__file__).parents[2] / "quant" / "data" / "arithmetic.jsonl"
"""What `localr1 eval arithmetic` asks of any model."""
CHAT: Final = Path(__file__).parent / "held_out_chat.jsonl"
PER_KIND: Final = 125
DEVELOPMENT_PER_KIND: Final = 100
MAX_NEW_TOKENS: Final = 192
# The three questions everybody tries stand first in their kinds.
FAMOUS: Final = (
    ("product", "What is 47 * 86?", "4042"),
    ("decimals", "Which is larger, 9.11 or 9.9?", "9.9"),
    ("letters", "How many r are in strawberry?", "3"),
)


def held_out_problem(kind: str, prompt: str, answer: str) -> Problem:
    """A problem of the list: it has no worked solution, only what its answer must be."""
    return Problem(kind, prompt, "", "", answer, kind != "chat", True)


def write_list() -> None:
    """Draws the list from the held-out side, every prompt once."""
    rng = random.Random("held-out list")
    lines: dict[Path, list[str]] = {ARITHMETIC: [], CHAT: []}
    for kind in KINDS:
        chosen = {prompt: answer for k, prompt, answer in FAMOUS if k == kind}
        while len(chosen) < PER_KIND:
            problem = draw(rng, kind, held_out=True)
            chosen[problem.prompt] = problem.answer
        lines[CHAT if kind == "chat" else ARITHMETIC] += [
            json.dumps([kind, *pair], ensure_ascii=False) for pair in chosen.items()
        ]
    for path, rows in lines.items():
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def read_list() -> list[Problem]:
    """The fixed list, in two files."""
    lines = [line for path in (ARITHMETIC, CHAT) for line in path.read_text("utf-8").splitlines()]
    return [held_out_problem(*json.loads(line)) for line in lines]


def development_list() -> list[Problem]:
    """Another fixed list, from the training side: what settings and checkpoints are chosen by, so
    that the held-out list is not. Its sentences and some of its words were trained on."""
    rng = random.Random("development list")
    return [draw(rng, kind) for kind in KINDS for _ in range(DEVELOPMENT_PER_KIND)]


def evaluate(
    model: R1Nano,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    rows: int = 250,
    turns: int = 0,
    samples: int = 0,
) -> tuple[Counter[str], list[tuple[Problem, str]]]:
    """Right answers by kind with greedy decoding, and every wrong reply. turns: how many other
    questions were asked and answered before, in the same conversation. samples: instead of the
    greedy reply judge so many sampled ones of each problem, at temperature 1."""
    outputs, temperature = (samples, 1.0) if samples else (1, 0.0)
    right: Counter[str] = Counter()
    wrong = []
    generator = torch.Generator(model.device).manual_seed(0)
    rng = random.Random("turns before")
    for start in range(0, len(problems), rows):
        part = problems[start : start + rows]
        before = [[draw(rng, rng.choice(list(KINDS))) for _ in range(turns)] for _ in part]
        texts = [
            prompt_text(problem.prompt, [(each.prompt, each.reply) for each in earlier])
            for problem, earlier in zip(part, before, strict=True)
        ]
        prompts = encode(tokenizer, texts)
        replies = generate(
            model,
            prompts,
            outputs=outputs,
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=temperature,
            generator=generator,
        )
        texts = tokenizer.decode_batch(replies, skip_special_tokens=False)
        repeated = [problem for problem in part for _ in range(outputs)]
        for problem, text in zip(repeated, texts, strict=True):
            if judge(problem, text).right:
                right[problem.kind] += 1
            else:
                wrong.append((problem, text))
    return right, wrong


def paired_difference(gained: int, lost: int, count: int) -> tuple[float, float, float]:
    """Two models on the same questions, of which `gained` are right only in the first and `lost`
    only in the second: the difference in accuracy, its standard error, and the probability of a
    difference at least as large if both were equally good (McNemar's test, exact, two-sided)."""
    changed = gained + lost
    difference = (gained - lost) / count
    error = math.sqrt(changed - (gained - lost) ** 2 / count) / count
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1)) / 2**changed
    return difference, error, min(1.0, 2 * tail)


def main() -> None:
    """Prints the accuracy of each kind, and the wrong replies where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--write", action="store_true", help="write the held-out list")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=0, help="earlier turns before each question")
    parser.add_argument("--development", action="store_true", help="the development list instead")
    parser.add_argument("--samples", type=int, default=0, help="sampled replies a question")
    parser.add_argument("--show-wrong", action="store_true")
    parser.add_argument("--against", type=Path, help="another model, compared in pairs")
    arguments = parser.parse_args()
    if arguments.against is not None and arguments.samples:
        parser.error("--against compares greedy replies: leave --samples out")
    if arguments.write:
        write_list()
    if arguments.model is None:
        return
    model, tokenizer = load_directory(arguments.model)
    model.to(arguments.device)
    problems = development_list() if arguments.development else read_list()
    right, wrong = evaluate(
        model, tokenizer, problems, turns=arguments.turns, samples=arguments.samples
    )
    replies = max(1, arguments.samples)
    counts = Counter(problem.kind for problem in problems for _ in range(replies))
    for kind, count in counts.items():
        print(f"{kind:13s} {right[kind]:4d} of {count} {right[kind] / count:7.1%}")
    total = counts.total()
    print(f"{'all':13s} {right.total():4d} of {total} {right.total() / total:7.1%}")
    if arguments.against is not None:
        other, other_tokenizer = load_directory(arguments.against)
        other.to(arguments.device)
        _, also_wrong = evaluate(other, other_tokenizer, problems, turns=arguments.turns)
        failed, other_failed = (
            {problem.prompt for problem, _ in replies} for replies in (wrong, also_wrong)
        )
        gained, lost = len(other_failed - failed), len(failed - other_failed)
        difference, error, probability = paired_difference(gained, lost, len(problems))
        print(
            f"against {arguments.against}: {gained} gained, {lost} lost, "
            f"{difference:+.1%} with a standard error of {error:.1%}, p = {probability:.2g}"
        )
    if arguments.show_wrong:
        for problem, text in wrong:
            print(f"\n[{problem.kind}] {problem.prompt}  expected {problem.answer}\n{text}")


if __name__ == "__main__":
    main()
