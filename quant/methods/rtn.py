"""Round to nearest, with a signed scale chosen per group by squared error.

A group of weights w gets codes q = clamp(round(w / s)) and is read back as q * s. For any codes the
best scale is the least-squares one, s = <w,q> / <q,q>, and the error it leaves is
|w|^2 - <w,q>^2 / <q,q>. So the search tries scales that put the group's largest weight at a range
of positions near either end of the code range, scores the codes of each by <w,q>^2 / <q,q>, and
keeps the least-squares scale of the best. The range has one code more on its negative side, hence
both signs. That scale is then rounded to the dtype it is stored in, and only then are the final
codes chosen: what is measured is what is read back.

Where columns differ in importance h, every product and every square counts h times:
s = <hw,q> / <hq,q>, and the error is that of sum(h * (w - q*s)^2).

`quantize` is the definition, in torch. `quantize_rows` is the same from the native kernel
(cuda/cpu/round_to_nearest.h), byte for byte: so every operation rounds by itself, and sums run in
the order of `_sum`.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from localr1.checkpoint.fp8 import dequantize
from localr1.errors import NumericsError, UnsupportedError
from localr1.kernels import quantize as native
from localr1.kernels.block_scaled import BlockScaledRows
from localr1.kernels.quantize import PackedRows
from localr1.qtypes import QuantScheme
from localr1.quant.methods.base import SCALE_DTYPES, QuantizedTensor, relative_error
from localr1.quant.one_thread import one_thread_an_operation

CANDIDATES_PER_SIGN = 12
"""Twice as many lower the 4-bit error by 0.2%, 6 instead raise it by 0.5% (Gaussian weights)."""

POSITIONS = {4: (0.875, 1.125), 5: (0.84, 1.06), 6: (0.875, 1.02), 8: (0.92, 1.004)}
"""By number of bits the first and the last candidate, as a share of the last code. The more codes
there are, the less clipping pays, and the more different phases of the grid do. Against 320
candidates from 0.6 (8 bits: 0.85) to 1.2 the error is at most 0.1% larger for 4 bits, 0.1% for 5,
0.5% for 6 and 1.4% for 8 (groups of 32 and 64, Gaussian and Student weights)."""

REFITS = 1
"""Alternations of codes and scale after the search; a second gains less than 0.1%. The native
kernel has this one written out."""

SUM_PHASES = 4
"""Independent sums that a group's is made of (kSumPhases of cuda/cpu/quantize_weights.h)."""

CHUNK = 1 << 17
"""Weights worked on at once by one thread: its float32 buffers stay in a core's own cache."""


@dataclass(frozen=True)
class _Buffers:
    codes: Tensor  # float32 [group, n]
    product: Tensor  # float32 [group, n]


class RoundToNearest:
    """`Method` and `RowMethod` without calibration data. Needs memory for the codes and a few
    MB."""

    name = "rtn"

    def quantize(
        self,
        weight: Tensor,
        scheme: QuantScheme,
        scale_dtype: torch.dtype,
        name: str,
        weights: Tensor | None = None,
    ) -> QuantizedTensor:
        """As `Method.quantize`. weights: float32 [in], positive, of an order of 1: what the square
        of a column's error counts. The error that is returned is the plain one all the same."""
        rows, columns = weight.shape
        group = scheme.group_size
        _check(weight, scheme, scale_dtype, name, weights)
        codes = torch.empty(rows, columns, dtype=torch.int8)
        scale = torch.empty(rows, columns // group, dtype=scale_dtype)
        error = torch.empty(rows, columns // group)
        energy = torch.empty(rows, columns // group, dtype=torch.float64)
        flat = [tensor.view(-1) for tensor in (scale, error, energy)]
        flat_codes = codes.view(-1, group)
        groups = weight.reshape(-1, group)
        step = CHUNK // group

        def work(start: int) -> None:
            part = slice(start, start + step)
            # One column a group: sums over a group then run across the vector lanes.
            w = groups[part].t().to(torch.float32).contiguous()
            h = None if weights is None else importance_of_groups(weights, group, start, w.shape[1])
            best_codes, best_scale, best_error = _quantize_groups(w, h, scheme, scale_dtype)
            flat_codes[part] = best_codes.t()
            for tensor, value in zip(
                flat, (best_scale, best_error, _sum(w.to(torch.float64).square_())), strict=True
            ):
                tensor[part] = value

        with one_thread_an_operation() as threads, ThreadPoolExecutor(threads) as pool:
            starts = range(0, len(groups), step)
            # On a busy machine handing a small expert to another thread takes longer than the work.
            run = pool.map if min(threads, len(starts)) > 1 else map
            for _ in run(work, starts):
                pass
        energies = _row_sums(energy)
        check_energy(energies, weight, name)
        return QuantizedTensor(codes, scale, relative_error(_row_sums(error), energies))

    def quantize_rows(
        self,
        rows: Tensor | BlockScaledRows,
        scheme: QuantScheme,
        scale_dtype: torch.dtype,
        name: str,
        weights: Tensor | None = None,
    ) -> PackedRows:
        """As `RowMethod.quantize_rows`, with torch's number of threads. weights: as `quantize`."""
        _check(rows, scheme, scale_dtype, name, weights)
        result = native.quantize_rows(
            rows,
            scheme,
            scale_dtype,
            positions_of(scheme),
            weights,
            threads=torch.get_num_threads(),
        )
        check_energy(result.energy, rows, name)
        return result


def _check(
    rows: Tensor | BlockScaledRows,
    scheme: QuantScheme,
    scale_dtype: torch.dtype,
    name: str,
    weights: Tensor | None,
) -> None:
    if not scheme.symmetric:
        raise UnsupportedError(f"{name}: method rtn", expected="a symmetric scheme")
    assert rows.shape[1] % scheme.group_size == 0, (
        "the recipe checks this before any weight is read"
    )
    assert scale_dtype in SCALE_DTYPES
    if weights is not None and not bool((weights.isfinite() & (weights > 0)).all()):
        raise NumericsError(
            f"{name}: importance of its columns", expected="finite numbers above 0", found="others"
        )


def check_energy(energy: Tensor, rows: Tensor | BlockScaledRows, name: str) -> None:
    """energy: the sums of squares of these rows, in which NaN and Inf cannot hide. Raises
    NumericsError."""
    if bool(energy.isfinite().all()):
        return
    weight = dequantize(rows) if isinstance(rows, BlockScaledRows) else rows
    raise NumericsError(
        f"{name}: weights",
        expected="finite numbers",
        found=f"{int((~weight.isfinite()).sum())} of NaN or Inf",
        fix="The source checkpoint is damaged: download or convert it again.",
    )


def importance_of_groups(weights: Tensor, group: int, start: int, count: int) -> Tensor:
    """float32 [group, count], that of the groups from `start` on, counted row after row."""
    of_groups = weights.view(-1, group)
    return of_groups[torch.arange(start, start + count) % len(of_groups)].t().contiguous()


def _quantize_groups(
    w: Tensor, h: Tensor | None, scheme: QuantScheme, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """w: float32 [group, n], h: its importance or None -> codes float32 [group, n], scale float32
    [n] (exact in `dtype`), and squared error [n]."""
    buffers = _Buffers(torch.empty_like(w), torch.empty_like(w))
    hw = w if h is None else h * w
    scale = storable(_search(w, hw, h, scheme, buffers), dtype)
    best_scale = scale
    best_error = best_choice = torch.full_like(scale, torch.inf)
    for refit in range(REFITS + 1):
        _round_to_codes(w, scale, scheme, buffers.codes)
        error, choice = _squared_errors(w, h, scale, buffers)
        better = (choice < best_choice) if refit else torch.ones_like(choice, dtype=torch.bool)
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        # NaN, of numbers too large for their scale, is the worst.
        best_choice = torch.where(choice < best_choice, choice, best_choice)
        if refit < REFITS:
            dot, square = _dots(hw, h, buffers)
            scale = storable(dot / square, dtype)
    _round_to_codes(w, best_scale, scheme, buffers.codes)
    return buffers.codes, best_scale, best_error


def _search(
    w: Tensor, hw: Tensor, h: Tensor | None, scheme: QuantScheme, buffers: _Buffers
) -> Tensor:
    """The least-squares scale of the best candidate codes, [n]; 0 where the group is zero."""
    high, low = w.amax(0), w.amin(0)
    extreme = torch.where(high >= -low, high, low)
    per_weight = torch.where(extreme == 0, 0.0, 1.0 / extreme)
    # 1 / extreme overflows below 2^-128: such a group is treated as zero.
    per_weight = torch.where(torch.isfinite(per_weight), per_weight, 0.0)
    best_gain = torch.zeros_like(extreme)
    best_scale = torch.zeros_like(extreme)
    for position in positions_of(scheme):
        torch.mul(w, per_weight * position, out=buffers.codes)
        buffers.codes.round_().clamp_(scheme.code_min, scheme.code_max)
        dot, square = _dots(hw, h, buffers)
        gain = dot * dot / square
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, dot / square, best_scale)
    return best_scale


def positions_of(scheme: QuantScheme) -> Tensor:
    """Where a candidate puts the group's largest weight, in codes, float32 [n]: a share of the last
    code of each end, beyond which the weight is clipped."""
    lowest, highest = POSITIONS[scheme.bits]
    steps = [
        lowest + (highest - lowest) * index / (CANDIDATES_PER_SIGN - 1)
        for index in range(CANDIDATES_PER_SIGN)
    ]
    # The positive end is one code nearer: 7.5 rounds and clips to 7 as well as 8.5 does to -8.
    return torch.tensor(
        [
            *(scheme.code_min * step for step in steps),
            *((scheme.code_max + 0.5) * step for step in steps),
        ],
        dtype=torch.float32,
    )


def _round_to_codes(w: Tensor, scale: Tensor, scheme: QuantScheme, out: Tensor) -> None:
    torch.div(w, scale, out=out)
    out.round_().clamp_(scheme.code_min, scheme.code_max)


def _dots(hw: Tensor, h: Tensor | None, buffers: _Buffers) -> tuple[Tensor, Tensor]:
    """<hw, codes> and <h codes, codes> of each group, [n]; the second at least 1, or above 0."""
    torch.mul(hw, buffers.codes, out=buffers.product)
    dot = _sum(buffers.product)
    if h is None:
        torch.mul(buffers.codes, buffers.codes, out=buffers.product)
    else:
        torch.mul(h, buffers.codes, out=buffers.product).mul_(buffers.codes)
    least = 1.0 if h is None else torch.finfo(torch.float32).tiny
    return dot, _sum(buffers.product).clamp_(min=least)


def _squared_errors(
    w: Tensor, h: Tensor | None, scale: Tensor, buffers: _Buffers
) -> tuple[Tensor, Tensor]:
    """Plain and, which decides, weighted, [n]."""
    torch.mul(buffers.codes, -scale, out=buffers.product)
    left = buffers.product.add_(w)
    if h is None:
        plain = _sum(left.square_())
        return plain, plain
    return _sum(left.square()), _sum((h * left).mul_(left))


def _sum(values: Tensor) -> Tensor:
    """[group, n] -> [n]: value i of a group is added to sum i mod SUM_PHASES, one after another,
    then the sums by halves."""
    parts = values.view(-1, SUM_PHASES, values.shape[1])
    sums = parts[0].clone()
    for part in parts[1:]:
        sums += part
    return (sums[0] + sums[2]) + (sums[1] + sums[3])


def _row_sums(groups: Tensor) -> Tensor:
    """[rows, groups of a row] -> float64 [rows], added one after another."""
    sums = torch.zeros(len(groups), dtype=torch.float64)
    for column in groups.unbind(1):
        sums += column
    return sums


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as it will be read back, in float32. Never zero, subnormal or infinite: a group of
    zeros gets 1 (its codes are 0), a tiny scale the dtype's smallest normal number."""
    limits = torch.finfo(dtype)
    tiny = torch.copysign(torch.full_like(scale, limits.tiny), scale)
    usable = torch.where(scale.abs() < limits.tiny, tiny, scale)
    usable = usable.clamp(limits.min, limits.max)
    return torch.where(scale == 0, 1.0, usable.to(dtype).to(torch.float32))
