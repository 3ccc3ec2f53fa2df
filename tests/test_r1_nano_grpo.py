"""GRPO on r1-nano: its arithmetic, its sampling and a round of learning, all without training."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "r1_nano"))

from grpo import (
    CLIP,
    CURVE,
    KL_WEIGHT,
    WARM_UP_STEPS,
    Experience,
    Grpo,
    group_advantages,
    groups_to_learn,
    learning_rate,
    policy_loss,
    shares,
)
from model import Config, R1Nano
from plot import draw, read_curve
from problems import Problem
from reward import Verdict
from run_state import FILE
from sampling import EOS_ID, generate
from tokenizer import train_tokenizer
from tokenizers import Tokenizer

RIGHT, WRONG = Verdict(True, True), Verdict(True, False)
# Five standard errors of a share of one half: the seed is fixed, so this fails always or never.
OUTPUTS = 4000
SHARE = 5 * 0.5 / OUTPUTS**0.5


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(per_kind=50)


@pytest.fixture
def model() -> R1Nano:
    torch.manual_seed(5)
    return R1Nano(Config(num_hidden_layers=2)).eval()


def test_group_advantages_are_the_paper_s() -> None:
    rewards = torch.tensor([[1.2, 0.2, 0.2, 0.0], [1.2, 1.2, 1.2, 1.2]])
    advantages = group_advantages(rewards)
    expected = (rewards[0] - rewards[0].mean()) / rewards[0].std()
    assert torch.allclose(advantages[0], expected, atol=1e-4)
    assert torch.equal(advantages[1], torch.zeros(4))


def test_a_group_of_equal_rewards_has_no_advantage_whatever_its_size() -> None:
    for group in range(2, 70):
        # The mean of so many rewards is not always the reward, in float32.
        assert torch.equal(group_advantages(torch.full((1, group), 1.2)), torch.zeros(1, group))


def test_policy_loss_clips_only_what_overshoots() -> None:
    old = torch.zeros(4)
    new = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, divergence, held_back = policy_loss(new, old, new.detach(), advantage)
    assert held_back.tolist() == [True, False, False, True]
    assert divergence.tolist() == [0, 0, 0, 0]
    assert loss[0].item() == pytest.approx(-(1 + CLIP))
    assert loss[3].item() == pytest.approx(1 - CLIP)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert new.grad is not None
    # Held back: no gradient. Otherwise -ratio * advantage.
    assert new.grad[[0, 3]].tolist() == [0, 0]
    assert torch.allclose(new.grad[1:3], torch.tensor([0.5, -0.5]).exp() * torch.tensor([1, -1]))


def test_divergence_is_the_unbiased_estimate_and_pulls_back() -> None:
    new = torch.tensor([-1.0], requires_grad=True)
    reference = torch.tensor([-2.0])
    loss, divergence, _ = policy_loss(new, new.detach(), reference, torch.zeros(1))
    quotient = torch.tensor(-1.0).exp()
    assert divergence.item() == pytest.approx((quotient + 1 - 1).item())
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert new.grad is not None
    # Minimizing lowers a probability that has risen above the reference's.
    assert new.grad.item() == pytest.approx(KL_WEIGHT * (1 - quotient.item()))


def first_two_tokens(model: R1Nano, prompt: list[int]) -> dict[tuple[int, int], float]:
    """The probability of each two tokens after a prompt, from the model's forward pass."""
    with torch.no_grad():
        first = model.logits(model(torch.tensor([prompt])))[0, -1].softmax(-1)
        likely = first.topk(4).indices.tolist()
        second = model.logits(model(torch.tensor([[*prompt, token] for token in likely])))[:, -1]
    return {
        (token, other): first[token].item() * share
        for token, row in zip(likely, second.softmax(-1), strict=True)
        for other, share in enumerate(row.tolist())
    }


def test_outputs_that_share_rows_are_sampled_as_if_alone(model: R1Nano) -> None:
    # Few tokens are likely, so that outputs part, but not all at once.
    model.lm_head.weight.data *= 6
    prompts = [[0, 17, 40, 5], [0, 99, 31, 8, 12, 60]]
    generator = torch.Generator().manual_seed(1)
    replies = generate(
        model, prompts, outputs=OUTPUTS, max_new_tokens=2, temperature=1.0, generator=generator
    )
    assert len(replies) == 2 * OUTPUTS
    for place, prompt in enumerate(prompts):
        found = Counter(map(tuple, replies[place * OUTPUTS : (place + 1) * OUTPUTS]))
        expected = first_two_tokens(model, prompt)
        likeliest = sorted(expected, key=expected.__getitem__, reverse=True)[:10]
        assert sum(expected[pair] > 0.01 for pair in likeliest) > 3, "they part"
        for pair in likeliest:
            pair_or_end = pair if pair[0] != EOS_ID else pair[:1]
            assert abs(found[pair_or_end] / OUTPUTS - expected[pair]) < SHARE


def test_greedy_outputs_of_a_prompt_are_all_the_same(model: R1Nano) -> None:
    prompts = [torch.randint(3, 512, (length,)).tolist() for length in (5, 20, 9)]
    one, three = (
        generate(
            model,
            prompts,
            outputs=outputs,
            max_new_tokens=9,
            temperature=0,
            generator=torch.Generator(),
        )
        for outputs in (1, 3)
    )
    assert three == [reply for reply in one for _ in range(3)]


def experiences(rewarded: dict[int, tuple[Verdict, float, int]]) -> list[Experience]:
    """Outputs of two tokens for one question: first token to (verdict, advantage, how often)."""
    return [
        Experience((0, 7, 9), (token, EOS_ID), verdict, advantage)
        for token, (verdict, advantage, count) in rewarded.items()
        for _ in range(count)
    ]


def test_groups_are_learned_from_where_they_show_what_is_wrong_each_output_once(
    model: R1Nano, tokenizer: Tokenizer
) -> None:
    even = [Experience((0, 8), (20, EOS_ID), RIGHT, 0.0)] * 4
    mostly_right = [
        Experience((0, 9), (20, EOS_ID), verdict, advantage)
        for verdict, advantage in [(RIGHT, 0.3)] * 9 + [(WRONG, -2.7)]
    ]
    uneven = experiences({30: (RIGHT, 0.5, 3), 31: (WRONG, -1.5, 1)})
    groups = groups_to_learn(even + mostly_right + uneven)
    assert groups == [Counter({uneven[0]: 3, uneven[3]: 1})]
    run = Grpo(model, tokenizer, 1e-3, 1)
    (batch,) = run.batches(groups, 16)
    assert batch.rows.inputs.shape[0] == 2
    # 1/sum_i |o_i| sum_i sum_t: a token of an output sampled three times has three shares.
    assert sorted(batch.weight.tolist()) == pytest.approx([0.125, 0.125, 0.375, 0.375])
    assert run.learn(even, 2, 16, 1.0) == (0, 0), "nothing to learn, and no step"


def test_what_the_outputs_of_a_group_share_has_no_gradient(
    model: R1Nano, tokenizer: Tokenizer
) -> None:
    run = Grpo(model, tokenizer, 1e-3, 1)
    shared = (40, 41, 42)
    outputs = [
        Experience((0, 7), (*shared, 30, EOS_ID), RIGHT, 0.5),
        Experience((0, 7), (*shared, 31, 32, 33, EOS_ID), WRONG, -0.5),
    ]
    (batch,) = run.batches(groups_to_learn(outputs), 16)
    log_pi = batch.log_old.clone().requires_grad_()
    loss, _, _ = policy_loss(log_pi, batch.log_old, batch.log_old, batch.advantage)
    (loss * batch.weight).sum().backward()  # type: ignore[no-untyped-call]
    assert log_pi.grad is not None
    first, second = log_pi.grad[:5], log_pi.grad[5:]
    assert torch.allclose(first[:3] + second[:3], torch.zeros(3))
    assert first[3] * second[3] < 0


def test_learning_makes_right_outputs_likelier(model: R1Nano, tokenizer: Tokenizer) -> None:
    run = Grpo(model, tokenizer, 1e-3, 1)
    bias = [router.clone() for name, router in run.policy.state_dict().items() if "bias" in name]

    def first_token() -> Tensor:
        with torch.no_grad():
            return run.policy.logits(run.policy(torch.tensor([[0, 7, 9]])))[0, -1].softmax(-1)

    before = first_token()
    for _ in range(3):
        run.learn(experiences({30: (RIGHT, 0.5, 3), 31: (WRONG, -1.5, 1)}), 1, 16, 1.0)
    after = first_token()
    assert after[30] > before[30]
    assert after[31] < before[31]
    moved = [router for name, router in run.policy.state_dict().items() if "bias" in name]
    assert all(map(torch.equal, bias, moved))


def test_the_second_update_of_a_round_is_measured_against_the_first_s_policy(
    model: R1Nano, tokenizer: Tokenizer
) -> None:
    run = Grpo(model, tokenizer, 0.05, 1)
    other = [
        Experience((0, 7, 8), each.reply, each.verdict, each.advantage)
        for each in experiences({30: (RIGHT, 0.5, 3), 31: (WRONG, -1.5, 1)})
    ]
    same = experiences({30: (RIGHT, 0.5, 3), 31: (WRONG, -1.5, 1)})
    assert run.learn(same, 1, 16, 1.0)[1] == 0, "rho is 1"
    assert run.learn(same + other, 2, 16, 1.0)[1] > 0, "such a step leaves the clip's range"


def test_sampled_outputs_are_judged_against_their_group(
    model: R1Nano, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(problem: Problem, reply: str) -> Verdict:
        assert problem.prompt
        return RIGHT if len(reply) % 2 else WRONG

    monkeypatch.setattr("grpo.judge", judge)
    monkeypatch.setattr("grpo.MAX_NEW_TOKENS", 3)
    run = Grpo(model, tokenizer, 1e-3, 1)
    sampled = run.sample(questions=3, group=5)
    assert sampled == run.sample(questions=3, group=5), "the seed and the round give them"
    for start in (0, 5, 10):
        group = sampled[start : start + 5]
        assert len({each.prompt for each in group}) == 1
        rewards = torch.tensor([[each.verdict.reward for each in group]])
        advantages = torch.tensor([each.advantage for each in group])
        assert torch.allclose(group_advantages(rewards)[0], advantages)
    run.step_number = 1
    assert sampled != run.sample(questions=3, group=5)


def test_a_resumed_round_is_the_round_that_never_stopped(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    torch.manual_seed(6)
    start = R1Nano(Config()).state_dict()

    def fresh() -> Grpo:
        model = R1Nano(Config())
        model.load_state_dict(start)
        return Grpo(model, tokenizer, 1e-3, 1)

    whole, resumed = fresh(), fresh()
    same = experiences({30: (RIGHT, 0.5, 3), 31: (WRONG, -1.5, 1)})
    whole.learn(same, 1, 16, 1.0)
    whole.step_number = 1
    whole.save(tmp_path / FILE)
    resumed.load(tmp_path / FILE)
    assert resumed.step_number == 1
    for run in (whole, resumed):
        run.learn(same, 1, 16, 0.5)
    states = [run.optimizer.state() | dict(run.policy.state_dict()) for run in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_learning_rate_warms_up_and_falls() -> None:
    factors = [learning_rate(step, 60) for step in range(60)]
    assert factors[0] == pytest.approx(1 / WARM_UP_STEPS)
    assert max(factors) == factors[WARM_UP_STEPS - 1] <= 1
    assert factors[WARM_UP_STEPS - 1 :] == sorted(factors[WARM_UP_STEPS - 1 :], reverse=True)
    assert factors[-1] == pytest.approx(0.115)


def test_the_curve_tells_what_a_round_sampled() -> None:
    outputs = experiences({30: (RIGHT, 0.5, 3), 31: (Verdict(False, False), -1.5, 1)})
    outputs += [Experience((0, 8), (20, 21, 22, EOS_ID), RIGHT, 0.0)] * 4
    assert shares(outputs) == pytest.approx([1.2 * 7 / 8, 7 / 8, 7 / 8, 4 / 8, (2 * 4 + 4 * 4) / 8])
    assert CURVE[2:7] == ("reward", "format", "answer", "contrast", "tokens")


def test_the_picture_has_what_the_curve_has(tmp_path: Path) -> None:
    path = tmp_path / "curve.csv"
    rows = [
        dict.fromkeys(CURVE, "") | {"step": "0", "held_out": "0.5"},
        dict.fromkeys(CURVE, "") | {"step": "4", "answer": "0.45", "tokens": "30"},
        dict.fromkeys(CURVE, "")
        | {"step": "8", "answer": "0.9", "tokens": "52.5", "held_out": "1.0"},
    ]
    lines = [",".join(CURVE), *(",".join(row.values()) for row in rows)]
    path.write_text("\n".join(lines), encoding="utf-8")
    picture = draw(read_curve(path))
    assert picture.count("<polyline") == 3
    assert picture.count("<circle") == 2, "the held-out accuracy's"
    # From 40 % to 100 %, and from 30 tokens to 60: the axes hold the lowest and the highest.
    assert [f">{tens}0%<" in picture for tens in (3, 4, 10)] == [False, True, True]
    assert [f">{length}<" in picture for length in (20, 30, 60, 70)] == [False, True, True, False]
