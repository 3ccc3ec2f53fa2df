"""Random matrices, backends and comparisons shared by the kernel tests."""

from dataclasses import dataclass

import torch
from foreign_packs import pack_words
from torch import Tensor

from localr1.kernels.api import LayerCache, PackedWeight, RopeTable
from localr1.kernels.codes import unpack_values
from localr1.kernels.native import NativeKernels, available_isas
from localr1.kernels.reference import ReferenceKernels
from localr1.qtypes import Codes, QuantScheme

ISAS = available_isas()
THREADS = (1, 2, 3, 7)
REFERENCE = ReferenceKernels()
_backends: dict[tuple[str, int], NativeKernels] = {}


def native(isa: str, threads: int) -> NativeKernels:
    """One pool for each pair, kept: starting threads for every case would take longer than it."""
    key = (isa, threads)
    if key not in _backends:
        _backends[key] = NativeKernels(threads=threads, isa=isa)
    return _backends[key]


@dataclass(frozen=True)
class Shape:
    """One matrix case. zero: with zero points. extreme: codes at the ends of their range."""

    rows: int
    columns: int
    bits: int
    group: int
    dtype: torch.dtype = torch.bfloat16
    zero: bool = False
    extreme: bool = False
    codes: Codes = Codes.INTEGERS

    @property
    def scheme(self) -> QuantScheme:
        return QuantScheme(self.bits, self.group, not self.zero, self.codes)


def random_packed(shape: Shape, generator: torch.Generator) -> PackedWeight:
    """Codes over the whole range, scales of both signs."""
    scheme, size = shape.scheme, (shape.rows, shape.columns)
    if shape.extreme:
        high = torch.rand(size, generator=generator) < 0.5
        codes = torch.where(high, scheme.code_max, scheme.code_min)
    else:
        codes = torch.randint(scheme.code_min, scheme.code_max + 1, size, generator=generator)
    packed = torch.from_numpy(pack_words((codes - scheme.code_min).numpy(), scheme.bits))
    groups = (shape.rows, shape.columns // shape.group)
    zero = None
    if shape.zero:
        zero = torch.randint(scheme.code_min, scheme.code_max + 1, groups, generator=generator)
        zero = zero.to(torch.int8)
    scale = (torch.randn(groups, generator=generator) * 0.01).to(shape.dtype)
    return PackedWeight(packed, scale, zero, scheme, shape.rows, shape.columns)


def in_8_bits(packed: PackedWeight) -> PackedWeight:
    """The same values, a byte each."""
    rows, columns = packed.out_features, packed.in_features
    stored = unpack_values(packed.packed, packed.scheme, columns).view(torch.uint8) + 128
    scheme = QuantScheme(8, packed.scheme.group_size, packed.scheme.symmetric)
    return PackedWeight(
        stored.view(torch.int32), packed.scale, packed.zero_point, scheme, rows, columns
    )


def random_tokens(num_tokens: int, columns: int, generator: torch.Generator) -> Tensor:
    """Activations of very different sizes from group to group; now and then a group of zeros."""
    x = torch.randn(num_tokens, columns, generator=generator)
    sizes = torch.rand(num_tokens, columns // 32, generator=generator)
    sizes = torch.where(sizes < 0.05, 0.0, torch.exp2(16.0 * sizes - 8.0))
    return (x.view(num_tokens, -1, 32) * sizes[..., None]).view(num_tokens, columns)


def random_cache(
    heads: int, capacity: int, head_dim: int, dtype: torch.dtype, generator: torch.Generator
) -> LayerCache:
    shape = (heads, capacity, head_dim)
    k = torch.randn(shape, generator=generator).to(dtype)
    v = torch.randn(shape, generator=generator).to(dtype)
    return LayerCache(k, v)


def random_rope(positions: int, pairs: int, generator: torch.Generator) -> RopeTable:
    angles = torch.rand(positions, pairs, generator=generator) * 6.28
    return RopeTable(torch.cos(angles), torch.sin(angles))


def assert_same_bits(found: Tensor, expected: Tensor, case: object) -> None:
    """Equal bit for bit; NaN equals NaN, whose sign and payload IEEE leaves open."""
    assert found.shape == expected.shape, case
    assert found.dtype == expected.dtype, case
    if found.dtype == torch.float32:
        same = (found.view(torch.int32) == expected.view(torch.int32)) | (
            found.isnan() & expected.isnan()
        )
    else:
        same = found == expected
    if not bool(same.all()):
        where = (~same).nonzero()[0].tolist()
        raise AssertionError(
            f"{case}: {int((~same).sum())} of {same.numel()} differ, first at {where}: "
            f"found {found[tuple(where)]}, expected {expected[tuple(where)]}"
        )


class Sentinels:
    """Tensors that are the middle of larger buffers whose ends must stay as they are."""

    MARGIN = 64

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def around(self, value: Tensor) -> Tensor:
        """A contiguous copy of value between two margins."""
        pattern = torch.randint(-100, 100, (value.numel() + 2 * self.MARGIN,)).to(value.dtype)
        buffer = pattern.clone()
        inside = buffer[self.MARGIN : self.MARGIN + value.numel()].view(value.shape)
        inside.copy_(value)
        self._buffers.append((buffer, pattern))
        return inside

    def check(self, case: object) -> None:
        for buffer, pattern in self._buffers:
            for ends in (slice(0, self.MARGIN), slice(-self.MARGIN, None)):
                assert torch.equal(buffer[ends], pattern[ends]), f"{case}: written past the end"
