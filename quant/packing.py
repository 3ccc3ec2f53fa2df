"""Codes as compressed-tensors stores them (format pack-quantized, little end first)."""

import torch
from torch import Tensor

from localr1.qtypes import QuantScheme


def pack_zero_points(zero_point: Tensor, scheme: QuantScheme) -> Tensor:
    """int8 [out, groups], signed -> int32 [ceil(out*bits/32), groups]: as codes, but along out."""
    return pack_codes(zero_point.T.contiguous(), scheme).T.contiguous()


def pack_codes(codes: Tensor, scheme: QuantScheme) -> Tensor:
    """int8 [out, in], signed -> int32 [out, ceil(in*bits/32)].

    A stored code is the signed value + 2^(bits-1). 8 bits: one byte each. 4 bits: the even column
    is the low nibble. The last word is filled up with zero bits.
    """
    rows, columns = codes.shape
    words = scheme.packed_words(columns)
    # Adding 2^(bits-1) modulo 256 to the byte; the upper nibble of a 4-bit code then is 0.
    stored = codes.view(torch.uint8) + (1 << (scheme.bits - 1))
    padding = words * 32 // scheme.bits - columns
    if padding:
        stored = torch.nn.functional.pad(stored, (0, padding))
    if scheme.bits == 4:
        pairs = stored.view(rows, -1, 2)
        stored = pairs[:, :, 0] | (pairs[:, :, 1] << 4)
    return stored.contiguous().view(torch.int32)
