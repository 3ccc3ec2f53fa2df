"""A mixture's experts on the native kernels: one arena a layer, one call for a batch of tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from localr1.errors import KernelError, MemoryLimitError
from localr1.kernels.api import PackedExpert, PackedWeight, RouterRule, Routing, Scoring
from localr1.kernels.checks import check_experts, check_mixing, check_routing
from localr1.kernels.native_weight import SCALE_TYPES, Pinned, _native, address


@dataclass(frozen=True)
class NativeExperts:
    """The experts of one layer side by side in one range of memory, each a contiguous range of
    gate, up and down in the blocked layout of cuda/blocks.h (ExpertLayout)."""

    bank: _native.Experts
    num_experts: int
    hidden_size: int

    @property
    def nbytes(self) -> int:
        return int(self.bank.nbytes)


def prepare_experts(
    native: _native.Kernels, experts: Iterable[PackedExpert], count: int
) -> NativeExperts:
    """`Kernels.prepare_experts`."""
    result: NativeExperts | None = None
    for index, expert in enumerate(check_experts(experts, count)):
        matrices = (expert.gate, expert.up, expert.down)
        if result is None:
            result = _reserve(native, matrices, count)
        pinned = [Pinned(weight) for weight in matrices]
        native.place_expert(result.bank, index, [each.addresses for each in pinned])
    if result is None:
        raise KernelError("experts", expected="at least 1", found=count)
    return result


def _reserve(
    native: _native.Kernels, matrices: Sequence[PackedWeight], count: int
) -> NativeExperts:
    """Room for `count` experts like these matrices."""
    inner, hidden = matrices[0].out_features, matrices[0].in_features
    schemes = [
        (w.scheme.bits, w.scheme.group_size, SCALE_TYPES[w.scale.dtype], w.zero_point is not None)
        for w in matrices
    ]
    try:
        bank = native.make_experts(count, hidden, inner, schemes)
    except _native.RefusedError as error:
        raise KernelError(str(error)) from None
    except MemoryError as error:
        weights = count * sum(m.in_features * m.out_features * m.scheme.bits for m in matrices)
        raise MemoryLimitError(
            f"{count} experts of {inner} x {hidden}",
            expected=f"more than {weights / 8 / 2**30:.1f} GiB",
            found="less free memory",
            fix="Quantize to fewer bits, or use a smaller model.",
        ) from error
    return NativeExperts(bank, count, hidden)


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
            (
                rule.num_experts,
                rule.experts_per_token,
                rule.num_groups,
                rule.groups_per_token,
                rule.group_score.value,
                rule.scoring is Scoring.SOFTMAX,
                rule.normalized,
                rule.epsilon,
                rule.scale,
            ),
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
            experts.bank,
            residual.data_ptr(),
        )
    except _native.RefusedError as error:
        raise KernelError(f"mix_experts: {error}") from None
