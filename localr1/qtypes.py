"""Quantized weight types: name, bits, group, bytes. Pure Python: never imports torch.

The packed forms themselves are defined once for the native code in cuda/blocks.h; tests hold the
sizes computed here against those compiled there.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import Enum

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

NF4_STEPS = (-124, -86, -65, -49, -35, -23, -11, 0, 10, 20, 31, 42, 55, 70, 90, 124)
"""What the codes of Codes.NF4 are: its numbers (Dettmers et al. 2023, "QLoRA", appendix E) in steps
of 1/STEPS_OF_ONE, each within 0.0037 of a whole number of them. Of all numbers of steps up to 127
this one leaves the least error: relative to Gaussian weights a squared one of 2.3e-5 (127: 3.7e-5)
beside the 8.46e-3 of NF4 itself, which makes it 8.47e-3."""
STEPS_OF_ONE = 124.11384722404028
"""The least-squares number of steps that 1 is, over the codes of Gaussian weights."""


class Codes(Enum):
    """What a code stands for: an integer, or one of the 16 values of a codebook."""

    INTEGERS = "int"
    NF4 = "nf4"


_NF4_CODE_TYPE = 20


def code_name(code_type: int) -> str:
    """ "int4" or "nf4", which the GPU kernels are named by. code_type: of `CodeType` in
    cuda/blocks.h."""
    return Codes.NF4.value if code_type == _NF4_CODE_TYPE else f"int{code_type}"


@dataclass(frozen=True)
class QuantScheme:
    """Integer weights in groups along the input dimension with one scale per group.

    bits: of a code, of SUPPORTED_BITS. group_size: columns per scale: 32, 64 or 128. symmetric: no
    zero point. codes: the integers themselves, or indices of NF4_STEPS, of 4 bits and symmetric.
    """

    bits: int
    group_size: int
    symmetric: bool = True
    codes: Codes = Codes.INTEGERS

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
        assert self.codes is Codes.INTEGERS or (self.bits == 4 and self.symmetric)

    @property
    def name(self) -> str:
        return f"{self.code_name}-g{self.group_size}" + ("" if self.symmetric else "-zp")

    @property
    def code_name(self) -> str:
        return code_name(self.code_type)

    @property
    def code_type(self) -> int:
        """The number of `CodeType` in cuda/blocks.h."""
        return _NF4_CODE_TYPE if self.codes is Codes.NF4 else self.bits

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
