"""From tensors to gated MLPs and mixtures of experts. Experts are stored one by one:
`mlp.experts.J.gate_proj`, `up_proj`, `down_proj`."""

from collections.abc import Iterator

from torch import Tensor

from localr1.checkpoint.expert_ranges import DOWN, GATE, UP
from localr1.kernels.api import Kernels, PackedExpert
from localr1.layers.mlp import MlpParts, build_mlp
from localr1.layers.moe import (
    ExpertMatrices,
    ExpertSource,
    FloatExperts,
    MoeBlock,
    PackedExperts,
    SeparateExperts,
    UnreadExperts,
)
from localr1.layers.router import Router
from localr1.models.config import ModelConfig, MoeConfig
from localr1.models.weights import WeightLoader


def load_gated_mlp(
    loader: WeightLoader, prefix: str, norm: Tensor, inner: int, config: ModelConfig
) -> MlpParts:
    """A gated MLP behind a norm that is loaded already."""
    hidden, bias = config.hidden_size, config.mlp_bias
    return MlpParts(
        norm=norm,
        gate=loader.linear(f"{prefix}.{GATE}", inner, hidden, bias=bias),
        up=loader.linear(f"{prefix}.{UP}", inner, hidden, bias=bias),
        down=loader.linear(f"{prefix}.{DOWN}", hidden, inner, bias=bias),
        eps=config.rms_norm_eps,
    )


def load_mixture(
    loader: WeightLoader, prefix: str, config: ModelConfig, moe: MoeConfig, kernels: Kernels
) -> MoeBlock:
    """Router, routed experts and the shared expert of one layer."""
    name, num_experts = f"{prefix}.mlp", moe.router.num_experts
    norm = loader.vector(f"{prefix}.post_attention_layernorm.weight", config.hidden_size)
    bias = None
    if moe.choice_bias:
        bias = loader.vector(f"{name}.gate.e_score_correction_bias", num_experts)
    weight = loader.at_hand(loader.matrix(f"{name}.gate", num_experts, config.hidden_size))
    router = Router(kernels, moe.router, weight, bias)
    shared = None
    if moe.shared_size:
        shared = build_mlp(
            load_gated_mlp(loader, f"{name}.shared_experts", norm, moe.shared_size, config), kernels
        )
    experts = load_experts(loader, f"{name}.experts", config.hidden_size, moe, kernels)
    return MoeBlock(kernels, norm, router, experts, shared, config.rms_norm_eps)


def load_experts(
    loader: WeightLoader, prefix: str, hidden: int, moe: MoeConfig, kernels: Kernels
) -> ExpertSource:
    """The routed experts of one layer: together where all are float or all packed alike, else, or
    where the loader keeps them separate, each by itself. Those packed alike stay unread where the
    loader leaves experts."""
    inner = moe.intermediate_size
    names = [f"{prefix}.{expert}" for expert in range(moe.router.num_experts)]
    matrices = [f"{name}.{part}" for name in names for part in (GATE, UP, DOWN)]
    is_separate = loader.separate_experts
    if not is_separate and not any(loader.is_packed(matrix) for matrix in matrices):
        return FloatExperts(
            gate_up=loader.stack([[f"{n}.{GATE}", f"{n}.{UP}"] for n in names], inner, hidden),
            down=loader.stack([[f"{name}.{DOWN}"] for name in names], hidden, inner),
        )
    if not is_separate and _packed_alike(loader, names):
        if loader.leaves_experts:
            loader.leave(f"{name}.{part}" for name in names for part in (GATE, UP, DOWN))
            return UnreadExperts(tuple(names), inner, hidden)
        packed = _read_experts(loader, names, inner, hidden)
        return PackedExperts(kernels, loader.expert_bank(packed, len(names)))
    return SeparateExperts(
        [
            ExpertMatrices(
                gate=loader.linear(f"{name}.{GATE}", inner, hidden, bias=False),
                up=loader.linear(f"{name}.{UP}", inner, hidden, bias=False),
                down=loader.linear(f"{name}.{DOWN}", hidden, inner, bias=False),
            )
            for name in names
        ]
    )


def _packed_alike(loader: WeightLoader, names: list[str]) -> bool:
    """Whether every expert's matrices are packed as those of the first."""
    forms = {tuple(loader.packed_form(f"{n}.{part}") for part in (GATE, UP, DOWN)) for n in names}
    return len(forms) == 1 and None not in forms.pop()


def _read_experts(
    loader: WeightLoader, names: list[str], inner: int, hidden: int
) -> Iterator[PackedExpert]:
    """One after another, each when it is asked for."""
    for name in names:
        yield PackedExpert(
            gate=loader.packed(f"{name}.{GATE}", inner, hidden),
            up=loader.packed(f"{name}.{UP}", inner, hidden),
            down=loader.packed(f"{name}.{DOWN}", hidden, inner),
        )
