"""Round to nearest with a scale and an integer zero point a group, chosen together.

A group of weights w gets codes q and a zero point z, all integers of the scheme's signed range, and
is read back as s * (q - z). Where a group's largest and smallest weight differ in size, as they do
by chance in most groups of 32, a symmetric range leaves codes unused on one side; z moves the range
to where the weights are. A negative s gains nothing here: it mirrors q and z.

With v = q - z, which for a given z lies between code_min - z and code_max - z, the best scale for
any codes is the least-squares one, s = <w,v> / <v,v>, and the error that it leaves is
|w|^2 - <w,v>^2 / <v,v>. So the search goes through scales (a share of the group's range over the
number of steps) and zero points around the one that centres the range, scores the codes of each by
<w,v>^2 / <v,v>, keeps the best, rounds its scale to the dtype it is stored in and tries the
neighbouring zero points once more. All products may be weighted by column: the error is then that
of what the matrix computes, where the weights are the mean squares of its inputs.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from localr1.errors import NumericsError
from localr1.qtypes import QuantScheme
from localr1.quant.methods.base import SCALE_DTYPES, QuantizedTensor
from localr1.quant.methods.rtn import CHUNK, importance_of_groups, storable
from localr1.quant.one_thread import one_thread_an_operation

NUM_SHARES = 12
LEAST_SHARE = {4: 0.6, 5: 0.8, 6: 0.9, 8: 0.94}
LARGEST_SHARE = 1.05
"""Of the range that the codes are made to cover, by number of bits: below 1 the extremes are
clipped, which pays less the more codes there are."""

NEIGHBOURS = (0, -1, 1, -2, 2)
"""Of the zero point that centres the range. With these shares this is within 1% of the error of all
16 zero points with 100 scales each (groups of 32, 4 bits; Gaussian and Student weights, even and
uneven columns); without -2 and 2 it is within 3%. Of 17 zero points and 100 scales for 5 and 6
bits, even columns: within 1%."""


class RoundWithZeroPoints:
    """The `Method` for asymmetric schemes. Needs memory for the codes and a few MB."""

    name = "rtn"

    def quantize(
        self,
        weight: Tensor,
        scheme: QuantScheme,
        scale_dtype: torch.dtype,
        name: str,
        weights: Tensor | None = None,
    ) -> QuantizedTensor:
        """As `Method.quantize`. weights: float32 [in], positive: what the square of a column's
        error counts. The error that is returned is the plain one all the same."""
        rows, columns = weight.shape
        group = scheme.group_size
        assert not scheme.symmetric
        assert columns % group == 0, "the recipe checks this before any weight is read"
        assert scale_dtype in SCALE_DTYPES
        codes = torch.empty(rows, columns, dtype=torch.int8)
        scale = torch.empty(rows, columns // group, dtype=scale_dtype)
        zero_point = torch.empty(rows, columns // group, dtype=torch.int8)
        flat = codes.view(-1, group), scale.view(-1), zero_point.view(-1)
        groups = weight.reshape(-1, group)
        step = CHUNK // group

        def work(start: int) -> tuple[float, float]:
            part = slice(start, start + step)
            # One column a group: sums over a group then run across the vector lanes.
            w = groups[part].t().to(torch.float32).contiguous()
            h = None if weights is None else importance_of_groups(weights, group, start, w.shape[1])
            energy = w.to(torch.float64).square_().sum()
            if not energy < float("inf"):  # Also false for NaN.
                raise NumericsError(
                    f"{name}: weights",
                    expected="finite numbers that can be squared",
                    found="NaN, Inf or larger ones",
                    fix="The source checkpoint is damaged: download or convert it again.",
                )
            for place, value in zip(flat, quantize_groups(w, h, scheme, scale_dtype), strict=True):
                place[part] = value.t() if value.dim() == 2 else value
            v = flat[0][part].t().float() - flat[2][part].float()
            error = (w - v * flat[1][part].float()).square_().sum(dtype=torch.float64)
            return float(error), float(energy)

        with one_thread_an_operation() as threads, ThreadPoolExecutor(threads) as pool:
            starts = range(0, len(groups), step)
            run = pool.map if min(threads, len(starts)) > 1 else map
            # In the order of the chunks, whichever is done first: the sums are always the same.
            sums = list(run(work, starts))
        error, energy = (sum(column) for column in zip(*sums, strict=True))
        return QuantizedTensor(codes, scale, error / energy if energy else 0.0, zero_point)


def quantize_groups(
    w: Tensor, h: Tensor | None, scheme: QuantScheme, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """w: float32 [group, n], finite. h: float32 [group, n], positive, or None for ones. Returns
    codes float32 [group, n] and zero points float32 [n], both in the scheme's signed range, and
    between them scales float32 [n], exact in `dtype`."""
    hw = w if h is None else h * w
    scale, lowest = _search(w, hw, h, scheme)
    scale = storable(scale, dtype)
    best = _error(w, h, scale, lowest, scheme)
    for neighbour in (0, -1, 1):
        moved = _within(lowest + neighbour, scheme)
        v = _steps(w / scale, moved, scheme)
        dot, square = _dots(hw, h, v)
        refitted = storable(dot / square, dtype)
        error = _error(w, h, refitted, moved, scheme)
        better = error < best
        best = torch.where(better, error, best)
        scale, lowest = torch.where(better, refitted, scale), torch.where(better, moved, lowest)
    zero = scheme.code_min - lowest
    return _steps(w / scale, lowest, scheme) + zero, scale, zero


def _search(w: Tensor, hw: Tensor, h: Tensor | None, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Of the best candidate its least-squares scale, 0 for a group of zeros, and the lowest of its
    steps, [n] each."""
    num_steps = scheme.code_max - scheme.code_min
    low, high = w.amin(0).clamp_(max=0), w.amax(0).clamp_(min=0)
    # A range below 2^-120 has no reciprocal: such a group is treated as zero.
    step = (high - low) / num_steps
    step = torch.where(step > 2.0**-120, step, 1.0)
    w, hw = w / step, hw / step  # In steps, so that no square of a small weight is lost.
    centred = torch.round(low / step)
    best_gain, best_scale = torch.zeros_like(step), torch.zeros_like(step)
    best_lowest = _within(centred, scheme)
    for share in shares_of(scheme):
        ratio = torch.round(w / share)
        for neighbour in NEIGHBOURS:
            lowest = _within(centred + neighbour, scheme)
            dot, square = _dots(hw, h, _steps(ratio, lowest, scheme))
            gain = dot * dot / square
            better = gain > best_gain
            best_gain = torch.where(better, gain, best_gain)
            best_scale = torch.where(better, dot / square * step, best_scale)
            best_lowest = torch.where(better, lowest, best_lowest)
    return best_scale, best_lowest


def shares_of(scheme: QuantScheme) -> list[float]:
    """From LEAST_SHARE to LARGEST_SHARE."""
    least = LEAST_SHARE[scheme.bits]
    span = LARGEST_SHARE - least
    return [least + span * index / (NUM_SHARES - 1) for index in range(NUM_SHARES)]


def _within(lowest: Tensor, scheme: QuantScheme) -> Tensor:
    """code_min - z for a z in the signed range."""
    return lowest.clamp(scheme.code_min - scheme.code_max, 0)


def _steps(ratio: Tensor, lowest: Tensor, scheme: QuantScheme) -> Tensor:
    """v = q - z: integers of [lowest, lowest + code_max - code_min]."""
    highest = lowest + (scheme.code_max - scheme.code_min)
    return torch.minimum(torch.maximum(ratio.round(), lowest), highest)


def _dots(hw: Tensor, h: Tensor | None, v: Tensor) -> tuple[Tensor, Tensor]:
    """<w,v> and <v,v> of each group, [n]; the second above 0."""
    square = v * v if h is None else v * v * h
    total = square.sum(0)
    return (hw * v).sum(0), torch.where(total > 0, total, 1.0)


def _error(
    w: Tensor, h: Tensor | None, scale: Tensor, lowest: Tensor, scheme: QuantScheme
) -> Tensor:
    difference = (w - _steps(w / scale, lowest, scheme) * scale).square_()
    return (difference if h is None else difference * h).sum(0)
