"""Supervised warm-up: worked solutions until the model mostly follows them, stopped on purpose.

    python examples/r1_nano/train.py --out DIR --steps 4200
    python examples/r1_nano/train.py --out OTHER_DIR --from MODEL_DIR --steps 4900

The second run begins with the first one's exported weights, the optimizers anew. More than half of
what it imitates are answers without the work, as much of what people write is, and a model that
imitates gives them as often: whether work is worth its while is left to GRPO to find out. What such
an answer says is not learned, as nobody can know it without the work.

Resumes from DIR/state.safetensors if it is there. Every step draws fresh problems from its own
seed, so a resumed run sees the same data as one that never stopped.
"""

import argparse
import random
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Final

import torch
from batches import loss_and_correct, make_rows
from export import load_directory
from model import Config, R1Nano
from optimizer import MixedPrecision, muon_and_adam
from problems import Problem, draw, draw_history
from run_state import FILE, load_state, save_state
from tokenizer import EOS, encode, prompt_text, reply_text, train_tokenizer
from tokenizers import Tokenizer

# From which step on, how often each kind. Spelling gets most: its tokens are the rarest and its
# replies the shortest. Later on what is learned needs less, and what is not needs more; words are
# spelled first, then their letters are compared with one.
MIXTURES: Final[dict[int, dict[str, float]]] = {
    0: {
        "addition": 0.12,
        "subtraction": 0.14,
        "product": 0.14,
        "expression": 0.12,
        "decimals": 0.1,
        "spelling": 0.25,
        "word_problem": 0.07,
        "chat": 0.06,
    },
    1800: {
        "addition": 0.08,
        "subtraction": 0.18,
        "product": 0.1,
        "expression": 0.13,
        "decimals": 0.09,
        "spelling": 0.29,
        "word_problem": 0.08,
        "chat": 0.05,
    },
    2500: {
        "addition": 0.08,
        "subtraction": 0.17,
        "product": 0.1,
        "expression": 0.13,
        "decimals": 0.11,
        "letters": 0.26,
        "word_problem": 0.1,
        "chat": 0.05,
    },
    3400: {
        "addition": 0.03,
        "subtraction": 0.24,
        "product": 0.03,
        "expression": 0.06,
        "decimals": 0.13,
        "letters": 0.34,
        "word_problem": 0.06,
        "chat": 0.11,
    },
    4000: {
        "addition": 0.05,
        "subtraction": 0.13,
        "product": 0.05,
        "expression": 0.1,
        "decimals": 0.08,
        "letters": 0.2,
        "doubles": 0.22,
        "word_problem": 0.06,
        "chat": 0.11,
    },
    4200: {
        "addition": 0.06,
        "subtraction": 0.2,
        "product": 0.06,
        "expression": 0.12,
        "decimals": 0.12,
        "letters": 0.18,
        "doubles": 0.1,
        "word_problem": 0.07,
        "chat": 0.09,
    },
}
# From here on so many others are answered without the work for each one that is worked.
AT_ONCE_FROM: Final = 4200
AT_ONCE: Final = 1.2
# Questions alone are learned first, then those that follow others in a conversation.
CONVERSATIONS_FROM: Final = 500
LR_WARM_UP: Final = 40
# The batches are small, so what is left at the peak is mostly noise: the rate falls early.
RATES: Final = {
    720: 1.0,
    1840: 0.4,
    3400: 0.05,
    4000: 0.02,
    4001: 0.04,
    4200: 0.01,
    4201: 0.06,
}
LAST_RATE: Final = 0.01
LOG_EVERY: Final = 20
BIAS_RATE: Final = 0.01


def draw_batch(seed: int, step: int, size: int) -> tuple[list[Problem], list[str]]:
    """The problems of one step and their prompts; depends on nothing but seed and step."""
    rng = random.Random(f"{seed} {step}")
    mixture = MIXTURES[max(begin for begin in MIXTURES if begin <= step)]
    kinds = rng.choices(list(mixture), list(mixture.values()), k=size)
    problems = [draw(rng, kind) for kind in kinds]
    if step >= AT_ONCE_FROM:
        worked = [problem.kind for problem in problems if problem.is_worked]
        others = rng.choices(worked, k=round(AT_ONCE * len(worked)))
        problems += [draw(rng, kind).at_once() for kind in others]
    histories = [draw_history(rng) if step >= CONVERSATIONS_FROM else [] for _ in problems]
    pairs = zip(problems, histories, strict=True)
    return problems, [prompt_text(problem.prompt, history) for problem, history in pairs]


def guessed(tokenizer: Tokenizer, problem: Problem) -> range:
    """The places of the answer's tokens in a reply that gives it without the work."""
    if not problem.boxed or problem.is_worked:
        return range(0)
    before, answer, after = reply_text(problem).partition(f"{problem.answer}}}{EOS}")
    assert not after, "the answer is the end of the reply"
    first, last, whole = map(len, encode(tokenizer, [before, answer, before + answer]))
    assert first + last == whole
    return range(first, whole - len(encode(tokenizer, [f"}}{EOS}"])[0]))


def learning_rate(step: int, steps: int) -> float:
    """Factor of the peak: linear warm-up, flat, then linear from each of RATES to the next."""
    knots = [*RATES.items(), (steps, LAST_RATE)]
    if step < knots[0][0]:
        return min(1.0, (step + 1) / LR_WARM_UP)
    for (begin, high), (end, low) in pairwise(knots):
        if step < end:
            return high + (low - high) * (step - begin) / (end - begin)
    return LAST_RATE


class WarmUp:
    """Model, optimizers and place in the data; saved and loaded as a whole."""

    def __init__(self, seed: int, muon_lr: float, adam_lr: float, device: str = "cpu") -> None:
        torch.manual_seed(seed)
        self.seed = seed
        self.model = R1Nano(Config()).to(device)
        self.optimizer = MixedPrecision(
            self.model, lambda masters: muon_and_adam(masters, muon_lr, adam_lr)
        )
        self.step = 0

    def save(self, path: Path) -> None:
        """All that `load` needs to continue as if nothing had happened."""
        save_state(path, self.step, self.model, self.optimizer)

    def load(self, path: Path) -> None:
        """Continues where `save` was called."""
        self.step = load_state(path, self.model, self.optimizer)

    def begin_with(self, weights: R1Nano) -> None:
        """At AT_ONCE_FROM with trained weights, as export.py writes them, the optimizers anew."""
        self.model.load_state_dict(weights.state_dict())
        self.optimizer.restore({f"masters/{n}": p.detach() for n, p in weights.named_parameters()})
        self.step = AT_ONCE_FROM

    def train_step(
        self, tokenizer: Tokenizer, size: int, rows: int, factor: float
    ) -> tuple[float, int, dict[str, list[bool]]]:
        """One step on `size` problems, `rows` at a time.

        Returns the mean loss, the count of reply tokens, and which replies were right, by kind.
        """
        problems, texts = draw_batch(self.seed, self.step, size)
        prompts = encode(tokenizer, texts)
        replies = encode(tokenizer, [reply_text(problem) for problem in problems])
        unknown = [guessed(tokenizer, problem) for problem in problems]
        tokens = sum(map(len, replies)) - sum(map(len, unknown))
        right: defaultdict[str, list[bool]] = defaultdict(list)
        total = 0.0
        for part in make_rows(prompts, replies, rows, self.model.device, unknown):
            loss, correct = loss_and_correct(self.model, part)
            (loss / tokens).backward()  # type: ignore[no-untyped-call]
            total += loss.item()
            for i, good in zip(part.index, correct.tolist(), strict=True):
                right[problems[i].kind].append(good)
        self.optimizer.step(factor)
        self.model.balance(BIAS_RATE * factor)
        self.step += 1
        return total / tokens, tokens, dict(right)


def main() -> None:
    """Trains to the given step; leaves state.safetensors and tokenizer.json in the directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--from", type=Path, dest="begin", help="a model, trained so far")
    parser.add_argument("--steps", type=int, default=4200)
    parser.add_argument("--batch", type=int, default=48, help="problems a step")
    parser.add_argument("--rows", type=int, default=16, help="problems at once (GPU: the batch)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--save-every", type=int, default=100)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    run = WarmUp(arguments.seed, arguments.muon_lr, arguments.adam_lr, arguments.device)
    state = arguments.out / FILE
    if state.exists():
        run.load(state)
    elif arguments.begin is not None:
        run.begin_with(load_directory(arguments.begin, torch.float32)[0])
    began, tokens, losses = time.perf_counter(), 0, 0.0
    right: defaultdict[str, list[bool]] = defaultdict(list)
    while run.step < arguments.steps:
        factor = learning_rate(run.step, arguments.steps)
        loss, count, correct = run.train_step(tokenizer, arguments.batch, arguments.rows, factor)
        losses += loss
        tokens += count
        for kind, rows in correct.items():
            right[kind] += rows
        if run.step % LOG_EVERY == 0:
            seconds = time.perf_counter() - began
            shares = " ".join(f"{k}={sum(v) / len(v):.2f}" for k, v in sorted(right.items()))
            print(
                f"step {run.step} loss {losses / LOG_EVERY:.4f} {tokens / seconds:.0f} tokens/s "
                f"{seconds:.0f} s {shares}",
                flush=True,
            )
            began, tokens, losses = time.perf_counter(), 0, 0.0
            right.clear()
        if run.step % arguments.save_every == 0 or run.step == arguments.steps:
            run.save(state)


if __name__ == "__main__":
    main()
