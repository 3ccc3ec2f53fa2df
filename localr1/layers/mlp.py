"""The gated MLP block: x += down(silu(gate(n)) * up(n)), n = rms_norm(x)."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional

from localr1.kernels.api import Kernels, MlpWeights
from localr1.layers.linear import Linear, PackedLinear
from localr1.layers.norm import rms_norm


class MlpBlock(Protocol):
    def __call__(self, x: Tensor) -> None:
        """x float32 [T, hidden] is added to in place."""
        ...


@dataclass(frozen=True)
class MlpParts:
    """norm: [hidden]; gate, up: [intermediate, hidden]; down: [hidden, intermediate]."""

    norm: Tensor
    gate: Linear
    up: Linear
    down: Linear
    eps: float


@dataclass(frozen=True)
class ComposedMlp:
    """Any mix of float and packed matrices, one operation after another."""

    parts: MlpParts

    def __call__(self, x: Tensor) -> None:
        parts = self.parts
        normed = rms_norm(x, parts.norm, parts.eps)
        x += parts.down(functional.silu(parts.gate(normed)) * parts.up(normed))


@dataclass(frozen=True)
class FusedMlp:
    """All matrices packed: one kernel call. block: `weights`, bound by the kernels."""

    kernels: Kernels
    block: object
    weights: MlpWeights

    def __call__(self, x: Tensor) -> None:
        self.kernels.mlp_block(x, self.block)


def build_mlp(parts: MlpParts, kernels: Kernels) -> MlpBlock:
    """The fastest block these matrices allow."""
    gate, up, down = parts.gate, parts.up, parts.down
    if not (
        isinstance(gate, PackedLinear)
        and isinstance(up, PackedLinear)
        and isinstance(down, PackedLinear)
    ):
        return ComposedMlp(parts)
    weights = MlpWeights(
        norm=parts.norm,
        gate=gate.weight,
        up=up.weight,
        down=down.weight,
        gate_bias=gate.bias,
        up_bias=up.bias,
        down_bias=down.bias,
        eps=parts.eps,
    )
    return FusedMlp(kernels, kernels.bind_mlp(weights), weights)
