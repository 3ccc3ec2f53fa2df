"""A mixture's experts and its router: native equals reference bit for bit, in one call."""

import dataclasses
import random
from collections.abc import Iterator

import pytest
import torch
from kernel_cases import (
    ISAS,
    REFERENCE,
    THREADS,
    Sentinels,
    Shape,
    assert_same_bits,
    native,
    random_packed,
    random_tokens,
)
from torch import Tensor

from localr1.errors import KernelError
from localr1.kernels import _native, mixture
from localr1.kernels.api import (
    ExpertBank,
    GroupScore,
    Kernels,
    PackedExpert,
    RouterRule,
    Routing,
    Scoring,
)
from localr1.qtypes import Codes


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer: bits and group of gate, up and down; zero: with zero points. codes: of what has 4
    bits."""

    experts: int
    per_token: int
    hidden: int
    inner: int
    tokens: int
    bits: tuple[int, int, int] = (4, 4, 4)
    group: int = 32
    zero: bool = False
    dtype: torch.dtype = torch.bfloat16
    codes: Codes = Codes.INTEGERS

    def packed(self, generator: torch.Generator) -> list[PackedExpert]:
        shapes = [(self.inner, self.hidden)] * 2 + [(self.hidden, self.inner)]
        return [
            PackedExpert(
                *(
                    random_packed(self._shape(*shape, bits), generator)
                    for shape, bits in zip(shapes, self.bits, strict=True)
                )
            )
            for _ in range(self.experts)
        ]

    def _shape(self, rows: int, columns: int, bits: int) -> Shape:
        codes = self.codes if bits == 4 else Codes.INTEGERS
        return Shape(rows, columns, bits, self.group, self.dtype, self.zero, codes=codes)

    def routing(self, generator: torch.Generator) -> Routing:
        """Experts of a token differ; the later ones are chosen more rarely, the last ones never."""
        bias = torch.linspace(2.0, 0.0, self.experts)
        scores = torch.rand(self.tokens, self.experts, generator=generator) + bias
        weights = torch.randn(self.tokens, self.per_token, generator=generator)
        return Routing(scores.topk(self.per_token).indices.contiguous(), weights)


# Chosen: one token; one expert; every expert; 17 and 31 tokens of one expert around tiles, and 70
# around a task; odd numbers of groups of 32, so that the last tasks are smaller.
FIXED = (
    Case(8, 2, 64, 32, 1),
    Case(1, 1, 32, 32, 1),
    Case(1, 1, 96, 160, 70),
    Case(4, 4, 64, 96, 1),
    Case(4, 4, 64, 96, 17),
    Case(2, 1, 32, 224, 31),
    Case(16, 3, 288, 96, 40, bits=(4, 4, 8)),
    Case(16, 6, 256, 128, 1, bits=(8, 8, 8), group=128),
    Case(16, 4, 288, 96, 9, bits=(6, 6, 6)),
    Case(8, 2, 256, 128, 3, bits=(5, 5, 6), group=64),
    Case(6, 2, 128, 64, 33, group=64, zero=True, dtype=torch.float16),
    Case(6, 2, 128, 192, 2, bits=(8, 4, 4), group=64, zero=True, dtype=torch.float32),
    Case(16, 3, 256, 128, 1, group=64, dtype=torch.float32, codes=Codes.NF4),
    Case(16, 3, 256, 128, 40, bits=(4, 4, 8), group=64, codes=Codes.NF4),
    Case(40, 8, 64, 64, 200),
)


def drawn(count: int) -> Iterator[tuple[Case, int]]:
    rng = random.Random(0)
    for seed in range(len(FIXED) + count):
        if seed < len(FIXED):
            yield FIXED[seed], seed
            continue
        experts, group = rng.randint(1, 20), rng.choice((32, 64, 128))
        yield (
            Case(
                experts,
                rng.randint(1, min(experts, 8)),
                group * rng.randint(1, 4),
                group * rng.randint(1, 3),
                rng.choice((1, 1, 2, 5, 16, 50)),
                (rng.choice((4, 8)), rng.choice((4, 8)), rng.choice((4, 8))),
                group,
                rng.random() < 0.3,
                rng.choice((torch.bfloat16, torch.float16, torch.float32)),
            ),
            seed,
        )


def mixed(kernels: Kernels, packed: list[PackedExpert], x: Tensor, routing: Routing) -> Tensor:
    sentinels = Sentinels()
    residual = sentinels.around(torch.ones_like(x))
    kernels.mix_experts(x, routing, kernels.prepare_experts(iter(packed), len(packed)), residual)
    sentinels.check("residual")
    return residual


def test_experts() -> None:
    for case, seed in drawn(16):
        generator = torch.Generator().manual_seed(seed)
        packed, routing = case.packed(generator), case.routing(generator)
        x = random_tokens(case.tokens, case.hidden, generator)
        expected = mixed(REFERENCE, packed, x, routing)
        for isa in ISAS:
            bank = native(isa, 2).prepare_experts(packed, len(packed))
            for threads in THREADS:
                sentinels = Sentinels()
                residual = sentinels.around(torch.ones_like(x))
                native(isa, threads).mix_experts(x, routing, bank, residual)
                assert_same_bits(residual, expected, (isa, threads, case))
                sentinels.check((isa, threads, case))


def in_parts(
    kernels: Kernels, bank: ExpertBank, x: Tensor, routing: Routing, parts: Tensor
) -> Tensor:
    """Each expert in one of three calls, by parts [experts]; then the sum of all."""
    sentinels = Sentinels()
    outputs = sentinels.around(torch.full((*routing.experts.shape, x.shape[1]), torch.nan))
    for part in range(3):
        chosen = routing.experts.where(parts[routing.experts] == part, -1)
        kernels.expert_outputs(x, chosen, bank, outputs)
    residual = sentinels.around(torch.ones_like(x))
    kernels.combine_experts(outputs, routing.weights, residual)
    sentinels.check("outputs and residual")
    return residual


def test_experts_in_parts() -> None:
    """Where and when an expert was computed does not show in the sum."""
    for case, seed in drawn(16):
        generator = torch.Generator().manual_seed(seed)
        packed, routing = case.packed(generator), case.routing(generator)
        x = random_tokens(case.tokens, case.hidden, generator)
        parts = torch.randint(3, (case.experts,), generator=generator)
        bank = REFERENCE.prepare_experts(packed, len(packed))
        expected = mixed(REFERENCE, packed, x, routing)
        assert_same_bits(in_parts(REFERENCE, bank, x, routing, parts), expected, case)
        for isa in ISAS:
            prepared = native(isa, 2).prepare_experts(packed, len(packed))
            for threads in THREADS:
                found = in_parts(native(isa, threads), prepared, x, routing, parts)
                assert_same_bits(found, expected, (isa, threads, case))


def test_outputs_of_experts_elsewhere_stay_as_they_are() -> None:
    case = Case(4, 2, 64, 32, 3)
    generator = torch.Generator().manual_seed(0)
    packed = case.packed(generator)
    x = random_tokens(3, 64, generator)
    chosen = torch.tensor([[-1, 2], [-1, -1], [0, -1]])
    for kernels in (REFERENCE, native(ISAS[0], 2)):
        bank = kernels.prepare_experts(packed, 4)
        outputs = torch.full((3, 2, 64), 7.0)
        kernels.expert_outputs(x, chosen, bank, outputs)
        assert torch.equal(outputs[chosen < 0], torch.full((4, 64), 7.0))
        assert not (outputs[chosen >= 0] == 7.0).any()
        with pytest.raises(KernelError, match=r"outputs.*\[3, 2, 64\]"):
            kernels.expert_outputs(x, chosen, bank, outputs[:2])
        with pytest.raises(KernelError, match=r"weights.*\[3, 2\]"):
            kernels.combine_experts(outputs, torch.ones(3, 1), x)


def test_an_expert_that_is_not_in_memory_is_refused() -> None:
    case = Case(4, 2, 64, 32, 1)
    packed = case.packed(torch.Generator().manual_seed(0))
    kernels = native(ISAS[0], 1)
    bank = kernels.prepare_experts(packed, 4)
    bank.table[2] = 0
    x, routing = torch.zeros(1, 64), Routing(torch.tensor([[1, 2]]), torch.ones(1, 2))
    with pytest.raises(KernelError, match="in memory: also number: expected 2"):
        kernels.mix_experts(x, routing, bank, x.clone())
    kernels.mix_experts(x, dataclasses.replace(routing, experts=torch.tensor([[1, 3]])), bank, x)


def test_slots_come_and_go() -> None:
    """A slot stays where it is while others come and go behind it."""
    arena = _native.SlotArena(40 << 20)
    assert arena.resize(3) == arena.size == 3
    first = arena.address(0)
    assert arena.resize(1) == 1
    assert arena.address(0) == first
    with pytest.raises(_native.RefusedError, match="slot: below: expected 1, found 1"):
        arena.address(1)
    small = _native.SlotArena(64)
    assert small.resize(100) == 100
    assert small.address(99) - small.address(0) == 99 * 64
    assert _native.SlotArena(1 << 60).resize(2) == 0  # No memory for it: what there is, is none.
    with pytest.raises(_native.RefusedError, match="multiple of: expected 64"):
        _native.SlotArena(65)


def one_by_one(packed: list[PackedExpert], x: Tensor, routing: Routing) -> Tensor:
    """The definition in docs/arithmetic.md, from the operations of single matrices."""
    residual = torch.ones_like(x)
    for token in range(x.shape[0]):
        total: Tensor | None = None
        for column in range(routing.experts.shape[1]):
            expert = packed[int(routing.experts[token, column])]
            gate, up, down = (
                REFERENCE.prepare(weight) for weight in (expert.gate, expert.up, expert.down)
            )
            y = REFERENCE.linear(REFERENCE.gate_up_silu(x[token, None], gate, up), down)[0]
            part = y * routing.weights[token, column]
            total = part if total is None else total + part
        assert total is not None
        residual[token] += total
    return residual


def test_the_reference_is_the_definition() -> None:
    for seed, case in enumerate(FIXED[:9]):
        generator = torch.Generator().manual_seed(seed)
        packed, routing = case.packed(generator), case.routing(generator)
        x = random_tokens(case.tokens, case.hidden, generator)
        expected = one_by_one(packed, x, routing)
        assert_same_bits(mixed(REFERENCE, packed, x, routing), expected, case)


def large() -> tuple[list[PackedExpert], Tensor, Routing]:
    case = Case(12, 4, 128, 96, 40)
    generator = torch.Generator().manual_seed(1)
    packed, routing = case.packed(generator), case.routing(generator)
    return packed, random_tokens(case.tokens, case.hidden, generator), routing


def different(found: Tensor, expected: Tensor) -> bool:
    with pytest.raises(AssertionError):
        assert_same_bits(found, expected, "")
    return True


def test_the_order_of_the_router_and_its_roundings_are_seen() -> None:
    """What equality would let pass if these cases could not tell the orders apart."""
    packed, x, routing = large()
    expected = mixed(native(ISAS[0], 2), packed, x, routing)
    by_expert = routing.experts.sort(dim=1)
    sorted_weights = routing.weights.gather(1, by_expert.indices)
    assert different(
        mixed(REFERENCE, packed, x, Routing(by_expert.values, sorted_weights)), expected
    )
    # Weighted before the down product instead of after it, or rounded to bfloat16.
    halved = Routing(routing.experts, routing.weights.bfloat16().float())
    assert different(mixed(REFERENCE, packed, x, halved), expected)
    neighbours = packed[1:] + packed[:1]
    assert different(mixed(REFERENCE, neighbours, x, routing), expected)


def test_a_token_alone_gets_what_it_gets_among_others() -> None:
    packed, x, routing = large()
    for isa in ISAS:
        kernels = native(isa, 2)
        together = mixed(kernels, packed, x, routing)
        for token in range(len(x)):
            alone = Routing(routing.experts[token, None], routing.weights[token, None])
            found = mixed(kernels, packed, x[token, None], alone)
            assert_same_bits(found, together[token, None], (isa, token))


def test_nan_reaches_its_own_token_only() -> None:
    packed, x, routing = large()
    expected = mixed(REFERENCE, packed, x, routing)
    x[3, 5] = torch.nan
    for isa in ISAS:
        found = mixed(native(isa, 3), packed, x, routing)
        assert found[3].isnan().all()
        assert_same_bits(found[:3], expected[:3], isa)
        assert_same_bits(found[4:], expected[4:], isa)


def test_experts_that_do_not_fit_are_named() -> None:
    generator = torch.Generator().manual_seed(0)
    packed, kernels = Case(3, 1, 64, 32, 1).packed(generator), native(ISAS[0], 1)
    for each in (kernels, REFERENCE):
        with pytest.raises(KernelError, match="experts: expected 4, found 3"):
            each.prepare_experts(iter(packed), 4)
        with pytest.raises(KernelError, match="experts: expected 2, found 3"):
            each.prepare_experts(iter(packed), 2)
        other = Case(1, 1, 64, 32, 1, bits=(4, 4, 8)).packed(generator)
        with pytest.raises(KernelError, match=r"expert 3: down: .*int4-g32.*found .*int8-g32"):
            each.prepare_experts(iter(packed + other), 4)
        swapped = [dataclasses.replace(packed[0], down=packed[0].gate)]
        with pytest.raises(KernelError, match=r"down \[64, 32\], found .*down \[32, 64\]"):
            each.prepare_experts(iter(swapped), 1)
    bank = kernels.prepare_experts(packed, 3)
    assert bank.nbytes == 3 * sum(
        kernels.prepare(weight).nbytes for weight in (packed[0].gate, packed[0].up, packed[0].down)
    )
    x, weights = torch.zeros(1, 64), torch.ones(1, 1)
    for wrong in (-1, 3):
        with pytest.raises(KernelError, match=f"expert: below: expected 3, found {wrong}"):
            kernels.mix_experts(x, Routing(torch.tensor([[wrong]]), weights), bank, x.clone())
    with pytest.raises(KernelError, match="routing"):
        kernels.mix_experts(x, Routing(torch.zeros(1, 2).long(), weights), bank, x.clone())
    nothing = Routing(torch.zeros(0, 2).long(), torch.zeros(0, 2))
    kernels.mix_experts(torch.zeros(0, 64), nothing, bank, torch.zeros(0, 64))


RULES = (
    RouterRule(8, 2, Scoring.SOFTMAX, False),
    RouterRule(8, 8, Scoring.SOFTMAX, True),
    RouterRule(64, 6, Scoring.SOFTMAX, False, epsilon=1e-20, scale=1.5),
    RouterRule(1, 1, Scoring.SIGMOID, True, epsilon=1e-20),
    RouterRule(16, 2, Scoring.SIGMOID, True, 4, 2, GroupScore.BEST_TWO, 1e-20, 2.5),
    RouterRule(256, 8, Scoring.SIGMOID, True, 8, 4, GroupScore.BEST_TWO, 1e-20, 2.5),
    RouterRule(160, 6, Scoring.SOFTMAX, False, 8, 3, GroupScore.BEST, 1e-20, 16.0),
    RouterRule(9, 3, Scoring.SIGMOID, False, 3, 1, GroupScore.BEST),
    RouterRule(12, 5, Scoring.SOFTMAX, True, 12, 6, GroupScore.BEST),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.num_experts}")
def test_route(rule: RouterRule) -> None:
    for seed, (tokens, hidden) in enumerate(((1, 256), (1, 7), (3, 65), (40, 130))):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, hidden, generator=generator)
        weight = torch.randn(rule.num_experts, hidden, generator=generator) / hidden**0.5
        bias = torch.randn(rule.num_experts, generator=generator) * 0.3 if seed % 2 else None
        if seed == 2:
            weight[:] = weight[0]  # All equal: the lower expert first.
        if seed == 3:
            x[7], x[8, 3], x[9] = 0.0, torch.nan, 1e30
        expected = REFERENCE.route(x, weight, bias, rule)
        if seed == 2:
            assert expected.experts[0].tolist() == list(range(rule.experts_per_token))
        for isa in ISAS:
            for threads in THREADS:
                found = native(isa, threads).route(x, weight, bias, rule)
                case = (isa, threads, seed, rule)
                assert torch.equal(found.experts, expected.experts), case
                assert_same_bits(found.weights, expected.weights, case)


def test_the_reference_router_is_what_torch_says() -> None:
    """Close to torch's own operations in float64; sums in another order, nothing else."""
    rule = RouterRule(16, 3, Scoring.SOFTMAX, True, scale=2.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 100, generator=generator)
    weight = torch.randn(16, 100, generator=generator) * 0.1
    found = mixture.route(x, weight, None, rule)
    best = (x.double() @ weight.double().T).softmax(1).topk(3)
    assert torch.equal(found.experts, best.indices)
    expected = 2.0 * best.values / best.values.sum(1, keepdim=True)
    assert (found.weights - expected).abs().max() < 1e-6


def test_a_rule_that_cannot_be_followed_is_refused() -> None:
    for kernels in (REFERENCE, native(ISAS[0], 1)):
        for wrong in (
            RouterRule(8, 9, Scoring.SOFTMAX, True),
            RouterRule(8, 2, Scoring.SOFTMAX, True, 3, 2),
            RouterRule(8, 3, Scoring.SOFTMAX, True, 4, 1),
            RouterRule(8, 2, Scoring.SOFTMAX, True, 8, 4, GroupScore.BEST_TWO),
        ):
            with pytest.raises(KernelError, match="route: rule"):
                kernels.route(torch.zeros(1, 4), torch.zeros(8, 4), None, wrong)
        with pytest.raises(KernelError, match=r"route: weight.*\[8, 4\].*\[7, 4\]"):
            kernels.route(torch.zeros(1, 4), torch.zeros(7, 4), None, RULES[0])
