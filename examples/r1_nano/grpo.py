"""Group Relative Policy Optimization on r1-nano, to be read beside the papers.

[M] DeepSeekMath, arXiv 2402.03300, section 4.1; [R] DeepSeek-R1, arXiv 2501.12948, section 2.2.

    python examples/r1_nano/grpo.py --warm-up DIR --out DIR --steps 60

For each question q the old policy samples a group of G outputs o_1..o_G; a rule gives each its
reward r_i ([R] 2.2.2: format and accuracy, no learned judge); the group itself is the baseline, so
there is no critic. The objective, [M] equation 3 and [R] equation 1, to be maximized:

    J = E[ 1/G sum_i 1/|o_i| sum_t ( min(rho A, clip(rho, 1 - eps, 1 + eps) A) - beta D_KL ) ]

    rho  = pi(o_t | q, o_<t) / pi_old(o_t | q, o_<t)          the probability ratio
    A    = (r_i - mean(r)) / std(r)                           the advantage, [R] equation 3
    D_KL = pi_ref/pi - log(pi_ref/pi) - 1                     its estimate, [M] equation 4

pi_ref is the warm-up policy, frozen.
"""

import argparse
import copy
import csv
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812
from batches import IGNORED, Rows, make_rows, reply_logits
from evaluate import evaluate, read_list
from model import Config, R1Nano
from optimizer import MixedPrecision
from problems import draw, draw_history
from reward import Verdict, judge
from run_state import FILE, load_model, load_state, save_state
from sampling import generate
from tokenizer import encode, prompt_text
from tokenizers import Tokenizer
from torch import Tensor

CLIP: Final = 0.2  # eps
KL_WEIGHT: Final = 0.02  # beta
MAX_NEW_TOKENS: Final = 192
WARM_UP_STEPS: Final = 4
# By what the warm-up left to learn: a group whose outputs are all right teaches nothing.
MIXTURE: Final[dict[str, float]] = {
    "addition": 0.01,
    "subtraction": 0.28,
    "product": 0.02,
    "expression": 0.03,
    "decimals": 0.17,
    "letters": 0.36,
    "word_problem": 0.04,
    "chat": 0.09,
}
CURVE: Final = (
    "step",
    "seconds",
    "reward",
    "format",
    "answer",
    "length",
    "kl",
    "clipped",
    "held_out",
)


@dataclass(frozen=True)
class Experience:
    """One sampled output: its token ids, verdict and advantage."""

    prompt: list[int]
    reply: list[int]
    verdict: Verdict
    advantage: float


def group_advantages(rewards: Tensor) -> Tensor:
    """Advantages of rewards [questions, group], [R] equation 3: A_i = (r_i - mean(r)) / std(r).

    A group whose outputs are all equally good teaches nothing: its advantages are zero.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + 1e-6)


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


class Grpo:
    """Policy, frozen reference and optimizer; `step` is one round of sampling and learning."""

    def __init__(
        self,
        warm_up: dict[str, Tensor],
        tokenizer: Tokenizer,
        lr: float,
        seed: int,
        device: str = "cpu",
    ) -> None:
        self.policy = R1Nano(Config())
        self.policy.load_state_dict(warm_up)
        self.policy.to(device)
        self.reference = copy.deepcopy(self.policy).to_bfloat16().eval()
        self.tokenizer, self.seed, self.step_number = tokenizer, seed, 0
        self.optimizer = MixedPrecision(
            self.policy,
            lambda masters: [
                torch.optim.AdamW(masters.values(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
            ],
        )

    def sample(self, questions: int, group: int) -> list[Experience]:
        """G outputs of the old policy for each question, judged against their group."""
        rng = random.Random(f"grpo {self.seed} {self.step_number}")
        kinds = rng.choices(list(MIXTURE), list(MIXTURE.values()), k=questions)
        problems = [draw(rng, kind) for kind in kinds]
        texts = [prompt_text(problem.prompt, draw_history(rng)) for problem in problems]
        repeated = [problem for problem in problems for _ in range(group)]
        prompts = encode(self.tokenizer, [text for text in texts for _ in range(group)])
        generator = torch.Generator(self.policy.device)
        generator.manual_seed(self.seed * 100_003 + self.step_number)
        replies = generate(
            self.policy,
            prompts,
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=1.0,
            generator=generator,
        )
        outputs = self.tokenizer.decode_batch(replies, skip_special_tokens=False)
        verdicts = [judge(problem, text) for problem, text in zip(repeated, outputs, strict=True)]
        rewards = torch.tensor([verdict.reward for verdict in verdicts]).view(questions, group)
        advantages = group_advantages(rewards).flatten().tolist()
        return [
            Experience(*parts) for parts in zip(prompts, replies, verdicts, advantages, strict=True)
        ]

    def learn(self, experiences: list[Experience], updates: int, size: int) -> tuple[float, float]:
        """`updates` optimizer steps on one round of samples; mean D_KL and share of clipped tokens.

        The first update has rho = 1 everywhere; the clip matters from the second on. Outputs go
        through the model `size` at a time. Groups without contrast are left out, their share of
        the KL term with them.
        """
        informative = [experience for experience in experiences if experience.advantage != 0]
        if not informative:
            return 0.0, 0.0
        batches = make_rows(
            [experience.prompt for experience in informative],
            [experience.reply for experience in informative],
            size,
            self.policy.device,
        )
        with torch.no_grad():
            old = [token_log_probabilities(self.policy, rows) for rows in batches]
            reference = [token_log_probabilities(self.reference, rows) for rows in batches]
        divergence_sum = clipped_sum = tokens = 0.0
        self.policy.train()
        for _ in range(updates):
            for rows, log_old, log_reference in zip(batches, old, reference, strict=True):
                lengths = (rows.targets != IGNORED).sum(-1)  # |o_i|
                advantage = lengths.new_tensor(
                    [informative[i].advantage for i in rows.index], dtype=torch.float32
                )
                log_pi = token_log_probabilities(self.policy, rows)
                loss, divergence, held_back = policy_loss(
                    log_pi, log_old, log_reference, advantage.repeat_interleave(lengths)
                )
                # 1/G sum_i 1/|o_i| sum_t, over all groups of the round.
                weight = (1.0 / lengths).repeat_interleave(lengths) / len(experiences)
                (loss * weight).sum().backward()  # type: ignore[no-untyped-call]
                divergence_sum += divergence.sum().item()
                clipped_sum += held_back.sum().item()
                tokens += len(log_pi)
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
            # The first steps are small: Adam's moments are not known yet.
            self.optimizer.step(min(1.0, (self.step_number + 1) / WARM_UP_STEPS))
        # The routers' bias stays as the warm-up left it: rho compares the same choice of experts.
        self.policy.balance(0.0)
        return divergence_sum / tokens, clipped_sum / tokens

    def save(self, path: Path) -> None:
        """Policy, optimizer and place in the data; the reference is the warm-up's file."""
        save_state(path, self.step_number, self.policy, self.optimizer)

    def load(self, path: Path) -> None:
        """Continues where `save` was called."""
        self.step_number = load_state(path, self.policy, self.optimizer)


def held_out_accuracy(run: Grpo) -> float:
    """Greedy accuracy on the whole held-out list."""
    problems = read_list()
    right, _ = evaluate(run.policy, run.tokenizer, problems)
    return right.total() / len(problems)


def main() -> None:
    """Runs GRPO from a warm-up; resumes from the output directory if it has a state."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--warm-up", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--group", type=int, default=8, help="G, outputs per question")
    parser.add_argument("--updates", type=int, default=2, help="optimizer steps per round")
    parser.add_argument("--rows", type=int, default=16, help="outputs at once (more on a GPU)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--evaluate-every", type=int, default=10)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(arguments.warm_up / "tokenizer.json"))
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    warm_up = load_model(arguments.warm_up / FILE)
    run = Grpo(warm_up, tokenizer, arguments.lr, arguments.seed, arguments.device)
    state = arguments.out / FILE
    curve = arguments.out / "curve.csv"
    if state.exists():
        run.load(state)
    else:
        with curve.open("w", newline="", encoding="utf-8") as file:
            accuracy = held_out_accuracy(run)
            csv.writer(file).writerows([CURVE, (0, *[""] * 7, f"{accuracy:.4f}")])
            print(f"step 0 held-out {accuracy:.1%}", flush=True)
    while run.step_number < arguments.steps:
        began = time.perf_counter()
        torch.manual_seed(arguments.seed + run.step_number)
        experiences = run.sample(arguments.questions, arguments.group)
        divergence, clipped = run.learn(experiences, arguments.updates, arguments.rows)
        run.step_number += 1
        verdicts = [experience.verdict for experience in experiences]
        means = [
            sum(values) / len(experiences)
            for values in (
                [verdict.reward for verdict in verdicts],
                [verdict.well_formed for verdict in verdicts],
                [verdict.right for verdict in verdicts],
                [len(experience.reply) for experience in experiences],
            )
        ]
        measured = run.step_number % arguments.evaluate_every == 0
        accuracy_text = f"{held_out_accuracy(run):.4f}" if measured else ""
        row = [*(f"{value:.4f}" for value in (*means, divergence, clipped)), accuracy_text]
        seconds = f"{time.perf_counter() - began:.1f}"
        with curve.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([run.step_number, seconds, *row])
        print(" ".join(f"{n} {v}" for n, v in zip(CURVE[2:], row, strict=True)), flush=True)
        run.save(state)


if __name__ == "__main__":
    main()
