"""Matrices and embeddings, float or packed, behind the same two small protocols."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from localr1.kernels.api import Kernels, Weight
from localr1.layers.norm import rms_norm


class Linear(Protocol):
    """A matrix [out, in], with its bias."""

    def __call__(self, x: Tensor) -> Tensor:
        """x float32 [T, in] -> float32 [T, out]."""
        ...

    def after_norm(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """This matrix applied to rms_norm(x, norm, eps)."""
        ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class FloatLinear:
    """weight: float32 [out, in]. bias: float32 [out] or None."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x float32 [T, in] -> [T, out]."""
        return functional.linear(x, self.weight, self.bias)

    def after_norm(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """This matrix applied to rms_norm(x)."""
        return self(rms_norm(x, norm, eps))

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True)
class PackedLinear:
    """weight: quantized [out, in] in its backend's layout. bias: float32 [out] or None."""

    kernels: Kernels
    weight: Weight
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x float32 [T, in] -> [T, out]."""
        return self.kernels.linear(x, self.weight, self.bias)

    def after_norm(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """This matrix applied to rms_norm(x), in one call."""
        return self.kernels.norm_linear(x, norm, eps, (self.weight,), (self.bias,))

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


class Embedding(Protocol):
    def __call__(self, ids: Tensor) -> Tensor:
        """ids int64 [T], each below the vocabulary's size -> float32 [T, hidden], a new tensor."""
        ...

    def as_head(self) -> Linear:
        """The output head of a tied model, sharing this weight."""
        ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class FloatEmbedding:
    """weight: [vocabulary, hidden], float32 or narrower: only the rows looked up are widened, which
    is exact and spares the table's size in memory. A head needs float32."""

    weight: Tensor

    def __call__(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self.weight).float()

    def as_head(self) -> FloatLinear:
        assert self.weight.dtype == torch.float32
        return FloatLinear(self.weight)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


@dataclass(frozen=True)
class PackedEmbedding:
    """weight: quantized [vocabulary, hidden] in its backend's layout."""

    kernels: Kernels
    weight: Weight

    def __call__(self, ids: Tensor) -> Tensor:
        return self.kernels.embedding(ids, self.weight)

    def as_head(self) -> PackedLinear:
        return PackedLinear(self.kernels, self.weight)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes
