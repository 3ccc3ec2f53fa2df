"""Codes as compressed-tensors stores them (format pack-quantized, little end first)."""

import math

import torch
from torch import Tensor

from localr1.qtypes import QuantScheme


def pack_zero_points(zero_point: Tensor, scheme: QuantScheme) -> Tensor:
    """int8 [out, groups], signed -> int32 [ceil(out*bits/32), groups]: as codes, but along out."""
    return pack_codes(zero_point.T.contiguous(), scheme).T.contiguous()


def pack_codes(codes: Tensor, scheme: QuantScheme) -> Tensor:
    """int8 [out, in], signed -> int32 [out, ceil(in*bits/32)].

    A stored code is the signed value + 2^(bits-1), that of column i at bit i*bits of a row, also
    across words (compressed-tensors 0.20). The last word is filled up with zero bits.
    """
    rows, columns = codes.shape
    words = scheme.packed_words(columns)
    # Adding 2^(bits-1) modulo 256 to the byte; the upper bits of a shorter code then are 0.
    stored = codes.view(torch.uint8) + (1 << (scheme.bits - 1))
    # So many codes end with a byte.
    per_run = 8 // math.gcd(scheme.bits, 8)
    padded = -(-words * 32 // (per_run * scheme.bits)) * per_run
    stored = torch.nn.functional.pad(stored, (0, padded - columns))
    runs = stored.view(rows, -1, per_run)
    packed = torch.zeros(rows, runs.shape[1], per_run * scheme.bits // 8, dtype=torch.uint8)
    for index, code in enumerate(runs.unbind(2)):
        byte, shift = divmod(index * scheme.bits, 8)
        packed[:, :, byte] |= code << shift
        if shift + scheme.bits > 8:
            packed[:, :, byte + 1] |= code >> (8 - shift)
    # Flat first: a single row may carry strides that forbid the view.
    stored = packed.flatten(1)[:, : 4 * words].reshape(-1)
    return stored.view(torch.int32).view(rows, words)
