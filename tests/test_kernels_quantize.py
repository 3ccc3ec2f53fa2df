"""The native quantization kernel against quant/methods/rtn.py in torch: the same bytes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from localr1.checkpoint.fp8 import dequantize
from localr1.errors import KernelError, NumericsError
from localr1.kernels.block_scaled import BlockScaledRows
from localr1.kernels.native import available_isas
from localr1.kernels.native_weight import _native
from localr1.kernels.quantize import PackedRows, quantize_rows
from localr1.qtypes import QuantScheme
from localr1.quant.methods.base import RowMethod, relative_error
from localr1.quant.methods.rtn import RoundToNearest, positions_of
from localr1.quant.packing import pack_codes

RTN = RoundToNearest()
ISAS = available_isas()
SCALE_DTYPES = (torch.bfloat16, torch.float16)
SCHEMES = [QuantScheme(bits, group) for bits in (4, 5, 6, 8) for group in (32, 64, 128)]
BLOCK = (128, 128)


def random_rows(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def random_fp8(
    rows: int, columns: int, block: tuple[int, int] = BLOCK, seed: int = 0
) -> BlockScaledRows:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns), generator=generator).to(torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    blocks = (-(-rows // block[0]), -(-columns // block[1]))
    scales = torch.rand(blocks, generator=generator) * 1e-3
    return BlockScaledRows(codes.view(torch.float8_e4m3fn), scales, block)


def importance(columns: int) -> Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(1)) ** 4 + 1e-3


def native(
    rows: Tensor | BlockScaledRows,
    scheme: QuantScheme,
    dtype: torch.dtype = torch.bfloat16,
    weights: Tensor | None = None,
    *,
    threads: int = 1,
    isa: str = "",
) -> PackedRows:
    return quantize_rows(
        rows, scheme, dtype, positions_of(scheme), weights, threads=threads, isa=isa
    )


def assert_equal_bytes(
    found: PackedRows,
    weight: Tensor,
    scheme: QuantScheme,
    dtype: torch.dtype = torch.bfloat16,
    weights: Tensor | None = None,
) -> None:
    expected = RTN.quantize(weight, scheme, dtype, "w", weights)
    assert torch.equal(found.packed, pack_codes(expected.codes, scheme))
    assert torch.equal(found.scale, expected.scale)
    error = relative_error(found.error, found.energy)
    assert error == expected.relative_error or error != error != expected.relative_error


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_every_type_and_scheme(isa: str, scheme: QuantScheme, is_weighted: bool) -> None:
    """37 rows of 3 groups of 128: no width of a vector divides the number of groups."""
    weight = random_rows(37, 384)
    weights = importance(384) if is_weighted else None
    fp8 = random_fp8(37, 384)
    for scale_dtype in SCALE_DTYPES:
        for stored in (weight, weight.bfloat16(), weight.half()):
            found = native(stored, scheme, scale_dtype, weights, isa=isa)
            assert_equal_bytes(found, stored, scheme, scale_dtype, weights)
        found = native(fp8, scheme, scale_dtype, weights, isa=isa)
        assert_equal_bytes(found, dequantize(fp8), scheme, scale_dtype, weights)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(isa: str, threads: int) -> None:
    """Many shares of the work, the last one not full."""
    weight = random_rows(1500, 256).bfloat16()
    scheme = QuantScheme(4, 32)
    assert_equal_bytes(native(weight, scheme, threads=threads, isa=isa), weight, scheme)


def extreme_rows(dtype: torch.dtype) -> Tensor:
    weight = random_rows(16, 128)
    weight[0] = 0.0
    weight[1] = -0.0
    weight[2] = 0.25
    weight[3] = 0.0
    weight[3, 77] = -3.0
    limits = torch.finfo(dtype)
    for row, size in enumerate(
        (
            limits.tiny,  # Their scales are not normal.
            16 * limits.tiny,  # Some candidates' are.
            limits.smallest_normal * limits.eps,  # Subnormal themselves.
            limits.max / 8,
            limits.max / 300,
            3e4,
        ),
        4,
    ):
        weight[row] *= size
    weight[10] = limits.max
    weight[11] = -limits.max
    weight[11, ::2] = limits.max
    # The reciprocal overflows, or it does times a position; the smallest numbers there are.
    for row, size in enumerate((2.0**-126, 2.0**-127, 2.0**-129, 2.0**-148), 12):
        weight[row] = random_rows(1, 128).sign() * size
    return weight.clamp(limits.min, limits.max).to(dtype)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_and_extremes(dtype: torch.dtype, scheme: QuantScheme) -> None:
    weight = extreme_rows(dtype)
    large = importance(128) * 1e33  # Then even the smallest weights have a gain.
    choices = (None, importance(128), large)
    for isa, scale_dtype, weights in itertools.product(ISAS, SCALE_DTYPES, choices):
        found = native(weight, scheme, scale_dtype, weights, isa=isa)
        assert_equal_bytes(found, weight, scheme, scale_dtype, weights)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(SCHEMES), st.sampled_from(SCALE_DTYPES))
def test_any_bits_that_are_numbers(seed: int, scheme: QuantScheme, dtype: torch.dtype) -> None:
    """Every exponent there is, side by side in a group or one a row."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (9, 128), generator=generator)
    bits[3:] = (bits[3:] & ~0x7F800000) | (bits[3:, :1] & 0x7F800000)
    weight = bits.to(torch.int32).view(torch.float32)
    weight[~weight.isfinite()] = 1.0
    for isa in ISAS:
        assert_equal_bytes(native(weight, scheme, dtype, isa=isa), weight, scheme, dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block", [(128, 128), (7, 48), (1, 1), (1000, 1000)])
def test_blocks_of_any_size_with_partial_ones_at_the_edges(
    isa: str, block: tuple[int, int]
) -> None:
    rows = random_fp8(150, 160, block)
    scheme = QuantScheme(4, 32)
    assert_equal_bytes(native(rows, scheme, isa=isa), dequantize(rows), scheme)


def test_pieces_of_rows_are_the_whole() -> None:
    """Wherever the pieces begin in a block, and whatever their tensors lie beside."""
    scheme = QuantScheme(4, 32)
    whole = random_fp8(300, 192)
    expected = native(whole, scheme)
    bounds = [0, 5, 128, 200, 300]
    pieces = [
        native(BlockScaledRows(whole.codes[begin:end], whole.scales, BLOCK, begin), scheme)
        for begin, end in itertools.pairwise(bounds)
    ]
    for part in ("packed", "scale", "error", "energy"):
        assert torch.equal(
            torch.cat([getattr(piece, part) for piece in pieces]), getattr(expected, part)
        )


def test_nothing_is_written_outside_of_the_results() -> None:
    weight = random_rows(5, 96)
    scheme = QuantScheme(4, 32)
    expected = native(weight, scheme)
    sizes = [part.nbytes for part in (expected.packed, expected.scale, expected.error)]
    for isa in ISAS:
        held = [torch.full((size + 128,), 0xA5, dtype=torch.uint8) for size in (*sizes, sizes[2])]
        positions = positions_of(scheme)
        _native.Quantizer(isa, 2).quantize(
            weight.data_ptr(),
            2,
            5,
            96,
            (0, 0, 1, 1, 1),
            (4, 32, 0),
            (positions.data_ptr(), len(positions)),
            0,
            tuple(each.data_ptr() + 64 for each in held),  # type: ignore[arg-type]
        )
        for each in held:
            assert bool((each[:64] == 0xA5).all())
            assert bool((each[-64:] == 0xA5).all())
        assert torch.equal(held[0][64:-64].view(torch.int32), expected.packed.view(-1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_none_are_refused_by_name(value: float, dtype: torch.dtype) -> None:
    weight = random_rows(40, 64).to(dtype)
    weight[33, 63] = value
    for isa in ISAS:
        energy = native(weight, QuantScheme(4, 32), isa=isa).energy
        assert energy.isfinite().tolist() == [row != 33 for row in range(40)]
    with pytest.raises(NumericsError, match=r"model\.norm.*1 of NaN"):
        RTN.quantize_rows(weight, QuantScheme(4, 32), torch.bfloat16, "model.norm")


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_codes_that_are_no_numbers_are_refused_by_name(code: int) -> None:
    rows = random_fp8(40, 64)
    rows.codes.view(torch.uint8)[33, 63] = code
    for isa in ISAS:
        energy = native(rows, QuantScheme(4, 32), isa=isa).energy
        assert energy.isfinite().tolist() == [row != 33 for row in range(40)]
    with pytest.raises(NumericsError, match=r"model\.norm.*1 of NaN"):
        RTN.quantize_rows(rows, QuantScheme(4, 32), torch.bfloat16, "model.norm")


@pytest.mark.parametrize("bits", [4, 8])
def test_important_columns_are_read_back_better(bits: int) -> None:
    weight = random_rows(64, 256)
    weights = torch.ones(256)
    weights[::16] = 100.0
    scheme = QuantScheme(bits, 32)

    def error(weights: Tensor | None) -> tuple[float, float]:
        found = RTN.quantize(weight, scheme, torch.bfloat16, "w", weights)
        back = found.codes.float().view(64, 8, 32) * found.scale.float()[:, :, None]
        squares = (weight - back.view(64, 256)).square()
        assert found.relative_error == pytest.approx(float(squares.sum() / weight.square().sum()))
        return float(squares.sum()), float(squares[:, ::16].sum())

    (plain, of_important), (weighted_plain, weighted) = error(None), error(weights)
    assert weighted < 0.7 * of_important
    assert weighted_plain > plain


def test_equal_importance_changes_nothing() -> None:
    weight = random_rows(64, 256)
    for size in (0.25, 1.0, 4.0):  # Powers of two: nothing is rounded otherwise.
        found = native(weight, QuantScheme(4, 32), weights=torch.full((256,), size))
        assert_equal_bytes(found, weight, QuantScheme(4, 32))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_importance_must_be_above_zero(value: float) -> None:
    weights = torch.ones(64)
    weights[5] = value
    for quantize in (RTN.quantize, RTN.quantize_rows):
        with pytest.raises(NumericsError, match="importance"):
            quantize(random_rows(2, 64), QuantScheme(4, 32), torch.bfloat16, "w", weights)


def test_what_the_kernel_does_not_take_is_refused() -> None:
    weight, scheme = random_rows(4, 64), QuantScheme(4, 32)
    assert isinstance(RTN, RowMethod)
    for bad in (weight.double(), weight[0], weight.int()):
        with pytest.raises(KernelError, match="BF16"):
            native(bad, scheme)
    with pytest.raises(KernelError, match="multiple of: expected 32"):
        native(random_rows(2, 48), scheme)
    with pytest.raises(KernelError, match="weights of the columns"):
        native(weight, scheme, weights=torch.ones(63))
    with pytest.raises(KernelError, match="type of scales"):
        native(weight, scheme, torch.float32)
    fp8 = random_fp8(300, 192)
    with pytest.raises(KernelError, match="at least 3 rows"):
        native(BlockScaledRows(fp8.codes, fp8.scales[:2], BLOCK), scheme)
    with pytest.raises(KernelError, match="scales of a row of blocks"):
        native(BlockScaledRows(fp8.codes, fp8.scales[:, :1], BLOCK), scheme)
