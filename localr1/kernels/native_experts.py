"""A mixture's experts on the native kernels, wherever they lie: one call for a batch of tokens."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from localr1.errors import KernelError, MemoryLimitError
from localr1.kernels.api import PackedExpert, RouterRule, Routing
from localr1.kernels.checks import (
    check_combining,
    check_experts,
    check_mixing,
    check_outputs,
    check_routing,
)
from localr1.kernels.native_weight import SCALE_TYPES, Pinned, _native, address
from localr1.qtypes import QuantScheme

ExpertLayout = _native.ExpertLayout
SlotArena = _native.SlotArena


@dataclass(frozen=True)
class ExpertForm:
    """How the experts of a layer are packed. inner, hidden: the sizes of gate and up [inner,
    hidden]. schemes: of gate, up and down; has_zero: whether each has zero points."""

    inner: int
    hidden: int
    schemes: tuple[QuantScheme, QuantScheme, QuantScheme]
    scale_dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    has_zero: tuple[bool, bool, bool]

    @staticmethod
    def of(expert: PackedExpert) -> "ExpertForm":
        gate, up, down = expert.gate, expert.up, expert.down
        return ExpertForm(
            gate.out_features,
            gate.in_features,
            (gate.scheme, up.scheme, down.scheme),
            (gate.scale.dtype, up.scale.dtype, down.scale.dtype),
            (
                gate.zero_point is not None,
                up.zero_point is not None,
                down.zero_point is not None,
            ),
        )


@dataclass(frozen=True)
class NativeExperts:
    """The experts of one layer, each a contiguous range of gate, up and down in the blocked layout
    of cuda/blocks.h (ExpertLayout), wherever they lie.

    table: int64 [num_experts], the address of each, 0 for one that is not in memory. owner: keeps
    the memory of those addresses alive.
    """

    layout: ExpertLayout
    table: Tensor
    hidden_size: int
    owner: object

    @property
    def num_experts(self) -> int:
        return self.table.shape[0]

    @property
    def nbytes(self) -> int:
        """Of all experts, in memory or not."""
        return self.num_experts * int(self.layout.nbytes)


def expert_layout(native: _native.Kernels, form: ExpertForm) -> ExpertLayout:
    """Raises KernelError for sizes that these kernels cannot hold."""
    parts = zip(form.schemes, form.scale_dtypes, form.has_zero, strict=True)
    schemes = [(s.code_type, s.group_size, SCALE_TYPES[dtype], zero) for s, dtype, zero in parts]
    try:
        return native.expert_layout(form.hidden, form.inner, schemes)
    except _native.RefusedError as error:
        raise KernelError(str(error)) from None


def place_expert(
    native: _native.Kernels,
    layout: ExpertLayout,
    arena: SlotArena,
    slot: int,
    expert: PackedExpert,
) -> None:
    """Reorder an expert, as it is on disk, into a slot: in the calling thread, without the pool."""
    pinned = [Pinned(weight) for weight in (expert.gate, expert.up, expert.down)]
    native.place_expert(layout, arena, slot, [each.addresses for each in pinned])


def prepare_experts(
    native: _native.Kernels, experts: Iterable[PackedExpert], count: int
) -> NativeExperts:
    """`Kernels.prepare_experts`."""
    result: NativeExperts | None = None
    arena: SlotArena | None = None
    for index, expert in enumerate(check_experts(experts, count)):
        if result is None or arena is None:
            layout = expert_layout(native, ExpertForm.of(expert))
            arena = SlotArena(layout.nbytes)
            if arena.resize(count) < count:
                raise MemoryLimitError(
                    f"{count} experts of {expert.gate.out_features} x {expert.gate.in_features}",
                    expected=f"{count * layout.nbytes / 2**30:.1f} GiB",
                    found="less free memory",
                    fix="Quantize to fewer bits, or use a smaller model.",
                )
            table = torch.tensor([arena.address(slot) for slot in range(count)])
            result = NativeExperts(layout, table, expert.gate.in_features, arena)
        place_expert(native, result.layout, arena, index, expert)
    if result is None:
        raise KernelError("experts", expected="at least 1", found=count)
    return result


def route(
    native: _native.Kernels, x: Tensor, weight: Tensor, bias: Tensor | None, rule: RouterRule
) -> Routing:
    """`Kernels.route`."""
    check_routing(x, weight, bias, rule)
    tokens = x.shape[0]
    experts = torch.empty(tokens, rule.experts_per_token, dtype=torch.int64)
    weights = torch.empty(tokens, rule.experts_per_token)
    if tokens:
        native.route(
            x.data_ptr(),
            tokens,
            x.shape[1],
            weight.data_ptr(),
            address(bias),
            rule.numbers,
            experts.data_ptr(),
            weights.data_ptr(),
        )
    return Routing(experts, weights)


def mix_experts(
    native: _native.Kernels, x: Tensor, routing: Routing, experts: NativeExperts, residual: Tensor
) -> None:
    """`Kernels.mix_experts`."""
    check_mixing(x, routing, experts, residual)
    if x.shape[0] == 0:
        return
    try:
        native.mix_experts(
            x.data_ptr(),
            x.shape[0],
            x.shape[1],
            routing.experts.data_ptr(),
            routing.weights.data_ptr(),
            routing.experts.shape[1],
            experts.layout,
            experts.table.data_ptr(),
            experts.num_experts,
            residual.data_ptr(),
        )
    except _native.RefusedError as error:
        raise KernelError(f"mix_experts: {error}") from None


def expert_outputs(
    native: _native.Kernels, x: Tensor, chosen: Tensor, experts: NativeExperts, outputs: Tensor
) -> None:
    """`Kernels.expert_outputs`."""
    check_outputs(x, chosen, experts, outputs)
    if x.shape[0] == 0:
        return
    try:
        native.expert_outputs(
            x.data_ptr(),
            x.shape[0],
            x.shape[1],
            chosen.data_ptr(),
            chosen.shape[1],
            experts.layout,
            experts.table.data_ptr(),
            experts.num_experts,
            outputs.data_ptr(),
        )
    except _native.RefusedError as error:
        raise KernelError(f"expert_outputs: {error}") from None


def combine_experts(
    native: _native.Kernels, outputs: Tensor, weights: Tensor, residual: Tensor
) -> None:
    """`Kernels.combine_experts`."""
    check_combining(outputs, weights, residual)
    tokens, per_token, hidden = outputs.shape
    if tokens == 0:
        return
    try:
        native.combine_experts(
            outputs.data_ptr(), weights.data_ptr(), tokens, per_token, hidden, residual.data_ptr()
        )
    except _native.RefusedError as error:
        raise KernelError(f"combine_experts: {error}") from None
