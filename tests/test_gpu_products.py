"""The GPU's quantized products, from the CPU's blocked bytes: the reference's bits."""

import ctypes
from dataclasses import replace

import pytest
import torch
from gpu_cases import (
    ROWS_PER_BLOCK,
    Gpu,
    Gpus,
    blocked,
    f32,
    group_sums,
    i32,
    i64,
    layout_of,
    models,
    what_showed,
)
from gpu_model import Changes, ModelGpu, Program
from kernel_cases import (
    REFERENCE,
    Shape,
    assert_same_bits,
    native,
    random_packed,
    random_tokens,
)
from test_kernels_contract import drawn
from torch import Tensor

from localr1.kernels import _native, gpu_launch
from localr1.kernels.api import PackedExpert, PackedWeight
from localr1.kernels.gpu_launch import Launch
from localr1.kernels.gpu_layout import ExpertLayout, MatrixLayout
from localr1.kernels.native_experts import ExpertForm
from localr1.kernels.rowwise import silu
from localr1.qtypes import CARD_BITS, Codes

UNIT_THREADS = 128


class Quantized:
    """Activations on a GPU, as the reference quantizes them."""

    def __init__(self, gpu: Gpu, x: Tensor) -> None:
        q, scale = REFERENCE.quantize_activations(x)
        self.q, self.scale = gpu.upload("q", q), gpu.upload("scale", scale)
        self.sum = gpu.upload("sum", group_sums(q))


def matvec(
    gpu: Gpu,
    packed: PackedWeight,
    x: Tensor,
    rows: int,
    bias: Tensor | None = None,
    before: Tensor | None = None,
    changes: Changes = (),
    tile: int | None = None,
) -> Tensor:
    """x times the matrix on a GPU; before: what the product is added to."""
    tokens = x.shape[0]
    a = Quantized(gpu, x)
    out = torch.full((tokens, packed.out_features), torch.nan) if before is None else before
    target = gpu.upload("out", out)
    gpu.launch(
        gpu_launch.matvec(packed.scheme.code_type, packed.out_features, tokens, tile),
        layout_of(packed, rows),
        gpu.upload("weights", blocked(packed, rows)),
        a.q,
        a.scale,
        a.sum,
        i32(tokens),
        None if bias is None else gpu.upload("bias", bias),
        target,
        i64(packed.out_features),
        i32(before is not None),
        rows=rows,
        changes=changes,
    )
    return gpu.download(target, out)


def test_a_layout_is_as_large_as_the_natives() -> None:
    """`MatrixLayout` and `blocked` against what the CPU's kernels keep in memory."""
    assert ctypes.sizeof(MatrixLayout) == 40
    assert ctypes.sizeof(ExpertLayout) == 120
    for shape, _, generator in drawn(30, 10, CARD_BITS):
        packed = random_packed(shape, generator)
        for rows in ROWS_PER_BLOCK:
            layout = layout_of(packed, rows)
            size = _native.matrix_bytes(
                layout.rows,
                layout.columns,
                layout.rows_per_block,
                layout.code,
                layout.group,
                layout.scale_type,
                bool(layout.has_zero),
            )
            assert blocked(packed, rows).numel() == size


@pytest.mark.parametrize("isa", ["avx512vnni", "generic"])
def test_blocked_bytes_are_the_cpus(isa: str) -> None:
    if isa not in _native.available_isas():
        pytest.skip("not on this processor")
    kernels, generator = native(isa, 1), torch.Generator().manual_seed(1)
    rows = 16 if isa == "avx512vnni" else 8
    for wide in (
        Shape(96, 64, 4, 32),
        Shape(96, 64, 8, 32, zero=True),
        Shape(96, 64, 4, 32, codes=Codes.NF4),
    ):
        tall = replace(wide, rows=64, columns=96)
        expert = PackedExpert(*(random_packed(s, generator) for s in (wide, wide, tall)))
        layout = kernels.expert_layout(ExpertForm.of(expert))
        arena = _native.SlotArena(layout.nbytes)
        assert arena.resize(1) == 1
        kernels.place_expert(layout, arena, 0, expert)
        placed = ctypes.string_at(arena.address(0), layout.nbytes)
        parts = [blocked(each, rows) for each in (expert.gate, expert.up, expert.down)]
        assert bytes(torch.cat(parts).numpy().tobytes()) == placed


def test_quantize_activations(gpus: Gpus) -> None:
    for i, tokens in enumerate((1, 2, 5, 9)):
        generator = torch.Generator().manual_seed(i)
        x = random_tokens(tokens, 32 * (1 + 3 * i), generator)
        x[0, 0] = (1.0, torch.nan, torch.inf, 1e-40)[i]
        q, scale = REFERENCE.quantize_activations(x)
        for gpu in gpus():
            found = [gpu.upload("found", torch.full_like(v, 3)) for v in (q, scale, group_sums(q))]
            count = x.numel() // 32
            gpu.launch(
                gpu_launch.quantize_activations(count),
                gpu.upload("x", x), i64(count), *found,
            )  # fmt: skip
            for buffer, expected in zip(found, (q, scale, group_sums(q)), strict=True):
                assert_same_bits(gpu.download(buffer, expected), expected, (i, tokens))


def test_silu_quantize(gpus: Gpus) -> None:
    generator = torch.Generator().manual_seed(3)
    gate, up = (random_tokens(5, 96, generator) for _ in range(2))
    gate[0, :6] = torch.tensor([0.0, -0.0, 88.5, -100.0, torch.nan, torch.inf])
    q, scale = REFERENCE.quantize_activations(silu(gate) * up)
    for gpu in gpus():
        found = [gpu.upload("found", torch.zeros_like(v)) for v in (q, scale, group_sums(q))]
        gpu.launch(
            gpu_launch.silu_quantize(15),
            gpu.upload("gate", gate), gpu.upload("up", up), i64(15), *found,
        )  # fmt: skip
        for buffer, expected in zip(found, (q, scale, group_sums(q)), strict=True):
            assert_same_bits(gpu.download(buffer, expected), expected, "silu")


# Rows of less than a lane sum, around its 64 lanes and around the 2048 values of a tile.
@pytest.mark.parametrize("size", [32, 64, 96, 1056, 2048, 2080, 4160])
def test_rms_norm(size: int, gpus: Gpus) -> None:
    generator = torch.Generator().manual_seed(size)
    wide = torch.randn(3, size + 40, generator=generator) * 3.0
    weight = torch.randn(size, generator=generator)
    expected = REFERENCE.rms_norm(wide[:, :size].contiguous(), weight, 1e-6)
    q, scale = REFERENCE.quantize_activations(expected)
    for gpu in gpus():
        y = gpu.upload("y", torch.zeros(3, size))
        found = [gpu.upload("found", torch.zeros_like(v)) for v in (q, scale, group_sums(q))]
        gpu.launch(
            gpu_launch.rms_norm(3),
            gpu.upload("x", wide), i64(size + 40), gpu.upload("weight", weight), f32(1e-6),
            i32(size), y, *found,
        )  # fmt: skip
        assert_same_bits(gpu.download(y, expected), expected, size)
        for buffer, value in zip(found, (q, scale, group_sums(q)), strict=True):
            assert_same_bits(gpu.download(buffer, value), value, size)


@pytest.mark.parametrize("size", [1, 7, 33, 100])
def test_rms_norm_of_any_size_alone(size: int, gpus: Gpus) -> None:
    generator = torch.Generator().manual_seed(size)
    x, weight = torch.randn(2, size, generator=generator), torch.randn(size, generator=generator)
    expected = REFERENCE.rms_norm(x, weight, 1e-5)
    for gpu in gpus():
        y = gpu.upload("y", torch.zeros_like(x))
        gpu.launch(
            gpu_launch.rms_norm(2),
            gpu.upload("x", x), i64(size), gpu.upload("weight", weight), f32(1e-5), i32(size),
            y, None, None, None,
        )  # fmt: skip
        assert_same_bits(gpu.download(y, expected), expected, size)


@pytest.mark.parametrize("rows", ROWS_PER_BLOCK)
def test_matvec(rows: int, gpus: Gpus) -> None:
    for index, (shape, tokens, generator) in enumerate(drawn(30, 20, CARD_BITS)):
        packed = random_packed(shape, generator)
        tokens = min(tokens, 17)
        x = random_tokens(tokens, shape.columns, generator)
        bias = torch.randn(shape.rows, generator=generator) if index % 2 else None
        before = torch.randn(tokens, shape.rows, generator=generator) if index % 3 == 0 else None
        expected = REFERENCE.linear(x, REFERENCE.prepare(packed), bias)
        if before is not None:
            expected = before + expected
        for gpu in gpus():
            found = matvec(gpu, packed, x, rows, bias, before)
            assert_same_bits(found, expected, (shape, tokens, rows))


def test_every_tile_of_tokens(gpus: Gpus) -> None:
    """Tokens that do not fill their tile, and more tiles than one."""
    shapes = [Shape(40, 320, bits, 32) for bits in (4, 8)]
    for shape in (*shapes, Shape(40, 320, 4, 32, codes=Codes.NF4)):
        generator = torch.Generator().manual_seed(shape.bits)
        packed = random_packed(shape, generator)
        x = random_tokens(9, 320, generator)
        for tile in (1, 2, 4, 8):
            for tokens in {1, tile, 9}:
                expected = REFERENCE.linear(x[:tokens], REFERENCE.prepare(packed))
                for gpu in gpus():
                    found = matvec(gpu, packed, x[:tokens], 16, tile=tile)
                    assert_same_bits(found, expected, (shape, tile, tokens))


def test_nan_reaches_every_output_of_its_token(gpus: Gpus) -> None:
    generator = torch.Generator().manual_seed(2)
    packed = random_packed(Shape(17, 288, 4, 32), generator)
    x = random_tokens(2, 288, generator)
    x[1, 280] = torch.nan
    expected = REFERENCE.linear(x, REFERENCE.prepare(packed))
    for gpu in gpus():
        found = matvec(gpu, packed, x, 16)
        assert found[1].isnan().all()
        assert_same_bits(found, expected, "nan")


WHERE = """#include "products.h"
namespace localr1 {
LOCALR1_KERNEL(128, 1024)
where(float* phases, float* rows, float* phase_of) {
  const Place place = place_of(threadIdx.x);
  store_phase(phases, place, float(threadIdx.x));
  rows[threadIdx.x] = place.block * kRows + place.row;
  phase_of[threadIdx.x] = place.phase;
}
}  // namespace localr1
"""


@pytest.mark.parametrize("rows", ROWS_PER_BLOCK)
def test_sums_change_hands_without_conflicts_of_banks(rows: int) -> None:
    """32 threads that store or load together do so in 32 banks of 4 bytes; and every (row, phase)
    has one thread."""
    gpu, stride = next(models()), 144  # kTokenStride
    found = [torch.full((size,), -1.0) for size in (stride, 128, 128)]
    buffers = [gpu.upload("where", each) for each in found]
    launch = Launch("where.cu", "where", (1,), UNIT_THREADS)
    gpu.run(Program("where.cu", rows, text=WHERE), launch, *buffers)
    owner, row, phase = (gpu.download(b, f).long() for b, f in zip(buffers, found, strict=True))
    place = {int(thread): at for at, thread in enumerate(owner) if thread >= 0}
    assert len(place) == UNIT_THREADS
    at = {(int(row[t]), int(phase[t])): place[t] for t in range(UNIT_THREADS)}
    assert len(at) == UNIT_THREADS
    for warp in range(4):  # stores
        assert len({place[32 * warp + lane] % 32 for lane in range(32)}) == 32
    for number in range(8):  # loads: a phase of 16 rows of two tokens
        loads = [token * stride + at[r, number] for token in range(2) for r in range(16)]
        assert len({each % 32 for each in loads}) == 32


# What the model must see. Each is a change that compiles and could stand in a first draft.
PLANTED = {
    "missing barrier": ("  __syncthreads();\n  const int token", "  const int token"),
    "wrong index": ("4 * quad + chunk};", "4 * chunk + quad};"),
    "wrong order of phases": ("rounded_sum(a[0], a[4 * kRows])", "rounded_sum(a[0], a[2 * kRows])"),
    "fused multiply-add": (
        "acc[t] = rounded_sum(acc[t], rounded_product(float(sum), scale));",
        "acc[t] = __fmaf_rn(float(sum), scale, acc[t]);",
    ),
    "rows past the end": ("|| row >= m.rows) return;", ") return;"),
    "activations past the end": ("within = g < groups ? g : 0;", "within = g;"),
    "a group past the end": ("      if (g >= groups) continue;\n", ""),
    "activations in the order of columns": ("0x5140u", "0x3210u"),
    "one half of the codebook": ("0x3210u | (indices & 0x8888u) >> 1", "0x3210u"),
    "lanes that do not meet": (
        "if (base + i * kPhases >= groups) break;",
        "if (base + i * kPhases + place.phase >= groups) break;",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_caught(name: str) -> None:
    """By a wrong result or by the model, for one order of warps at least."""
    generator = torch.Generator().manual_seed(8)
    caught = []
    for shape in (
        Shape(40, 288, 4, 32),
        Shape(31, 96, 8, 32, torch.float32),
        Shape(20, 64, 4, 32, codes=Codes.NF4),
    ):
        packed = random_packed(shape, generator)
        x = random_tokens(3, shape.columns, generator)
        expected = REFERENCE.linear(x, REFERENCE.prepare(packed))

        def run(gpu: ModelGpu, packed: PackedWeight = packed, x: Tensor = x) -> Tensor:
            return matvec(gpu, packed, x, 16, changes=(PLANTED[name],))

        caught += what_showed(run, expected)
    assert caught, f"nothing saw: {name}"
    if "past the end" in name:  # a plain wrong result would not do
        assert any("outside" in line or "written" in line for line in caught), caught
    if name == "lanes that do not meet":
        assert any("wait for others" in line or "different" in line for line in caught), caught


def test_a_missing_barrier_of_the_norm_is_caught() -> None:
    text = "tile[i] = row[first + i];\n    __syncthreads();"
    change = (text, text.partition("\n")[0])
    x, weight = torch.randn(1, 2080, generator=torch.Generator().manual_seed(1)), torch.ones(2080)
    expected = REFERENCE.rms_norm(x, weight, 1e-6)
    wrong = 0
    for gpu in models():
        y = gpu.upload("y", torch.zeros_like(x))
        gpu.launch(
            gpu_launch.rms_norm(1),
            gpu.upload("x", x), i64(2080), gpu.upload("weight", weight), f32(1e-6), i32(2080),
            y, None, None, None, changes=(change,),
        )  # fmt: skip
        wrong += not torch.equal(gpu.download(y, x), expected)
    assert wrong
