"""A mixture's experts and its router on the GPU: the reference's bits, wherever experts lie."""

import dataclasses

import pytest
import torch
from gpu_cases import (
    ROWS_PER_BLOCK,
    Gpu,
    Gpus,
    blocked,
    group_sums,
    i32,
    i64,
    layout_of,
    models,
    what_showed,
)
from gpu_model import Changes, ModelError
from kernel_cases import REFERENCE, assert_same_bits, random_tokens
from test_kernels_experts import RULES, Case, drawn
from torch import Tensor

from localr1.errors import KernelError
from localr1.kernels import gpu_launch, mixture
from localr1.kernels.api import GroupScore, PackedExpert, RouterRule, Routing, Scoring
from localr1.kernels.gpu_layout import (
    ExpertLayout,
    RouterArguments,
)
from localr1.qtypes import CARD_BITS

MOST_TOKENS = 5


def cases() -> list[tuple[Case, int]]:
    """Gate and up are of one width of codes here, and all of those that a card has."""
    few = [
        (dataclasses.replace(case, tokens=min(case.tokens, MOST_TOKENS)), seed)
        for case, seed in drawn(8)
    ]
    return [
        (case, seed)
        for case, seed in few
        if case.bits[0] == case.bits[1] and set(case.bits) <= set(CARD_BITS)
    ]


def outputs_of(
    gpu: Gpu,
    packed: list[PackedExpert],
    x: Tensor,
    chosen: Tensor,
    rows: int,
    absent: frozenset[int] = frozenset(),
    changes: Changes = (),
) -> Tensor:
    """[T, k, hidden] of the experts that are not absent, 7 elsewhere: both products on a GPU, from
    experts that lie anywhere. chosen: int64 [T, k], negative for none."""
    parts = [(expert.gate, expert.up, expert.down) for expert in packed]
    layout = ExpertLayout(*(layout_of(part, rows) for part in parts[0]))
    table = torch.zeros(len(packed), dtype=torch.int64)
    for index in set(chosen.flatten().tolist()) - absent - {-1}:
        slot = torch.cat([blocked(weight, rows) for weight in parts[index]])
        table[index] = gpu.address(gpu.upload(f"expert {index}", slot))
    slots = gpu.upload("table", table)
    numbers = gpu.upload("chosen", chosen.int())
    inner, pairs = parts[0][0].out_features, chosen.numel()
    hidden = parts[0][2].out_features
    q, scale = REFERENCE.quantize_activations(x)
    inputs = [gpu.upload("inputs", value) for value in (q, scale, group_sums(q))]
    gated = [
        gpu.upload("gated q", torch.zeros(pairs, inner, dtype=torch.int8)),
        gpu.upload("gated scale", torch.zeros(pairs, inner // 32)),
        gpu.upload("gated sum", torch.zeros(pairs, inner // 32, dtype=torch.int32)),
    ]
    out = torch.full((*chosen.shape, hidden), 7.0)
    outputs = gpu.upload("outputs", out)
    gpu.launch(
        gpu_launch.gate_up(layout, pairs),
        layout, slots, numbers, i32(chosen.shape[1]), *inputs, *gated, rows=rows,
        changes=changes,
    )  # fmt: skip
    gpu.launch(
        gpu_launch.down(layout, pairs),
        layout, slots, numbers, *gated, outputs, rows=rows, changes=changes,
    )  # fmt: skip
    return gpu.download(outputs, out)


def combined(gpu: Gpu, outputs: Tensor, weights: Tensor, residual: Tensor) -> Tensor:
    tokens, per_token, hidden = outputs.shape
    target = gpu.upload("residual", residual)
    gpu.launch(
        gpu_launch.combine_experts(hidden, tokens),
        gpu.upload("outputs", outputs), gpu.upload("weights", weights), i32(per_token),
        i64(hidden), target,
    )  # fmt: skip
    return gpu.download(target, residual)


def reference_outputs(packed: list[PackedExpert], x: Tensor, chosen: Tensor) -> Tensor:
    out = torch.full((*chosen.shape, x.shape[1]), 7.0)
    REFERENCE.expert_outputs(x, chosen, REFERENCE.prepare_experts(packed, len(packed)), out)
    return out


@pytest.mark.parametrize("rows", ROWS_PER_BLOCK)
def test_experts(rows: int, gpus: Gpus) -> None:
    for case, seed in cases():
        generator = torch.Generator().manual_seed(seed)
        packed, routing = case.packed(generator), case.routing(generator)
        x = random_tokens(case.tokens, case.hidden, generator)
        expected = reference_outputs(packed, x, routing.experts)
        for gpu in gpus():
            found = outputs_of(gpu, packed, x, routing.experts, rows)
            assert_same_bits(found, expected, (case, rows))


def test_experts_that_lie_elsewhere_are_left_alone(gpus: Gpus) -> None:
    """Part here, part elsewhere: the sum is that of all experts at one place."""
    case = Case(6, 3, 96, 64, 4, bits=(4, 4, 8))
    generator = torch.Generator().manual_seed(1)
    packed, routing = case.packed(generator), case.routing(generator)
    x = random_tokens(4, 96, generator)
    absent = frozenset({0, 4})
    chosen = routing.experts.clone()
    chosen[2, 1] = -1
    here = torch.tensor([[int(e) not in absent and e >= 0 for e in row] for row in chosen])
    all_outputs = reference_outputs(packed, x, routing.experts)
    expected = torch.ones_like(x)
    bank = REFERENCE.prepare_experts(packed, len(packed))
    REFERENCE.mix_experts(x, routing, bank, expected)
    for gpu in gpus():
        outputs = outputs_of(gpu, packed, x, chosen, 16, absent)
        assert (outputs[~here] == 7.0).all()
        assert_same_bits(outputs[here], all_outputs[here], "here")
        outputs[~here] = all_outputs[~here]
        found = combined(gpu, outputs, routing.weights, torch.ones_like(x))
        assert_same_bits(found, expected, "combined")


@pytest.mark.parametrize("rows", [16, 8])
def test_what_is_not_here_is_fetched(rows: int, gpus: Gpus) -> None:
    """And nothing else: outputs of experts that are here stay as they are."""
    generator = torch.Generator().manual_seed(5)
    chosen = torch.tensor([2, 0, -1, 3, 1], dtype=torch.int32)
    here = torch.tensor([True, False, False, True, False])
    outputs, elsewhere = torch.randn(2, 5, 300, generator=generator)
    for gpu in gpus():
        slot = gpu.address(gpu.upload("expert", torch.zeros(16, dtype=torch.uint8)))
        table = gpu.upload("table", torch.tensor([0, 0, slot, slot]))
        found = gpu.upload("outputs", outputs)
        gpu.launch(
            gpu_launch.fetch_outputs(300, 5),
            gpu.upload("elsewhere", elsewhere), table, gpu.upload("chosen", chosen), i64(300),
            found, rows=rows,
        )  # fmt: skip
        expected = torch.where(here[:, None], outputs, elsewhere)
        assert_same_bits(gpu.download(found, outputs), expected, rows)


def test_combine_follows_the_router(gpus: Gpus) -> None:
    generator = torch.Generator().manual_seed(2)
    for tokens, per_token, hidden in ((1, 1, 5), (3, 8, 300), (2, 6, 257)):
        outputs = torch.randn(tokens, per_token, hidden, generator=generator)
        weights = torch.randn(tokens, per_token, generator=generator)
        residual = torch.randn(tokens, hidden, generator=generator)
        expected = residual + mixture.combine(outputs.flatten(0, 1), weights)
        for gpu in gpus():
            assert_same_bits(combined(gpu, outputs, weights, residual), expected, per_token)


def routed(
    gpu: Gpu,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rule: RouterRule,
    changes: Changes = (),
) -> Routing:
    tokens = x.shape[0]
    logits = gpu.upload("logits", torch.zeros(tokens, rule.num_experts))
    weight_type = (torch.bfloat16, torch.float16, torch.float32).index(weight.dtype)
    gpu.launch(
        gpu_launch.route_logits(rule.num_experts, tokens),
        gpu.upload("x", x), gpu.upload("weight", weight), i32(weight_type), i32(x.shape[1]),
        i32(rule.num_experts), logits, changes=changes,
    )  # fmt: skip
    experts = torch.zeros(tokens, rule.experts_per_token, dtype=torch.int32)
    weights = torch.zeros(tokens, rule.experts_per_token)
    chosen, chosen_weights = gpu.upload("experts", experts), gpu.upload("weights", weights)
    gpu.launch(
        gpu_launch.route_choose(tokens),
        logits, None if bias is None else gpu.upload("bias", bias), RouterArguments.of(rule),
        chosen, chosen_weights, changes=changes,
    )  # fmt: skip
    found = gpu.download(chosen, experts).long()
    return Routing(found, gpu.download(chosen_weights, weights))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_route(rule: RouterRule, dtype: torch.dtype, gpus: Gpus) -> None:
    generator = torch.Generator().manual_seed(rule.num_experts)
    hidden = 100 if dtype == torch.float32 else 64
    x = torch.randn(3, hidden, generator=generator)
    weight = (torch.randn(rule.num_experts, hidden, generator=generator) * 0.2).to(dtype)
    for bias in (None, torch.randn(rule.num_experts, generator=generator)):
        expected = REFERENCE.route(x, weight.float(), bias, rule)
        for gpu in gpus():
            found = routed(gpu, x, weight, bias, rule)
            assert_same_bits(found.experts, expected.experts, rule)
            assert_same_bits(found.weights, expected.weights, rule)


def tied(rule: RouterRule) -> tuple[Tensor, Tensor, Tensor]:
    """Equal scores, scores of both zeros, and NaN in one token: x, weight and bias."""
    x = torch.zeros(3, 32)
    x[1, 0], x[2, 0] = 1.0, torch.nan
    weight = torch.zeros(rule.num_experts, 32)
    weight[3::4, 0] = -0.0
    weight[5::8, 0] = 2.0
    bias = torch.zeros(rule.num_experts)
    bias[1::2] = -0.0
    return x, weight, bias


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_equal_scores_and_nan(rule: RouterRule, gpus: Gpus) -> None:
    x, weight, bias = tied(rule)
    expected = REFERENCE.route(x, weight, bias, rule)
    for gpu in gpus():
        found = routed(gpu, x, weight, bias, rule)
        assert_same_bits(found.experts, expected.experts, rule)
        assert_same_bits(found.weights, expected.weights, rule)


def test_one_token_with_nan_in_one_score(gpus: Gpus) -> None:
    rule = RouterRule(16, 3, Scoring.SIGMOID, True, 4, 2, GroupScore.BEST_TWO, 1e-20, 2.5)
    generator = torch.Generator().manual_seed(5)
    x, weight = torch.randn(1, 40, generator=generator), torch.randn(16, 40, generator=generator)
    weight[9, 7] = torch.nan
    expected = REFERENCE.route(x, weight, None, rule)
    assert expected.experts[0, 0] == 9
    for gpu in gpus():
        assert_same_bits(routed(gpu, x, weight, None, rule).experts, expected.experts, "nan")


def test_a_rule_that_does_not_fit_is_refused() -> None:
    for rule in (
        RouterRule(2048, 8, Scoring.SIGMOID, True),
        RouterRule(64, 33, Scoring.SIGMOID, True),
        RouterRule(64, 2, Scoring.SIGMOID, True, 64, 2),
    ):
        with pytest.raises(KernelError, match=r"at most 1024 experts, 32 groups"):
            RouterArguments.of(rule)


def test_gate_and_up_of_two_widths_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    expert = Case(1, 1, 64, 32, 1, bits=(4, 8, 4)).packed(generator)[0]
    parts = (expert.gate, expert.up, expert.down)
    layout = ExpertLayout(*(layout_of(part, 16) for part in parts))
    with pytest.raises(KernelError, match=r"up like gate: int4 \[32, 64\], found int8 \[32, 64\]"):
        gpu_launch.gate_up(layout, 1)


PLANTED_IN_EXPERTS = {
    "missing barrier": (
        "store_phase(phases + part * kTokenStride, place, acc[0]);\n  __syncthreads();",
        "store_phase(phases + part * kTokenStride, place, acc[0]);",
    ),
    "gate for up": ("data : data + up_offset(e)", "data : data"),
    "wrong token": ("token = pair / per_token", "token = pair % per_token"),
    "a row past the end": ("|| row >= e.down.rows) return;", ") return;"),
    "an expert that is not there": ("if (!data) return;", "if (blockIdx.x > 9999) return;"),
}


@pytest.mark.parametrize("name", PLANTED_IN_EXPERTS)
def test_an_error_planted_in_the_experts_is_caught(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    case = Case(5, 2, 160, 64, 3)
    packed, routing = case.packed(generator), case.routing(generator)
    # 40 outputs: the last unit of rows is not full.
    narrow = [
        dataclasses.replace(
            expert,
            down=dataclasses.replace(
                expert.down,
                packed=expert.down.packed[:40],
                scale=expert.down.scale[:40],
                out_features=40,
            ),
        )
        for expert in packed
    ]
    x = random_tokens(3, 160, generator)
    gone = int(routing.experts[0, 0])  # not the last pair's, behind which nothing may be written
    assert gone != routing.experts[-1, -1]
    absent = frozenset({gone})
    whole = reference_outputs(packed, x, routing.experts)[..., :40]
    here = routing.experts != gone
    changes = (PLANTED_IN_EXPERTS[name],)
    caught = what_showed(
        lambda gpu: outputs_of(gpu, narrow, x, routing.experts, 16, absent, changes)[here],
        whole[here],
    )
    assert caught, name
    if "past" in name or "not there" in name:
        assert any("outside" in line or "written" in line for line in caught), caught


PLANTED_IN_THE_ROUTER = {
    "missing barrier": ("  __syncwarp();\n", ""),
    "the higher of equals": ("a.index < b.index;", "a.index > b.index;"),
    "a weight with its bias": ("const float score = scores[", "const float score = judged["),
    "groups of another size": ("(kept >> i / size & 1u)", "(kept >> i % rule.groups & 1u)"),
    "an expert past the end": ("i < rule.experts; i += kWarp, ++", "i < 65; i += kWarp, ++"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED_IN_THE_ROUTER)
def test_an_error_planted_in_the_router_is_caught(name: str) -> None:
    """The planted barrier is of a warp: lanes that run one after the other show it."""
    grouped = RouterRule(64, 6, Scoring.SIGMOID, True, 8, 3, GroupScore.BEST_TWO, 1e-20, 2.5)
    whole = RouterRule(64, 6, Scoring.SOFTMAX, False)
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(64, 96, generator=generator) * 0.2
    random = torch.randn(2, 96, generator=generator), weight, torch.randn(64, generator=generator)
    caught = 0
    both = ((rule, *data) for rule in (grouped, whole) for data in (random, tied(rule)))
    for rule, x, w, bias in both:
        expected = REFERENCE.route(x, w, bias, rule)
        for gpu in models():
            try:
                found = routed(gpu, x, w, bias, rule, (PLANTED_IN_THE_ROUTER[name],))
            except ModelError:
                caught += 1
            else:
                caught += not torch.equal(found.experts, expected.experts)
                caught += not torch.allclose(found.weights, expected.weights, equal_nan=True)
    assert caught, name
