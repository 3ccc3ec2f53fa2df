"""Codes and scales, against the figures of other choices, and how they are stored."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_sources import relative_error, unpack
from torch import Tensor

from localr1.errors import NumericsError, UnsupportedError, UsageError
from localr1.qtypes import QuantScheme
from localr1.quant.methods.base import QuantizedTensor
from localr1.quant.methods.registry import method_named
from localr1.quant.methods.rtn import CHUNK, RoundToNearest
from localr1.quant.packing import pack_codes

RTN = RoundToNearest()

GAUSSIAN_4_BIT = 0.00660
"""Relative squared error of Gaussian weights in groups of 32. Measured: 0.00654; exhaustive search
0.00653, scales of one sign only 0.0082, absmax / 7 0.0089, absmax / -8 0.0070: each is refused."""
STUDENT_4_BIT = 0.0108
"""The same for Student's t with 5 degrees of freedom; measured 0.0106, absmax / 7 0.0142."""
GAUSSIAN_5_BIT = 0.00164
"""Measured 0.00160; with the positions of 4 bits 0.00163, absmax / 15 0.00193."""
GAUSSIAN_6_BIT = 3.95e-4
"""Measured 3.87e-4; with the positions of 4 bits 3.95e-4, absmax / 31 4.68e-4."""
GAUSSIAN_8_BIT = 2.6e-5
"""Measured 2.36e-5; absmax / 127 gives 2.86e-5."""


def gaussian(rows: int = 512, columns: int = 1024, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def read_back(quantized: QuantizedTensor) -> Tensor:
    rows, columns = quantized.codes.shape
    groups = quantized.codes.view(rows, quantized.scale.shape[1], -1).float()
    return (groups * quantized.scale.float()[:, :, None]).view(rows, columns)


def absmax(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """The plain choice: the largest magnitude takes the last positive code."""
    groups = weight.view(len(weight), -1, scheme.group_size)
    scale = groups.abs().amax(2, keepdim=True) / scheme.code_max
    return ((groups / scale).round().clamp(scheme.code_min, scheme.code_max) * scale).view_as(
        weight
    )


@pytest.mark.parametrize(
    ("bits", "kind", "limit"),
    [
        (4, "gaussian", GAUSSIAN_4_BIT),
        (4, "student", STUDENT_4_BIT),
        (5, "gaussian", GAUSSIAN_5_BIT),
        (6, "gaussian", GAUSSIAN_6_BIT),
        (8, "gaussian", GAUSSIAN_8_BIT),
    ],
)
def test_error_of_known_distributions(bits: int, kind: str, limit: float) -> None:
    weight = gaussian()
    if kind == "student":
        torch.manual_seed(0)
        weight = torch.distributions.StudentT(5.0).sample(torch.Size((512, 1024)))
    scheme = QuantScheme(bits, 32)
    quantized = RTN.quantize(weight, scheme, torch.bfloat16, "w")
    error = relative_error(weight, read_back(quantized))
    assert error < limit
    assert error < 0.95 * relative_error(weight, absmax(weight, scheme))
    assert quantized.relative_error == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_and_scales_are_in_range(bits: int, group: int, dtype: torch.dtype) -> None:
    weight = gaussian(64, 256)
    scheme = QuantScheme(bits, group)
    quantized = RTN.quantize(weight, scheme, dtype, "w")
    assert quantized.codes.dtype == torch.int8
    assert quantized.codes.shape == weight.shape
    assert quantized.scale.dtype == dtype
    assert quantized.scale.shape == (64, 256 // group)
    assert scheme.code_min <= int(quantized.codes.min())
    assert int(quantized.codes.max()) <= scheme.code_max
    assert bool((quantized.scale != 0).all())
    # Codes are the nearest to the stored scale: rounding it afterwards would leave larger errors.
    steps = (weight - read_back(quantized)).view(64, -1, group) / quantized.scale.float()[
        :, :, None
    ]
    inside = (quantized.codes > scheme.code_min) & (quantized.codes < scheme.code_max)
    assert float(steps.view_as(weight)[inside].abs().max()) <= 0.5 + 1e-5


def test_both_signs_of_scales_are_used_and_the_last_negative_code() -> None:
    quantized = RTN.quantize(gaussian(), QuantScheme(4, 32), torch.bfloat16, "w")
    negative = float((quantized.scale < 0).float().mean())
    assert 0.2 < negative < 0.8
    assert int(quantized.codes.min()) == -8


def test_more_than_one_chunk_and_a_last_one_that_is_not_full() -> None:
    weight = gaussian(CHUNK // 32 + 3, 96)
    whole = RTN.quantize(weight, QuantScheme(4, 32), torch.bfloat16, "w")
    part = RTN.quantize(weight[-5:], QuantScheme(4, 32), torch.bfloat16, "w")
    assert torch.equal(whole.codes[-5:], part.codes)
    assert torch.equal(whole.scale[-5:], part.scale)


def test_bfloat16_weights_are_taken_as_they_are() -> None:
    weight = gaussian(32, 128).bfloat16()
    narrow = RTN.quantize(weight, QuantScheme(4, 32), torch.bfloat16, "w")
    wide = RTN.quantize(weight.float(), QuantScheme(4, 32), torch.bfloat16, "w")
    assert torch.equal(narrow.codes, wide.codes)
    assert torch.equal(narrow.scale, wide.scale)


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_groups_of_zeros_and_of_extreme_numbers(bits: int, dtype: torch.dtype) -> None:
    weight = gaussian(6, 32)
    weight[0] = 0.0
    weight[1] = 0.25  # All alike: only the scale's own rounding is left.
    weight[2] *= 1e-30
    weight[3] *= 1e-42  # Subnormal.
    weight[4] = 0.0
    weight[4, 7] = -3.0
    weight[5] *= 3e4 if dtype == torch.float16 else 1e18
    quantized = RTN.quantize(weight, QuantScheme(bits, 32), dtype, "w")
    assert bool(torch.isfinite(quantized.scale).all())
    back = read_back(quantized)
    assert torch.equal(back[0], weight[0])
    assert float(quantized.scale[0, 0]) == 1.0
    assert torch.allclose(back[1], weight[1], rtol=torch.finfo(dtype).eps, atol=0)
    assert torch.allclose(back[4], weight[4], rtol=0.01, atol=0)
    assert relative_error(weight[5], back[5]) < 0.02
    assert bool((back[2:4].abs() <= 2 * weight[2:4].abs().max()).all())


def test_a_matrix_of_zeros_has_no_error() -> None:
    quantized = RTN.quantize(torch.zeros(4, 64), QuantScheme(4, 32), torch.bfloat16, "w")
    assert quantized.relative_error == 0.0
    assert not read_back(quantized).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_is_refused_by_name(value: float) -> None:
    weight = gaussian(4, 64)
    weight[3, 63] = value
    with pytest.raises(NumericsError, match=r"model\.layers\.0\.mlp\.up_proj\.weight.*1 of NaN"):
        RTN.quantize(
            weight, QuantScheme(4, 32), torch.bfloat16, "model.layers.0.mlp.up_proj.weight"
        )


def test_an_asymmetric_scheme_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="symmetric"):
        RTN.quantize(gaussian(4, 32), QuantScheme(4, 32, symmetric=False), torch.bfloat16, "w")


def test_an_unknown_method_is_refused_and_the_known_named() -> None:
    assert method_named("rtn").name == "rtn"
    with pytest.raises(UsageError, match=r"expected rtn or imatrix or gptq, found 'gguf'"):
        method_named("gguf")


def test_bytes_of_packed_codes() -> None:
    """The facts of compressed-tensors' format: low nibble first, stored = signed + 2^(bits-1)."""
    codes = torch.arange(-8, 8, dtype=torch.int8)[None]
    packed = pack_codes(codes, QuantScheme(4, 32))
    assert packed.view(torch.uint8).tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]
    codes = torch.tensor([[-128, -127, 0, 127]], dtype=torch.int8)
    assert pack_codes(codes, QuantScheme(8, 32)).view(torch.uint8).tolist() == [[0, 1, 128, 255]]
    codes = torch.tensor([[31, -32, -31, 0, -30, -31]], dtype=torch.int8)
    packed = pack_codes(codes, QuantScheme(6, 32))
    assert packed.view(torch.uint8).tolist() == [[0x3F, 0x10, 0x80, 0x42, 0, 0, 0, 0]]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from([4, 5, 6, 8]), st.integers(0, 2**31))
def test_packing_agrees_with_compressed_tensors(
    rows: int, columns: int, bits: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    bound = 1 << (bits - 1)
    codes = torch.randint(-bound, bound, (rows, columns), generator=generator).to(torch.int8)
    packed, theirs = pack_codes(codes, QuantScheme(bits, 32)), pack_to_int32(codes, bits)
    assert packed.shape == theirs.shape
    assert torch.equal(unpack(packed, bits)[:, :columns], codes.long())
    full = columns * bits // 32  # Of the bits that fill up the last word nothing is said.
    assert torch.equal(packed[:, :full], theirs[:, :full])
    assert torch.equal(unpack(theirs, bits)[:, :columns], codes.long())
