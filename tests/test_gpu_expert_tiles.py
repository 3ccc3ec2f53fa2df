"""A mixture's experts for many tokens, on the tensor cores: the reference's bits, wherever experts
lie and however the pairs are spread."""

import dataclasses

import pytest
import torch
from gpu_cases import ROWS_PER_BLOCK, Gpu, Gpus, blocked, group_sums, i32, i64, layout_of, models
from gpu_model import Changes, ModelError, ModelGpu
from kernel_cases import REFERENCE, Shape, assert_same_bits, random_packed, random_tokens
from test_gpu_matmul import by_group
from test_kernels_experts import Case
from torch import Tensor

from localr1.kernels import gpu_launch
from localr1.kernels.api import PackedExpert
from localr1.kernels.gpu_layout import ExpertLayout
from localr1.kernels.gpu_pairs import most_positions, order_pairs
from localr1.qtypes import Codes


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_pairs(seed: int) -> None:
    """Every pair once, in a tile of its expert; no tile without one."""
    generator = torch.Generator().manual_seed(seed)
    shape = (int(torch.randint(1, 90, (1,), generator=generator)), 1 + seed % 4)
    chosen = torch.randint(-1, 1 + 3 * seed, shape, generator=generator)
    pairs = order_pairs(chosen)
    assert len(pairs.order) == 32 * pairs.num_tiles <= most_positions(chosen.numel(), 3 * seed + 1)
    there = pairs.order[pairs.order >= 0].long()
    assert torch.equal(there.sort().values, (chosen.flatten() >= 0).nonzero().flatten())
    for tile, expert in zip(pairs.order.view(-1, 32), pairs.experts, strict=True):
        inside = tile[tile >= 0].long()
        assert len(inside)
        assert (chosen.flatten()[inside] == expert).all()
    assert (pairs.experts.diff() >= 0).all()
    full = pairs.order.view(-1, 32)[:-1][pairs.experts.diff() == 0]
    assert (full >= 0).all()


def outputs_of(
    gpu: Gpu,
    packed: list[PackedExpert],
    x: Tensor,
    chosen: Tensor,
    rows: int,
    absent: frozenset[int] = frozenset(),
    changes: Changes = (),
) -> Tensor:
    """[T, k, hidden] of the experts that are not absent, 7 elsewhere. chosen: int64 [T, k],
    negative for none."""
    parts = [(expert.gate, expert.up, expert.down) for expert in packed]
    layout = ExpertLayout(*(layout_of(part, rows) for part in parts[0]))
    table = torch.zeros(len(packed), dtype=torch.int64)
    for index in set(chosen.flatten().tolist()) - absent - {-1}:
        slot = torch.cat([blocked(weight, rows) for weight in parts[index]])
        table[index] = gpu.address(gpu.upload(f"expert {index}", slot))
    order, experts = pairs = order_pairs(chosen)
    where = [
        gpu.upload("table", table),
        gpu.upload("order", order),
        gpu.upload("experts of tiles", experts),
    ]
    inner, positions = parts[0][0].out_features, len(order)
    hidden, per_token = parts[0][2].out_features, chosen.shape[1]
    q, scale = REFERENCE.quantize_activations(x)
    turned = by_group(gpu, scale, group_sums(q), positions, order, per_token)
    gated = [
        gpu.upload("gated q", torch.zeros(positions, inner, dtype=torch.int8)),
        gpu.upload("gated scale", torch.zeros(inner // 32, positions)),
        gpu.upload("gated sum", torch.zeros(inner // 32, positions, dtype=torch.int32)),
    ]
    out = torch.full((*chosen.shape, hidden), 7.0)
    outputs = gpu.upload("outputs", out)
    gpu.launch(
        gpu_launch.gate_up_tiles(layout, pairs.num_tiles),
        layout, *where, i32(per_token), gpu.upload("q", q), *turned, i64(positions), *gated,
        rows=rows, changes=changes,
    )  # fmt: skip
    gpu.launch(
        gpu_launch.down_tiles(layout, pairs.num_tiles),
        layout, *where, *gated, i64(positions), outputs, rows=rows, changes=changes,
    )  # fmt: skip
    return gpu.download(outputs, out)


def reference_outputs(packed: list[PackedExpert], x: Tensor, chosen: Tensor) -> Tensor:
    out = torch.full((*chosen.shape, packed[0].down.out_features), 7.0)
    REFERENCE.expert_outputs(x, chosen, REFERENCE.prepare_experts(packed, len(packed)), out)
    return out


# One token; more of an expert than a tile has; rows and outputs that do not fill a tile; widths of
# their own, zero points, and more groups than stages and phases.
CASES = (
    Case(5, 2, 64, 32, 1),
    Case(2, 1, 288, 96, 40, bits=(4, 4, 8)),
    Case(6, 3, 160, 64, 9, bits=(8, 8, 4), dtype=torch.float32),
    Case(3, 2, 128, 192, 21, group=64, zero=True, dtype=torch.float16),
    Case(3, 2, 128, 64, 21, group=64, dtype=torch.float32, codes=Codes.NF4),
)


@pytest.mark.parametrize("rows", ROWS_PER_BLOCK)
def test_experts(rows: int, gpus: Gpus) -> None:
    for seed, case in enumerate(CASES):
        generator = torch.Generator().manual_seed(seed)
        packed, routing = case.packed(generator), case.routing(generator)
        x = random_tokens(case.tokens, case.hidden, generator)
        expected = reference_outputs(packed, x, routing.experts)
        for gpu in gpus():
            found = outputs_of(gpu, packed, x, routing.experts, rows)
            assert_same_bits(found, expected, (case, rows))


def test_gate_and_up_of_different_groups(gpus: Gpus) -> None:
    """And types of scales, and zero points in one of them alone."""
    generator = torch.Generator().manual_seed(6)
    up = Shape(96, 128, 4, 64, torch.float32, zero=True)
    case = Case(2, 1, 128, 96, 7)
    packed = [
        dataclasses.replace(expert, up=random_packed(up, generator))
        for expert in case.packed(generator)
    ]
    x = random_tokens(7, 128, generator)
    chosen = torch.tensor([[1], [0], [0], [1], [0], [0], [0]])
    for order in (packed, [PackedExpert(e.up, e.gate, e.down) for e in packed]):
        expected = reference_outputs(order, x, chosen)
        for gpu in gpus():
            assert_same_bits(outputs_of(gpu, order, x, chosen, 16), expected, "groups")


def test_experts_that_lie_elsewhere_are_left_alone(gpus: Gpus) -> None:
    case = Case(6, 3, 96, 64, 4, bits=(4, 4, 8))
    generator = torch.Generator().manual_seed(1)
    packed, routing = case.packed(generator), case.routing(generator)
    x = random_tokens(4, 96, generator)
    absent = frozenset({0, 4})
    chosen = routing.experts.clone()
    chosen[2, 1] = -1
    here = torch.tensor([[int(e) not in absent and e >= 0 for e in row] for row in chosen])
    expected = reference_outputs(packed, x, routing.experts)
    for gpu in gpus():
        outputs = outputs_of(gpu, packed, x, chosen, 16, absent)
        assert (outputs[~here] == 7.0).all()
        assert_same_bits(outputs[here], expected[here], "here")


PLANTED = {
    "stages that are still read": ("  __syncthreads();  // the stages are read\n", ""),
    "gate for up": ("is_up ? data + up_offset(e) : data", "data"),
    "up's groups as gate's": ("m.group = e.up.group;", ""),
    "wrong token": ("pair / per_token) * a.groups", "pair % per_token) * a.groups"),
    "a row past the end": ("if (row < e.down.rows && pair >= 0)", "if (pair >= 0)"),
    "a pair that is none": ("if (row < e.down.rows && pair >= 0)", "if (row < e.down.rows)"),
    "a group past the end": ("    if (group >= groups) return;\n", ""),
    "an expert that is not there": ("if (!data) return;", "if (blockIdx.x > 9999) return;"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_caught(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    gate, up = Shape(96, 128, 4, 32), Shape(96, 128, 4, 64, zero=True)
    whole = [
        PackedExpert(
            *(random_packed(each, generator) for each in (gate, up, Shape(128, 96, 4, 32)))
        )
        for _ in range(3)
    ]
    # 40 outputs: the only tile of rows is not full.
    narrow = [
        dataclasses.replace(
            each,
            down=dataclasses.replace(
                each.down,
                packed=each.down.packed[:40],
                scale=each.down.scale[:40],
                out_features=40,
            ),
        )
        for each in whole
    ]
    x = random_tokens(5, gate.columns, generator)
    chosen = torch.tensor([[0, 2], [1, 2], [2, 0], [0, 2], [2, 0]])  # of 1 there is one pair
    absent = frozenset({1})
    expected = reference_outputs(whole, x, chosen)[..., :40]
    here = chosen != 1
    outside = "past" in name or "none" in name or "not there" in name

    def is_caught(gpu: ModelGpu) -> bool:
        try:
            found = outputs_of(gpu, narrow, x, chosen, 8, absent, (PLANTED[name],))
        except ModelError as error:  # where a plain wrong result would not do
            return not outside or "outside" in str(error) or "written" in str(error)
        return not outside and not torch.equal(found[here], expected[here])

    assert any(is_caught(gpu) for gpu in models()), name
