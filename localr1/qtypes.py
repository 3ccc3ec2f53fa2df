"""Quantized weight types: name, bits, group, bytes. Pure Python: never imports torch.

The packed forms themselves are defined once for the native code in cuda/blocks.h; tests hold the
sizes computed here against those compiled there.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from localr1.errors import UnsupportedError

ACTIVATION_GROUP = 32
"""Columns that share one int8 activation scale (the arithmetic contract, docs/arithmetic.md)."""

SUPPORTED_BITS = (4, 5, 6, 8)
"""That weights are stored in."""
PORTABLE_BITS = (4, 8)
"""That every other runtime reads too (docs/quantization.md)."""
CARD_BITS = (4, 8)
"""That kernels of a GPU compute with; others are held as 8 of the same values there."""
SUPPORTED_GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class QuantScheme:
    """Integer weights in groups along the input dimension with one scale per group.

    bits: of SUPPORTED_BITS. group_size: columns per scale: 32, 64 or 128. symmetric: no zero point.
    """

    bits: int
    group_size: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise UnsupportedError(
                "quantization scheme", expected="4, 5, 6 or 8 bits", found=f"{self.bits}"
            )
        if self.group_size not in SUPPORTED_GROUPS:
            raise UnsupportedError(
                "quantization scheme",
                expected="a group size of 32, 64 or 128",
                found=f"{self.group_size}",
            )

    @property
    def name(self) -> str:
        return f"int{self.bits}-g{self.group_size}" + ("" if self.symmetric else "-zp")

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight on disk: code, 16-bit scale, zero point as wide as a code."""
        side = 16 + (0 if self.symmetric else self.bits)
        return self.bits + side / self.group_size

    @property
    def code_min(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def code_max(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def held_in(self, numbers_of_bits: Collection[int]) -> "QuantScheme":
        """The scheme of the same values in the fewest of these numbers of bits, of which one is
        8."""
        return replace(self, bits=min(bits for bits in numbers_of_bits if bits >= self.bits))

    def packed_words(self, in_features: int) -> int:
        """int32 words a row of `weight_packed` takes (compressed-tensors, pack-quantized)."""
        return -(-in_features * self.bits // 32)
