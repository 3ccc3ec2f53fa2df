"""The mixture-of-experts block: x += shared(n) + sum of weight * expert(n), n = rms_norm(x).

Shapes: T tokens, k experts a token, E experts, I their inner size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional

from localr1.kernels.api import ExpertBank, Kernels, Routing
from localr1.kernels.mixture import combine, pairs_by_expert
from localr1.layers.linear import Linear, PackedLinear
from localr1.layers.mlp import FusedMlp, MlpBlock
from localr1.layers.router import Router


class ExpertSource(Protocol):
    """The routed experts of one layer, wherever their weights lie."""

    def __call__(self, x: Tensor, routing: Routing, residual: Tensor) -> None:
        """x float32 [T, hidden], normed. residual [T, hidden] gains the sum of each token's
        experts, weighted and summed in the router's order."""
        ...


class PassObserver(Protocol):
    """Told of every run through all layers: what experts are moved for."""

    def begin_pass(self, num_tokens: int) -> None: ...

    def end_pass(self) -> None:
        """Also after an error."""
        ...


@dataclass(frozen=True)
class MoeBlock:
    """norm: [hidden]. shared: a gated MLP with the same norm that every token goes through."""

    kernels: Kernels
    norm: Tensor
    router: Router
    experts: ExpertSource
    shared: MlpBlock | None
    eps: float

    @property
    def is_under_contract(self) -> bool:
        """Whether each token has the bits it would have alone (docs/arithmetic.md)."""
        if self.shared is not None and not isinstance(self.shared, FusedMlp):
            return False
        return not isinstance(self.experts, (FloatExperts, SeparateExperts))

    def __call__(self, x: Tensor) -> None:
        """x float32 [T, hidden] is added to in place."""
        normed = self.kernels.rms_norm(x, self.norm, self.eps)
        routing = self.router(normed)
        if self.shared is not None:
            self.shared(x)
        self.experts(normed, routing, x)


@dataclass(frozen=True)
class PackedExperts:
    """All matrices packed, those of a kind alike: one kernel call for all tokens and experts."""

    kernels: Kernels
    bank: ExpertBank

    def __call__(self, x: Tensor, routing: Routing, residual: Tensor) -> None:
        self.kernels.mix_experts(x, routing, self.bank, residual)


@dataclass(frozen=True)
class UnreadExperts:
    """Packed experts, all alike, that were left in their files for another source to take charge
    of. names: of their modules. inner, hidden: sizes of gate and up [inner, hidden]."""

    names: tuple[str, ...]
    inner: int
    hidden: int

    def __call__(self, x: Tensor, routing: Routing, residual: Tensor) -> None:
        raise AssertionError("the experts were left unread, and nothing took charge of them")


@dataclass(frozen=True)
class FloatExperts:
    """gate_up: float32 [E, 2I, hidden], an expert's gate rows above its up rows; down: float32
    [E, hidden, I]. One pass per chosen expert, over all the tokens that chose it."""

    gate_up: Tensor
    down: Tensor

    def __call__(self, x: Tensor, routing: Routing, residual: Tensor) -> None:
        outputs = x.new_empty(routing.experts.numel(), x.shape[1])
        for expert, pairs in pairs_by_expert(routing.experts):
            chosen = x[pairs // routing.experts.shape[1]]
            gate, up = functional.linear(chosen, self.gate_up[expert]).chunk(2, dim=1)
            outputs[pairs] = functional.linear(functional.silu(gate) * up, self.down[expert])
        residual += combine(outputs, routing.weights)


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
    """Experts packed only in part, or not alike, one after another."""

    experts: Sequence[ExpertMatrices]

    def __call__(self, x: Tensor, routing: Routing, residual: Tensor) -> None:
        outputs = x.new_empty(routing.experts.numel(), x.shape[1])
        for expert, pairs in pairs_by_expert(routing.experts):
            outputs[pairs] = self.experts[expert](x[pairs // routing.experts.shape[1]])
        residual += combine(outputs, routing.weights)
