"""From tensors to gated MLPs and mixtures of experts. Experts are stored one by one:
`mlp.experts.J.gate_proj`, `up_proj`, `down_proj`."""

from torch import Tensor

from localr1.kernels.api import Kernels
from localr1.layers.mlp import MlpParts, build_mlp
from localr1.layers.moe import (
    ExpertMatrices,
    ExpertSource,
    FloatExperts,
    MoeBlock,
    SeparateExperts,
)
from localr1.layers.router import Router
from localr1.models.config import ModelConfig, MoeConfig
from localr1.models.weights import WeightLoader

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


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
    router = Router(
        moe.router, loader.matrix(f"{name}.gate", num_experts, config.hidden_size), bias
    )
    shared = None
    if moe.shared_size:
        shared = build_mlp(
            load_gated_mlp(loader, f"{name}.shared_experts", norm, moe.shared_size, config), kernels
        )
    experts = load_experts(loader, f"{name}.experts", config.hidden_size, moe)
    return MoeBlock(norm, router, experts, shared, config.rms_norm_eps)


def load_experts(loader: WeightLoader, prefix: str, hidden: int, moe: MoeConfig) -> ExpertSource:
    """The routed experts of one layer: stacked where all are float, else each by itself."""
    inner = moe.intermediate_size
    names = [f"{prefix}.{expert}" for expert in range(moe.router.num_experts)]
    matrices = [f"{name}.{part}" for name in names for part in (GATE, UP, DOWN)]
    if not any(loader.is_packed(matrix) for matrix in matrices):
        return FloatExperts(
            gate_up=loader.stack([[f"{n}.{GATE}", f"{n}.{UP}"] for n in names], inner, hidden),
            down=loader.stack([[f"{name}.{DOWN}"] for name in names], hidden, inner),
        )
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
