"""Group Relative Policy Optimization on r1-nano, to be read beside the papers.

[M] DeepSeekMath, arXiv 2402.03300, section 4.1; [R] DeepSeek-R1, arXiv 2501.12948, section 2.2;
[D] DAPO, arXiv 2503.14476, sections 3.2 and 3.3.

    python examples/r1_nano/grpo.py --warm-up MODEL_DIR --out DIR

For each question q the old policy samples a group of G outputs o_1..o_G; a rule gives each its
reward r_i ([R] 2.2.2: format and accuracy, no learned judge); the group itself is the baseline, so
there is no critic. The objective, [M] equation 3 and [R] equation 1, to be maximized, with the
tokens of all outputs in one mean as in [D] 3.3:

    J = E[ 1/sum_i |o_i| sum_i sum_t ( min(rho A, clip(rho, 1 - eps, 1 + eps) A) - beta D_KL ) ]

    rho  = pi(o_t | q, o_<t) / pi_old(o_t | q, o_<t)          the probability ratio
    A    = (r_i - mean(r)) / std(r)                           the advantage, [R] equation 3
    D_KL = pi_ref/pi - log(pi_ref/pi) - 1                     its estimate, [M] equation 4

pi_ref is the warm-up policy, frozen. What differs from [M], for a model this small:

- Groups without contrast, all right or all wrong, are left out ([D] 3.2, dynamic sampling), and so
  are those that are mostly right: they are most of the rest, and what is wrong in them is usually a
  slip of sampling that the likeliest tokens do not make.
- Outputs of a group begin alike, and their advantages sum to zero. With one mean over tokens the
  gradient of what they share is therefore exactly zero; with a mean per output, [M]'s 1/|o_i|, it
  is noise wherever the lengths differ.
- Adam's epsilon is above the gradients of a round in which little is wrong, so that a step is then
  about proportional to their mean. With the usual 1e-8 every weight moves by about the learning
  rate in whatever direction chance gives it, and what the round did not ask for is forgotten.

docs/r1-nano.md says what came of it.
"""

import argparse
import copy
import csv
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812
from batches import IGNORED, Rows, make_rows, reply_logits
from evaluate import development_list, evaluate, read_list
from export import load_directory
from model import R1Nano
from optimizer import MixedPrecision
from problems import Problem, draw
from reward import Verdict, judge
from run_state import FILE, load_state, save_state
from sampling import generate
from tokenizer import encode, prompt_text
from tokenizers import Tokenizer
from torch import Tensor

CLIP: Final = 0.2  # eps
KL_WEIGHT: Final = 0.001  # beta, [R] 2.3
MAX_NEW_TOKENS: Final = 192
MOST_RIGHT: Final = 0.85  # groups above this share of right outputs are left out
ADAM_EPSILON: Final = 1e-4  # the root mean square of a late round's gradients is about 3e-5
WARM_UP_STEPS: Final = 4
LAST_RATE: Final = 0.1
# By what is hard to do with care: a group whose outputs are all right teaches nothing.
MIXTURE: Final[dict[str, float]] = {
    "addition": 0.08,
    "subtraction": 0.2,
    "product": 0.08,
    "expression": 0.12,
    "decimals": 0.15,
    "letters": 0.17,
    "word_problem": 0.1,
    "chat": 0.1,
}
CURVE: Final = (
    "step",
    "seconds",
    "reward",
    "format",
    "answer",
    "contrast",
    "tokens",
    "kl",
    "clipped",
    "development",
    "held_out",
)


@dataclass(frozen=True)
class Experience:
    """One sampled output: its token ids, verdict and advantage. Equal ones are the same output."""

    prompt: tuple[int, ...]
    reply: tuple[int, ...]
    verdict: Verdict
    advantage: float


@dataclass(frozen=True)
class Batch:
    """Different outputs that go through the model together; all but the rows [tokens]: of each
    token its output's advantage, its weight in the sums of J, and what is fixed of a round."""

    rows: Rows
    advantage: Tensor
    weight: Tensor
    log_old: Tensor
    log_reference: Tensor


def group_advantages(rewards: Tensor) -> Tensor:
    """Advantages of rewards [questions, group], [R] equation 3: A_i = (r_i - mean(r)) / std(r).

    A group whose outputs are all equally good teaches nothing: its advantages are zero, exactly,
    while its mean may be rounded.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    contrast = rewards.amax(dim=1, keepdim=True) > rewards.amin(dim=1, keepdim=True)
    return torch.where(contrast, centred / (rewards.std(dim=1, keepdim=True) + 1e-6), 0.0)


def policy_loss(
    log_pi: Tensor, log_old: Tensor, log_reference: Tensor, advantage: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Per token: what is minimized (-J inside the sums), D_KL, and whether the clip holds it back.

    All arguments [tokens]; the advantage of an output is that of each of its tokens ([M] 4.1.2).
    """
    ratio = (log_pi - log_old).exp()  # rho
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    log_quotient = log_reference - log_pi
    divergence = log_quotient.exp() - log_quotient - 1  # [M] equation 4, never negative
    held_back = surrogate < ratio * advantage
    return KL_WEIGHT * divergence - surrogate, divergence, held_back


def token_log_probabilities(model: R1Nano, rows: Rows) -> Tensor:
    """log pi(o_t | q, o_<t) of every reply token [tokens], row after row."""
    logits, targets = reply_logits(model, rows)
    return -F.cross_entropy(logits, targets, reduction="none")


def groups_to_learn(experiences: Iterable[Experience]) -> list[Counter[Experience]]:
    """Of each question whose outputs differ in reward and are not mostly right, the different
    outputs and how often each was sampled: most of a group's are alike, token by token."""
    groups: defaultdict[tuple[int, ...], Counter[Experience]] = defaultdict(Counter)
    for experience in experiences:
        if experience.advantage != 0:
            groups[experience.prompt][experience] += 1
    return [
        group
        for group in groups.values()
        if sum(count for output, count in group.items() if output.verdict.right)
        <= MOST_RIGHT * group.total()
    ]


def learning_rate(step: int, steps: int) -> float:
    """Factor of the peak: a few small steps while Adam's moments are unknown, and a linear fall."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * (1 - (1 - LAST_RATE) * step / steps)


class Grpo:
    """Policy, frozen reference and optimizer: rounds of sampling and learning."""

    def __init__(self, warm_up: R1Nano, tokenizer: Tokenizer, lr: float, seed: int) -> None:
        self.policy = warm_up
        self.reference = copy.deepcopy(warm_up).to_bfloat16().eval()
        self.tokenizer, self.seed, self.step_number = tokenizer, seed, 0
        self.optimizer = MixedPrecision(
            self.policy,
            lambda masters: [
                torch.optim.AdamW(
                    masters.values(),
                    lr=lr,
                    betas=(0.9, 0.95),
                    eps=ADAM_EPSILON,
                    weight_decay=0.0,
                )
            ],
        )

    def sample(self, questions: int, group: int) -> list[Experience]:
        """G outputs of the old policy for each question, judged against their group."""
        rng = random.Random(f"grpo {self.seed} {self.step_number}")
        kinds = rng.choices(list(MIXTURE), list(MIXTURE.values()), k=questions)
        problems = [draw(rng, kind) for kind in kinds]
        prompts = encode(self.tokenizer, [prompt_text(problem.prompt) for problem in problems])
        generator = torch.Generator(self.policy.device)
        generator.manual_seed(self.seed * 100_003 + self.step_number)
        replies = generate(
            self.policy,
            prompts,
            outputs=group,
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=1.0,
            generator=generator,
        )
        outputs = self.tokenizer.decode_batch(replies, skip_special_tokens=False)
        asked = [place for place in range(questions) for _ in range(group)]
        verdicts = [judge(problems[i], text) for i, text in zip(asked, outputs, strict=True)]
        rewards = torch.tensor([verdict.reward for verdict in verdicts]).view(questions, group)
        advantages = group_advantages(rewards).flatten().tolist()
        return [
            Experience(tuple(prompts[i]), tuple(reply), verdict, advantage)
            for i, reply, verdict, advantage in zip(
                asked, replies, verdicts, advantages, strict=True
            )
        ]

    @torch.no_grad()
    def batches(self, groups: Iterable[Counter[Experience]], size: int) -> list[Batch]:
        """The outputs of some groups, each different one once, `size` at a time."""
        counts: Counter[Experience] = Counter()
        for group in groups:
            counts.update(group)
        outputs = list(counts)
        tokens = sum(len(output.reply) * count for output, count in counts.items())
        batches = []
        for rows in make_rows(
            [output.prompt for output in outputs],
            [output.reply for output in outputs],
            size,
            self.policy.device,
        ):
            lengths = (rows.targets != IGNORED).sum(-1)  # |o_i|
            advantage, weight = (
                torch.tensor(values, device=lengths.device).repeat_interleave(lengths)
                for values in (
                    [outputs[i].advantage for i in rows.index],
                    [counts[outputs[i]] / tokens for i in rows.index],
                )
            )
            batches.append(
                Batch(
                    rows,
                    advantage,
                    weight,
                    token_log_probabilities(self.policy, rows),
                    token_log_probabilities(self.reference, rows),
                )
            )
        return batches

    def learn(
        self, experiences: Iterable[Experience], updates: int, size: int, factor: float
    ) -> tuple[float, float]:
        """An optimizer step on each of `updates` parts of a round, at `factor` of the learning
        rate; mean D_KL and share of clipped tokens.

        pi_old is the policy of the whole round, so rho is 1 everywhere in the first step, and the
        clip matters from the second on.
        """
        groups = groups_to_learn(experiences)
        parts = [self.batches(groups[part::updates], size) for part in range(updates)]
        divergence_sum = clipped_sum = tokens = 0.0
        self.policy.train()
        for part in filter(None, parts):
            for batch in part:
                log_pi = token_log_probabilities(self.policy, batch.rows)
                loss, divergence, held_back = policy_loss(
                    log_pi, batch.log_old, batch.log_reference, batch.advantage
                )
                (loss * batch.weight).sum().backward()  # type: ignore[no-untyped-call]
                divergence_sum += divergence.sum().item()
                clipped_sum += held_back.sum().item()
                tokens += len(log_pi)
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
            self.optimizer.step(factor)
        # The routers' bias stays as the warm-up left it: rho compares the same choice of experts.
        self.policy.balance(0.0)
        return divergence_sum / max(tokens, 1), clipped_sum / max(tokens, 1)

    def accuracy(self, problems: Sequence[Problem]) -> float:
        """Share of right answers, greedy."""
        right, _ = evaluate(self.policy, self.tokenizer, problems)
        return right.total() / len(problems)

    def save(self, path: Path) -> None:
        """Policy, optimizer and place in the data; the reference is the warm-up's file."""
        save_state(path, self.step_number, self.policy, self.optimizer)

    def load(self, path: Path) -> None:
        """Continues where `save` was called."""
        self.step_number = load_state(path, self.policy, self.optimizer)


def shares(experiences: Sequence[Experience]) -> list[float]:
    """The columns of the curve that a round's samples give: means over the outputs, the share of
    them that stand in a group with contrast, and their mean length."""
    columns = zip(
        *(
            (
                each.verdict.reward,
                each.verdict.well_formed,
                each.verdict.right,
                each.advantage != 0,
                len(each.reply),
            )
            for each in experiences
        ),
        strict=True,
    )
    return [sum(column) / len(experiences) for column in columns]


def main() -> None:
    """Runs GRPO from a warm-up; resumes from the output directory if it has a state."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--warm-up", type=Path, required=True, help="a model as export.py writes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60, help="rounds")
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--group", type=int, default=16, help="G, outputs per question")
    parser.add_argument("--updates", type=int, default=2, help="optimizer steps per round")
    parser.add_argument("--rows", type=int, default=16, help="outputs at once (more on a GPU)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--develop-every", type=int, default=10, help="rounds; development list")
    parser.add_argument("--held-out-every", type=int, default=10, help="rounds; held-out list")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    warm_up, tokenizer = load_directory(arguments.warm_up, torch.float32)
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    run = Grpo(warm_up.to(arguments.device), tokenizer, arguments.lr, arguments.seed)
    state = arguments.out / FILE
    curve = arguments.out / "curve.csv"
    measured = (
        (development_list(), arguments.develop_every),
        (read_list(), arguments.held_out_every),
    )

    def accuracies() -> list[str]:
        return [
            f"{run.accuracy(problems):.4f}" if run.step_number % every == 0 else ""
            for problems, every in measured
        ]

    def write(row: Sequence[object]) -> None:
        with curve.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(row)
        print(" ".join(f"{n} {v}" for n, v in zip(CURVE, row, strict=True)), flush=True)

    if state.exists():
        run.load(state)
    else:
        curve.write_text(",".join(CURVE) + "\n", encoding="utf-8")
        write([0, *[""] * (len(CURVE) - 3), *accuracies()])
    while run.step_number < arguments.steps:
        began = time.perf_counter()
        experiences = run.sample(arguments.questions, arguments.group)
        factor = learning_rate(run.step_number, arguments.steps)
        learned = run.learn(experiences, arguments.updates, arguments.rows, factor)
        run.step_number += 1
        values = (f"{value:.4f}" for value in (*shares(experiences), *learned))
        seconds = f"{time.perf_counter() - began:.1f}"
        write([run.step_number, seconds, *values, *accuracies()])
        run.save(state)


if __name__ == "__main__":
    main()
