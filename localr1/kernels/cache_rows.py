"""How a row of values stands in a cache: as float32, as float16, or in 8 bits.

8 bits: int8 [n + 2 * ceil(n / 32)], n codes, then the little-endian float16 scale of each group of
32 of them, the last group perhaps shorter. For a group:

    s    = float16(largest |x| / 127)         (NaN counts as the largest)
    code = round-half-even(x * (1 / s))       within -127..127; 0 where s is 0, NaN or Inf
    x    = float(code) * float(s)

in float32 operations, each rounded by itself. So a value takes 8.5 bits, and is off by at most
half of s, or by 127 * 2**-25 (3.8e-6) where that is more: a scale below 2**-14 has fewer digits in
float16, and the largest values of a group may lie behind its last code. A group that holds NaN or
Inf is read as NaN.
"""

from typing import Final

import torch
from torch import Tensor

GROUP: Final = 32
SCALE_BYTES: Final = 2
DTYPES: Final = (torch.float32, torch.float16, torch.int8)
"""In the order of `CacheType` in cuda/cpu/kernels.h."""


def row_width(values: int, dtype: torch.dtype) -> int:
    """Elements of a row of so many values."""
    return values + SCALE_BYTES * -(-values // GROUP) if dtype == torch.int8 else values


def store_rows(rows: Tensor, values: Tensor) -> None:
    """values float32 [..., n] -> rows [..., row_width(n)], in place."""
    if rows.dtype != torch.int8:
        rows.copy_(values)
        return
    count = values.shape[-1]
    assert rows.shape[-1] == row_width(count, torch.int8)
    padding = -count % GROUP
    padded = torch.nn.functional.pad(values.float(), (0, padding))
    groups = padded.reshape(*padded.shape[:-1], -1, GROUP)
    scales = (groups.abs().amax(-1) / 127.0).half()
    wide = scales.float()
    usable = (wide > 0) & wide.isfinite()
    inverse = torch.where(usable, 1.0 / wide, 0.0)
    codes = (groups * inverse[..., None]).round().clamp(-127, 127)
    codes = torch.where(usable[..., None], codes, 0.0).flatten(-2)
    rows[..., :count] = codes[..., :count].to(torch.int8)
    rows[..., count:] = scales.contiguous().view(torch.int8)


def load_rows(rows: Tensor, count: int) -> Tensor:
    """rows [..., row_width(count)] -> their values, float32 [..., count]."""
    if rows.dtype != torch.int8:
        return rows.float()
    # A copy, as a view of a row that begins at an odd byte cannot be read as float16.
    scales = rows[..., count:].clone(memory_format=torch.contiguous_format).view(torch.float16)
    spread = scales.float().repeat_interleave(GROUP, dim=-1)[..., :count]
    return rows[..., :count].float() * spread
