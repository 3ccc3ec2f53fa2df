"""Quantized matrices as floats on the GPU: exact, or rounded once."""

import pytest
import torch
from gpu_cases import ROWS_PER_BLOCK, Gpus, blocked, i32, layout_of
from kernel_cases import REFERENCE, Shape, assert_same_bits, random_packed
from test_kernels_contract import drawn

from localr1.kernels import gpu_launch
from localr1.qtypes import CARD_BITS

TYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("rows", ROWS_PER_BLOCK)
def test_dequantize(rows: int, gpus: Gpus) -> None:
    for index, (shape, _, generator) in enumerate(drawn(16, 40, CARD_BITS)):
        packed = random_packed(shape, generator)
        ids = torch.arange(shape.rows)
        exact = REFERENCE.embedding(ids, REFERENCE.prepare(packed))
        dtype = TYPES[index % 3]
        expected = exact.to(dtype)
        for gpu in gpus():
            out = gpu.upload("out", torch.zeros_like(expected))
            gpu.launch(
                gpu_launch.dequantize(shape.rows, shape.columns),
                layout_of(packed, rows), gpu.upload("weights", blocked(packed, rows)),
                i32(TYPES.index(dtype)), out, rows=rows,
            )  # fmt: skip
            assert_same_bits(gpu.download(out, expected).float(), expected.float(), (shape, dtype))


def test_scales_that_are_no_numbers_stay_so(gpus: Gpus) -> None:
    packed = random_packed(Shape(3, 64, 4, 32, torch.float32), torch.Generator().manual_seed(1))
    packed.scale[0, 0], packed.scale[1, 1], packed.scale[2, 0] = torch.nan, torch.inf, 3e38
    exact = REFERENCE.embedding(torch.arange(3), REFERENCE.prepare(packed))
    for dtype in TYPES:
        expected = exact.to(dtype)
        for gpu in gpus():
            out = gpu.upload("out", torch.zeros_like(expected))
            gpu.launch(
                gpu_launch.dequantize(3, 64), layout_of(packed, 16),
                gpu.upload("weights", blocked(packed, 16)), i32(TYPES.index(dtype)), out,
            )  # fmt: skip
            assert_same_bits(gpu.download(out, expected).float(), expected.float(), dtype)


def test_embedding(gpus: Gpus) -> None:
    for shape, tokens, generator in drawn(12, 50, CARD_BITS):
        packed = random_packed(shape, generator)
        ids = torch.randint(0, shape.rows, (tokens,), generator=generator)
        expected = REFERENCE.embedding(ids, REFERENCE.prepare(packed))
        for gpu in gpus():
            out = gpu.upload("out", torch.zeros_like(expected))
            gpu.launch(
                gpu_launch.embedding(shape.columns, tokens),
                layout_of(packed, 16), gpu.upload("weights", blocked(packed, 16)),
                gpu.upload("ids", ids.int()), out,
            )  # fmt: skip
            assert_same_bits(gpu.download(out, expected), expected, shape)
