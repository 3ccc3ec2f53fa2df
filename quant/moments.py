"""How large the inputs of a model's matrices are, column by column, and what follows for rounding.

The squared error that rounding a matrix W to Q leaves in its output W x is, over the tokens x of a
text, the sum over rows of (W - Q) E[x x^T] (W - Q)^T. Its diagonal part weighs the squared error of
column j by E[x_j^2], the second moment of input j: that is what is kept of a text.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from localr1.checkpoint.expert_ranges import DOWN
from localr1.quant.experts import EXPERTS_PART

RARE_TOKENS = 256
"""An expert's own moments count as much as its layer's when it saw so many tokens."""

SMALLEST = 0.01
"""Columns smaller than this share of the mean, inputs or weights, count as this: one that the text
did not reach tells nothing."""


@dataclass(frozen=True)
class Columns:
    """Of one linear, float64 [in] each. inputs: mean square over the tokens. weights: sum of
    squares over the rows."""

    inputs: Tensor
    weights: Tensor


@dataclass(frozen=True)
class ExpertMoments:
    """Of the routed experts of one layer, E of them. Each token counts by the square of the
    router's weight for the expert, as an error in the expert's output does.

    prefix: "model.layers.N.mlp.experts". gate_up: float64 [E, hidden], mean squares of the inputs
    of gate and up; down: float64 [E, inner], of the inputs of down; both 0 of an expert that no
    token went to. tokens: int64 [E], how many went to each. mass: float64 [E], the sum of their
    squared weights.
    """

    prefix: str
    gate_up: Tensor
    down: Tensor
    tokens: Tensor
    mass: Tensor

    def inputs(self, expert: int, matrix: str) -> Tensor:
        """float64 [in], second moments for one matrix of an expert: its own where it saw many
        tokens, its layer's where it saw none, (n E_expert + k E_layer) / (n + k) with k =
        RARE_TOKENS between them."""
        each = self.down if matrix == DOWN else self.gate_up
        # One that a layer's every token passed by with a weight of 0 has no mass, and none is lost.
        layer = (self.mass @ each) / self.mass.sum().clamp_min(torch.finfo(torch.float64).tiny)
        tokens = float(self.tokens[expert])
        return (tokens * each[expert] + RARE_TOKENS * layer) / (tokens + RARE_TOKENS)


@dataclass(frozen=True)
class ExpertUse:
    """Of the routed experts of all layers, the tokens that each saw: the fewest, the median, and
    how many experts saw none, of how many."""

    fewest: int
    median: int
    unseen: int
    experts: int

    @classmethod
    def of(cls, tokens: Tensor) -> "ExpertUse":
        """tokens: of each expert."""
        return cls(
            int(tokens.min()), int(tokens.median()), int((tokens == 0).sum()), tokens.numel()
        )


class Hessians(Protocol):
    def of(self, module: str) -> Tensor:
        """float64 [in, in], E[x x^T] of a module's inputs, the caller's own."""
        ...


@dataclass(frozen=True)
class SectionMoments:
    """Of one layer, or of the head. columns: by the module's name ("lm_head" though it be the
    embedding). experts: of a mixture's layer. hessians: of the modules of which they were wanted.
    """

    columns: Mapping[str, Columns] = field(default_factory=dict)
    experts: ExpertMoments | None = None
    hessians: Hessians | None = None

    def has(self, module: str) -> bool:
        """Whether the module is of this section."""
        return module in self.columns or (
            self.experts is not None and module.startswith(f"{self.experts.prefix}.")
        )

    def inputs(self, module: str) -> Tensor:
        """float64 [in], the second moments of a module's inputs."""
        _, separator, expert = module.partition(EXPERTS_PART)
        if separator:
            assert self.experts is not None
            number, _, matrix = expert.partition(".")
            return self.experts.inputs(int(number), matrix)
        return self.columns[module].inputs


def importance(inputs: Tensor) -> Tensor:
    """float32 [in], what the squared error of each column counts, from second moments [in]: all
    above 0, 1 in the mean. Rounded to 8 bits of mantissa: measurements that differ by rounding, as
    those of machines do, give the same, but for one in millions."""
    squares = floored(inputs)
    return (squares / squares.mean()).to(torch.bfloat16).to(torch.float32)


def floored(squares: Tensor) -> Tensor:
    """float64 [n], none smaller than SMALLEST squared times the mean; ones where all are 0."""
    mean = float(squares.mean())
    return squares.clamp_min(SMALLEST**2 * mean) if mean > 0 else torch.ones_like(squares)
