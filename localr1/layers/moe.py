"""The mixture-of-experts block: x += shared(n) + sum of weight * expert(n), n = rms_norm(x).

Shapes: T tokens, k experts a token, E experts, I their inner size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional

from localr1.layers.linear import Linear, PackedLinear
from localr1.layers.mlp import MlpBlock
from localr1.layers.norm import rms_norm
from localr1.layers.router import Router, Routing


class ExpertSource(Protocol):
    """The routed experts of one layer, wherever their weights lie."""

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        """x float32 [T, hidden], normed -> a new tensor [T, hidden]: each token's experts, weighted
        and summed in the router's order."""
        ...


@dataclass(frozen=True)
class MoeBlock:
    """norm: [hidden]. shared: a gated MLP with the same norm that every token goes through."""

    norm: Tensor
    router: Router
    experts: ExpertSource
    shared: MlpBlock | None
    eps: float

    def __call__(self, x: Tensor) -> None:
        """x float32 [T, hidden] is added to in place."""
        normed = rms_norm(x, self.norm, self.eps)
        routed = self.experts(normed, self.router(normed))
        if self.shared is not None:
            self.shared(x)
        x += routed


@dataclass(frozen=True)
class FloatExperts:
    """gate_up: float32 [E, 2I, hidden], an expert's gate rows above its up rows; down: float32
    [E, hidden, I]. One pass per chosen expert, over all the tokens that chose it."""

    gate_up: Tensor
    down: Tensor

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        outputs = x.new_empty(routing.experts.numel(), x.shape[1])
        for expert, pairs in pairs_by_expert(routing.experts):
            chosen = x[pairs // routing.experts.shape[1]]
            gate, up = functional.linear(chosen, self.gate_up[expert]).chunk(2, dim=1)
            outputs[pairs] = functional.linear(functional.silu(gate) * up, self.down[expert])
        return combine(outputs, routing.weights)


@dataclass(frozen=True)
class ExpertMatrices:
    """gate, up: [I, hidden]; down: [hidden, I]."""

    gate: Linear
    up: Linear
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        """x float32 [n, hidden] -> [n, hidden]."""
        gate, up = self.gate, self.up
        if isinstance(gate, PackedLinear) and isinstance(up, PackedLinear):
            return self.down(gate.kernels.gate_up_silu(x, gate.weight, up.weight))
        return self.down(functional.silu(gate(x)) * up(x))


@dataclass(frozen=True)
class SeparateExperts:
    """Experts whose matrices are packed, or packed only in part, one after another."""

    experts: Sequence[ExpertMatrices]

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        outputs = x.new_empty(routing.experts.numel(), x.shape[1])
        for expert, pairs in pairs_by_expert(routing.experts):
            outputs[pairs] = self.experts[expert](x[pairs // routing.experts.shape[1]])
        return combine(outputs, routing.weights)


def pairs_by_expert(experts: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each chosen expert with its places in the flattened choice [T*k], ascending."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    begin = 0
    for expert, count in enumerate(flat.bincount().tolist()):
        if count:
            yield expert, order[begin : begin + count]
            begin += count


def combine(outputs: Tensor, weights: Tensor) -> Tensor:
    """outputs [T*k, hidden], weights [T, k] -> [T, hidden], added up from the first column on."""
    columns = outputs.view(*weights.shape, -1).unbind(1)
    total = columns[0] * weights[:, 0, None]
    for column, weight in zip(columns[1:], weights.unbind(1)[1:], strict=True):
        total += column * weight[:, None]
    return total
