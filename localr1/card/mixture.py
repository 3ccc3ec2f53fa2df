"""A mixture's launches for one token. The card computes the chosen experts that it holds, the host
the others at the same time, in the stream's order: nobody waits for the host to look."""

from ctypes import c_int32, c_int64
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from localr1.card.program import pointer
from localr1.card.step import StepLaunches, arguments_of
from localr1.card.weights import CardMixture
from localr1.card.workspace import FLOAT
from localr1.experts.card_memory import HostMemory
from localr1.kernels import gpu_launch
from localr1.kernels.gpu_driver import HostFunction
from localr1.kernels.gpu_layout import ExpertLayout
from localr1.kernels.native_weight import SCALE_TYPES

ROUTER_TYPE = SCALE_TYPES[torch.float32]


class CardExperts(Protocol):
    """The routed experts of one layer, of which the card holds some."""

    @property
    def layout(self) -> ExpertLayout: ...

    @property
    def table(self) -> int:
        """The address, on the card, of the addresses of all experts, 0 for one that it has not."""
        ...

    def on_host(self, exchange: "Exchange") -> HostFunction:
        """Computes those that the card has not, of one token: from what lies in the exchange when
        it is called to its outputs. An error is kept for the end of the step."""
        ...


@dataclass(frozen=True)
class Exchange:
    """Host memory between a card and `CardExperts.on_host`, of one token. chosen: int32 [1, k];
    normed: float32 [1, hidden], what the experts are given; residual: float32 [1, hidden], the
    mixture's input; outputs: float32 [1, k, hidden]. is_pinned: the card reads the outputs from
    there by itself."""

    chosen: Tensor
    normed: Tensor
    residual: Tensor
    outputs: Tensor
    is_pinned: bool

    @staticmethod
    def of(host: HostMemory, hidden: int, per_token: int) -> "Exchange":
        for name, values in (("chosen", per_token), ("normed", hidden), ("residual", hidden)):
            host.allocate(name, FLOAT * values)
        host.allocate("outputs", FLOAT * per_token * hidden)
        return Exchange(
            host.tensor("chosen", torch.int32, 1, per_token),
            host.tensor("normed", torch.float32, 1, hidden),
            host.tensor("residual", torch.float32, 1, hidden),
            host.tensor("outputs", torch.float32, 1, per_token, hidden),
            host.is_pinned("outputs"),
        )


def mixture(
    step: StepLaunches, weights: CardMixture, experts: CardExperts, exchange: Exchange
) -> None:
    assert step.tokens == 1
    w, work, routed, program = weights, step.work, step.work.routed, step.program
    per_token, num_experts = int(w.rule.per_token), int(w.rule.experts)
    layout = experts.layout
    hidden = int(layout.down.rows)
    step.norm(work.x, w.norm, w.eps, hidden, normed=routed.normed)
    program.launch(
        gpu_launch.route_logits(num_experts, 1),
        pointer(routed.normed), pointer(w.router), c_int32(ROUTER_TYPE), c_int32(hidden),
        c_int32(num_experts), pointer(routed.logits),
    )  # fmt: skip
    chosen, weight_of_chosen = pointer(routed.chosen), pointer(routed.weights)
    program.launch(
        gpu_launch.route_choose(1),
        pointer(routed.logits), pointer(w.bias), w.rule, chosen, weight_of_chosen,
    )  # fmt: skip
    program.fork()
    elsewhere = _complete(step, experts, exchange)
    table = pointer(experts.table)
    program.launch(
        gpu_launch.gate_up(layout, per_token),
        layout, table, chosen, c_int32(per_token), *arguments_of(work.inputs),
        *arguments_of(routed.gated),
    )  # fmt: skip
    program.launch(
        gpu_launch.down(layout, per_token),
        layout, table, chosen, *arguments_of(routed.gated), pointer(routed.outputs),
    )  # fmt: skip
    # The shared expert changes the residual stream, which the host is given as it was.
    program.wait_for_copies()
    if w.shared is not None:
        step.gated_mlp(w.shared)
    program.join()
    program.launch(
        gpu_launch.fetch_outputs(hidden, per_token),
        pointer(elsewhere), table, chosen, c_int64(hidden), pointer(routed.outputs),
    )  # fmt: skip
    program.launch(
        gpu_launch.combine_experts(hidden, 1),
        pointer(routed.outputs), weight_of_chosen, c_int32(per_token), c_int64(hidden),
        pointer(work.x),
    )  # fmt: skip


def _complete(step: StepLaunches, experts: CardExperts, exchange: Exchange) -> int:
    """On the side stream. Returns the address of what the host computes."""
    program, routed = step.program, step.work.routed
    for target, source in (
        (exchange.chosen, routed.chosen),
        (exchange.normed, routed.normed),
        (exchange.residual, step.work.x),
    ):
        program.copy_out(target.data_ptr(), source, target.nbytes, side=True)
    program.mark_copied()
    outputs = exchange.outputs
    program.call_host(experts.on_host(exchange))
    if exchange.is_pinned:
        return outputs.data_ptr()
    program.copy_in(routed.elsewhere, outputs.data_ptr(), outputs.nbytes, side=True)
    return routed.elsewhere
