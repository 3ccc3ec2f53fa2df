"""Rotary position embedding: the variants released checkpoints use, and the table kernels read.

Each variant turns head_dim into inverse frequencies (radians a position) and one factor that
multiplies cos and sin. Positions are absolute; the layout is "half": value i is paired with
value i + head_dim/2.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from localr1.errors import MemoryLimitError
from localr1.kernels.api import RopeTable

INITIAL_POSITIONS = 512
"""Rows the table starts with; it doubles from there."""


@dataclass(frozen=True)
class DefaultRope:
    """Frequencies theta**(-2i/head_dim) (Su et al. 2021, "RoFormer", section 3.2.2)."""

    theta: float

    def inverse_frequencies(self, head_dim: int) -> Tensor:
        """float32 [head_dim/2]."""
        return 1.0 / torch.pow(self.theta, self._exponents(head_dim))

    @staticmethod
    def _exponents(head_dim: int) -> Tensor:
        return torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim

    @property
    def attention_factor(self) -> float:
        """Multiplies cos and sin, so that a query-key product grows by its square."""
        return 1.0

    @property
    def score_factor(self) -> float:
        """Multiplies whole query-key products in latent attention, where the larger part of a head
        has no position that `attention_factor` could reach."""
        return 1.0


@dataclass(frozen=True)
class LinearRope(DefaultRope):
    """All positions compressed by one factor (Chen et al. 2023, "Position Interpolation")."""

    factor: float

    def inverse_frequencies(self, head_dim: int) -> Tensor:
        return super().inverse_frequencies(head_dim) / self.factor


@dataclass(frozen=True)
class Llama3Rope(DefaultRope):
    """Llama 3.1: long wavelengths divided by factor, short ones kept, a linear blend between.

    The bounds are wavelengths in positions: original_positions / low_frequency_factor and
    original_positions / high_frequency_factor.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_positions: int

    def inverse_frequencies(self, head_dim: int) -> Tensor:
        frequencies = super().inverse_frequencies(head_dim)
        # How often a pair turns round within the original context.
        turns = self.original_positions / (2 * math.pi / frequencies)
        span = self.high_frequency_factor - self.low_frequency_factor
        kept = ((turns - self.low_frequency_factor) / span).clamp(0.0, 1.0)
        return (1.0 - kept) * frequencies / self.factor + kept * frequencies


@dataclass(frozen=True)
class YarnRope(DefaultRope):
    """YaRN (Peng et al. 2023, sections 3.2-3.4): pairs that turn more than beta_fast times within
    the original context are kept, those under beta_slow turns are divided by factor, a linear ramp
    over the pair index between them; cos and sin are multiplied by an attention factor.

    truncate: round the ramp's ends outward to whole pair indices.
    fixed_attention_factor: replaces the paper's 0.1*ln(factor) + 1, or the ratio of two of them
    with mscale and mscale_all_dim in place of 1.
    attention_multiplier: multiplies what results (`attn_factor` of vLLM and SGLang, which
    DeepSeek-R1-0528-Qwen3-8B was released with).
    """

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    fixed_attention_factor: float | None = None
    attention_multiplier: float = 1.0

    def inverse_frequencies(self, head_dim: int) -> Tensor:
        frequencies = super().inverse_frequencies(head_dim)
        first = self._pair_turning(self.beta_fast, head_dim)
        last = self._pair_turning(self.beta_slow, head_dim)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        if first == last:
            last += 0.001  # A step, not a division by zero.
        pairs = torch.arange(head_dim // 2, dtype=torch.float32)
        kept = 1.0 - ((pairs - first) / (last - first)).clamp(0.0, 1.0)
        stretched = 1.0 / (self.factor * torch.pow(self.theta, self._exponents(head_dim)))
        return stretched * (1.0 - kept) + frequencies * kept

    def _pair_turning(self, turns: float, head_dim: int) -> float:
        """The (fractional) pair index that turns so many times within the original context."""
        wavelength = self.original_positions / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(self.theta))

    @property
    def attention_factor(self) -> float:
        if self.fixed_attention_factor is not None:
            factor = self.fixed_attention_factor
        elif self.mscale and self.mscale_all_dim:
            factor = _magnitude(self.factor, self.mscale) / _magnitude(
                self.factor, self.mscale_all_dim
            )
        else:
            factor = _magnitude(self.factor, 1.0)
        return factor * self.attention_multiplier

    @property
    def score_factor(self) -> float:
        if not self.mscale_all_dim:
            return 1.0
        return _magnitude(self.factor, self.mscale_all_dim) ** 2


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


RopeVariant = DefaultRope | LinearRope | Llama3Rope | YarnRope


class Rope:
    """The cos and sin of one model's positions, computed in float32 as far as they are needed."""

    def __init__(self, variant: RopeVariant, head_dim: int) -> None:
        self._frequencies = variant.inverse_frequencies(head_dim)
        self._attention_factor = variant.attention_factor
        self._table = self._build(0)

    def table(self, positions: int) -> RopeTable:
        """A table of at least so many positions. Raises MemoryLimitError when it does not fit."""
        rows = self._table.cos.shape[0]
        if rows < positions:
            self._table = self._build(max(positions, 2 * rows, INITIAL_POSITIONS))
        return self._table

    def _build(self, positions: int) -> RopeTable:
        try:
            steps = torch.arange(positions, dtype=torch.float32)
            angles = torch.outer(steps, self._frequencies)
            cos, sin = angles.cos(), angles.sin()
        except RuntimeError as error:  # What torch's CPU allocator raises; nothing else can fail.
            raise MemoryLimitError(
                "position table",
                expected=f"memory for {positions} positions",
                found=str(error).splitlines()[0],
                fix="Use a smaller context.",
            ) from error
        return RopeTable(cos * self._attention_factor, sin * self._attention_factor)


def apply_rope(x: Tensor, table: RopeTable, start: int) -> Tensor:
    """Rotate x [T, heads, head_dim] by positions start..start+T-1; returns a new tensor."""
    tokens, half = x.shape[0], x.shape[2] // 2
    cos = table.cos[start : start + tokens, None, :]
    sin = table.sin[start : start + tokens, None, :]
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
