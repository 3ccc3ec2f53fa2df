"""Packed codes (api.PackedWeight) and the values that they are."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from localr1.qtypes import NF4_STEPS, Codes, QuantScheme


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """int32 [rows, words] -> int8 [rows, count]: signed values, the first `count` of each row.

    bits: of SUPPORTED_BITS. On a little-endian machine the bytes of a word are in the order of
    their codes.
    """
    # Flat first: a row of one word may carry strides that forbid the view.
    stored = packed.reshape(-1).view(torch.uint8).view(packed.shape[0], -1)
    # Subtracting 2**(bits-1) modulo 256 gives the signed value's byte.
    return (_fields(stored, bits)[:, :count] - (1 << (bits - 1))).contiguous().view(torch.int8)


def unpack_values(packed: Tensor, scheme: QuantScheme, count: int) -> Tensor:
    """int32 [rows, words] -> int8 [rows, count]: what the codes stand for, in units of the scale
    and before a zero point is taken off."""
    codes = unpack_codes(packed, scheme.bits, count)
    if scheme.codes is Codes.INTEGERS:
        return codes
    return torch.tensor(NF4_STEPS, dtype=torch.int8)[codes.long() - scheme.code_min]


def widened(packed: Tensor, scheme: QuantScheme, held: QuantScheme) -> Tensor:
    """int32 [out, words] of `scheme` -> int32 [out, words] of the same values in `held`, of 8 bits;
    what is of `held` already stays as it is."""
    if held == scheme:
        return packed
    assert held.bits == 8
    assert scheme.codes is Codes.INTEGERS
    stored = packed.reshape(-1).view(torch.uint8).view(len(packed), -1)
    # Groups end with a word: all of these are codes.
    return _fields(stored, scheme.bits).add_(scheme.code_min - held.code_min).view(torch.int32)


def _fields(stored: Tensor, bits: int) -> Tensor:
    """uint8 [rows, bytes] -> uint8 [rows, n >= 8*bytes/bits]: the unsigned codes."""
    if bits == 8:
        return stored
    # So many codes end with a byte.
    per_run = 8 // math.gcd(bits, 8)
    run_bytes = per_run * bits // 8
    stored = functional.pad(stored, (0, -stored.shape[1] % run_bytes))
    runs = stored.view(len(stored), -1, run_bytes)
    codes = torch.empty(*runs.shape[:2], per_run, dtype=torch.uint8)
    for index in range(per_run):
        byte, shift = divmod(index * bits, 8)
        code = runs[:, :, byte] >> shift
        if shift + bits > 8:
            code |= runs[:, :, byte + 1] << (8 - shift)
        codes[:, :, index] = code & ((1 << bits) - 1)
    return codes.flatten(1)
