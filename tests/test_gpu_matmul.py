"""Products for many tokens on the tensor cores, from the CPU's blocked bytes: the reference's
bits."""

import random
from collections.abc import Iterator

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
from gpu_model import Changes, ModelGpu, Program
from kernel_cases import REFERENCE, Shape, assert_same_bits, random_packed, random_tokens
from torch import Tensor

from localr1.kernels import gpu_launch
from localr1.kernels.api import PackedWeight
from localr1.kernels.gpu_launch import Launch
from localr1.qtypes import Codes


def by_group(
    gpu: Gpu,
    scale: Tensor,
    sums: Tensor,
    stride: int,
    order: Tensor | None = None,
    per_token: int = 1,
    changes: Changes = (),
) -> tuple[object, object]:
    """Buffers [groups, stride]. scale, sums [rows, groups]; order: int32, of some positions."""
    count, groups = scale.shape if order is None else (len(order), scale.shape[1])
    found = [
        gpu.upload("by group", torch.full((groups, stride), 7, dtype=each.dtype))
        for each in (scale, sums)
    ]
    gpu.launch(
        gpu_launch.by_group(groups, stride),
        gpu.upload("scale", scale), gpu.upload("sums", sums), i32(groups),
        None if order is None else gpu.upload("order", order), i32(per_token), i32(count),
        i64(stride), *found, changes=changes,
    )  # fmt: skip
    return found[0], found[1]


def matmul(
    gpu: Gpu,
    packed: PackedWeight,
    x: Tensor,
    rows: int,
    bias: Tensor | None = None,
    before: Tensor | None = None,
    changes: Changes = (),
) -> Tensor:
    """x times the matrix on a GPU; before: what the product is added to."""
    tokens = x.shape[0]
    q, scale = REFERENCE.quantize_activations(x)
    stride = gpu_launch.positions_of(tokens)
    turned = by_group(gpu, scale, group_sums(q), stride)
    out = torch.full((tokens, packed.out_features), torch.nan) if before is None else before
    target = gpu.upload("out", out)
    gpu.launch(
        gpu_launch.matmul(packed.scheme.code_type, packed.out_features, tokens),
        layout_of(packed, rows),
        gpu.upload("weights", blocked(packed, rows)),
        gpu.upload("q", q),
        *turned,
        i64(stride),
        i32(tokens),
        None if bias is None else gpu.upload("bias", bias),
        target,
        i64(packed.out_features),
        i32(before is not None),
        rows=rows,
        changes=changes,
    )
    return gpu.download(target, out)


def test_scales_change_their_order(gpus: Gpus) -> None:
    """Of all tokens, and of tokens in another order with gaps."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(37, 45, generator=generator)
    sums = torch.randint(-4000, 4000, (37, 45), generator=generator, dtype=torch.int32)
    order = torch.randint(-1, 3 * 37, (60,), generator=generator, dtype=torch.int32)
    for gpu in gpus():
        for buffer, value in zip(by_group(gpu, scale, sums, 64), (scale, sums), strict=True):
            expected = torch.nn.functional.pad(value, (0, 0, 0, 27)).T.contiguous()
            assert_same_bits(gpu.download(buffer, expected), expected, "all")
        found = by_group(gpu, scale, sums, 96, order, 3)
        for buffer, value in zip(found, (scale, sums), strict=True):
            chosen = torch.where(order[:, None] < 0, 0, value[order // 3])
            expected = torch.nn.functional.pad(chosen, (0, 0, 0, 36)).T.contiguous()
            assert_same_bits(gpu.download(buffer, expected), expected, "some")


def drawn() -> Iterator[tuple[Shape, int]]:
    """Rows and tokens around those of tiles and warps, fewer groups than phases and more than
    stages, every type of scale."""
    rng = random.Random(4)
    for bits in (4, 8):
        for group, tokens in ((32, 1), (64, 33), (128, 64), (32, 66)):
            yield (
                Shape(
                    rng.choice((1, 15, 64, 70)),
                    group * rng.choice((1, 3, 7, 10)),
                    bits,
                    group,
                    rng.choice((torch.bfloat16, torch.float16, torch.float32)),
                    zero=rng.random() < 0.5,
                    extreme=rng.random() < 0.3,
                ),
                tokens,
            )
    yield Shape(70, 640, 4, 64, torch.float32, codes=Codes.NF4), 66
    yield Shape(15, 96, 4, 32, codes=Codes.NF4), 9


@pytest.mark.parametrize("rows", ROWS_PER_BLOCK)
def test_matmul(rows: int, gpus: Gpus) -> None:
    for index, (shape, tokens) in enumerate(drawn()):
        generator = torch.Generator().manual_seed(index)
        packed = random_packed(shape, generator)
        x = random_tokens(tokens, shape.columns, generator)
        bias = torch.randn(shape.rows, generator=generator) if index % 2 else None
        before = torch.randn(tokens, shape.rows, generator=generator) if index % 3 == 0 else None
        expected = REFERENCE.linear(x, REFERENCE.prepare(packed), bias)
        if before is not None:
            expected = before + expected
        for gpu in gpus():
            found = matmul(gpu, packed, x, rows, bias, before)
            assert_same_bits(found, expected, (shape, tokens, rows))


@pytest.mark.parametrize(
    "shape",
    [
        Shape(33, 288, 4, 32, torch.float32, zero=True, extreme=True),
        Shape(33, 288, 8, 32, torch.float32, zero=True, extreme=True),
        Shape(33, 288, 4, 32, torch.float32, extreme=True, codes=Codes.NF4),
    ],
    ids=lambda shape: shape.scheme.name,
)
def test_the_largest_sums_are_exact(shape: Shape, gpus: Gpus) -> None:
    """Codes and zero points at opposite ends of their range, activations all of one sign."""
    packed = random_packed(shape, torch.Generator().manual_seed(0))
    ends = torch.tensor([shape.scheme.code_min, shape.scheme.code_max], dtype=torch.int8)
    codes = packed.packed.view(torch.uint8)
    for row in range(shape.rows):
        if packed.zero_point is not None:
            packed.zero_point[row] = ends[row % 2]
        codes[row] = 0 if row % 2 else 255
    x = torch.full((5, shape.columns), 3.0)
    x[1::2] *= -1.0
    expected = REFERENCE.linear(x, REFERENCE.prepare(packed))
    for gpu in gpus():
        assert_same_bits(matmul(gpu, packed, x, 16), expected, shape)


def test_nan_reaches_every_output_of_its_token(gpus: Gpus) -> None:
    generator = torch.Generator().manual_seed(2)
    packed = random_packed(Shape(17, 288, 4, 32), generator)
    x = random_tokens(34, 288, generator)
    x[33, 280] = torch.nan
    x[4, 3] = torch.inf
    expected = REFERENCE.linear(x, REFERENCE.prepare(packed))
    for gpu in gpus():
        found = matmul(gpu, packed, x, 16)
        assert found[33].isnan().all()
        assert_same_bits(found, expected, "nan")


PLACES = """#include "tiles.h"
namespace localr1 {
LOCALR1_KERNEL(32, 512)
places(int32_t* found) {
  found[threadIdx.x] = place_of_codes(16, threadIdx.x);
  found[32 + threadIdx.x] = place_of_activations<Tile<kInt8, 4>>(8, threadIdx.x);
}
}  // namespace localr1
"""


def test_a_stage_is_read_without_conflicts_of_banks() -> None:
    """4 bytes a lane in 32 banks; 8 bytes a lane in 32 banks for each half of a warp."""
    gpu = next(models())
    buffer = gpu.upload("found", torch.zeros(64, dtype=torch.int32))
    gpu.run(Program("places.cu", text=PLACES), Launch("places.cu", "places", (1,), 32), buffer)
    codes, activations = gpu.download(buffer, torch.zeros(2, 32, dtype=torch.int32)).tolist()
    assert len({place // 4 % 32 for place in codes}) == 32
    for half in (activations[:16], activations[16:]):
        assert len({(place + offset) // 4 % 32 for place in half for offset in (0, 4)}) == 32


# What the tests must see. Each is a change that compiles and could stand in a first draft.
PLANTED = {
    "missing barrier": ("      __syncthreads();  // the stage", "      // the stage"),
    "a stage that was not awaited": ("await_groups<0>", "await_groups<1>"),
    "a stage that is still read": ("stages + (T::kStageBytes - stage)", "stages + stage"),
    "a group of the next phase": ("if (both) add_group", "add_group"),
    "phases in their own order": ("turn % 2 * 4 + turn / 2 % 2 * 2 + turn / 4", "turn"),
    "another tree": ("keep(y, two);", "keep(one, two);"),
    "rows of the other half": ("zeros[i / 2 * 8]", "zeros[i % 2 * 8]"),
    "a factor of 16": ("* (stays_upper(kCode) ? 16 : 1)", ""),
    "nibbles changed over": ("a[half] = pair << 4 & 0xf0f0f0f0u;", "a[half] = pair & 0xf0f0f0f0u;"),
    "nibbles of the codebook changed over": ("0x6420u", "0x7531u"),
    "odd chunks first": ("target + T::kPlane + share.to, from", "target + share.to, from"),
    "fused multiply-add": (
        "rounded_sum(sums[turn][i], rounded_product(exact, factor))",
        "__fmaf_rn(exact, factor, sums[turn][i])",
    ),
    "tokens past the end": (
        "index = first_token + token < last ? first_token + token : last;",
        "index = first_token + token + 0 * last;",
    ),
    "outputs past the end": ("if (row >= m.rows || t >= tokens) continue;", ""),
    "row blocks past the end": ("(block < last ? block : last)", "block"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_caught(name: str) -> None:
    """By a wrong result or by the model, for one order of warps at least."""
    generator = torch.Generator().manual_seed(8)
    caught = []
    for shape in (
        Shape(40, 384, 4, 64, zero=True),
        Shape(31, 416, 8, 32, torch.float32),
        Shape(20, 128, 4, 64, torch.float32, codes=Codes.NF4),
    ):
        packed = random_packed(shape, generator)
        x = random_tokens(35, shape.columns, generator)
        expected = REFERENCE.linear(x, REFERENCE.prepare(packed))

        def run(gpu: ModelGpu, packed: PackedWeight = packed, x: Tensor = x) -> Tensor:
            return matmul(gpu, packed, x, 8, changes=(PLANTED[name],))

        caught += what_showed(run, expected)
    assert caught, f"nothing saw: {name}"
    if "past the end" in name:  # a plain wrong result would not do
        assert any("outside" in line or "written" in line for line in caught), caught
