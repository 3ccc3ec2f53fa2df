"""Qwen3's mixtures (30B-A3B, 235B-A22B): Qwen3's attention, a softmax router, no shared expert."""

from collections.abc import Mapping

from localr1.kernels.api import RouterRule, Scoring
from localr1.models.config import (
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_WIDTH,
    ModelConfig,
    MoeConfig,
    read_decoder,
)
from localr1.models.fields import Fields


def parse_config(config: Mapping[str, object]) -> ModelConfig:
    """As qwen3, with experts in place of the MLP of most layers."""
    return read_decoder(
        config,
        attention_bias="attention_bias",
        qk_norm=True,
        sliding_window=True,
        read_moe=_read_moe,
    )


def _read_moe(fields: Fields, num_layers: int) -> MoeConfig:
    fields.skip("router_aux_loss_coef", "output_router_logits")  # Of training and of what returns.
    # transformers 5 writes the second name.
    name = "num_experts" if fields.has("num_experts") else "num_local_experts"
    num_experts = fields.integer(name, 1, MAX_EXPERTS)
    if fields.integer("num_local_experts", 1, MAX_EXPERTS, num_experts) != num_experts:
        raise fields.error("num_local_experts", f"num_experts ({num_experts})", "another number")
    router = RouterRule(
        num_experts=num_experts,
        experts_per_token=fields.integer("num_experts_per_tok", 1, num_experts),
        scoring=Scoring.SOFTMAX,
        normalized=fields.boolean("norm_topk_prob", False),
    )
    every = fields.integer("decoder_sparse_step", 1, MAX_LAYERS, 1)
    dense = fields.integers("mlp_only_layers", 0, MAX_LAYERS)
    return MoeConfig(
        router=router,
        intermediate_size=fields.integer("moe_intermediate_size", 1, MAX_WIDTH),
        shared_size=0,
        layers=tuple(
            layer for layer in range(num_layers) if layer not in dense and (layer + 1) % every == 0
        ),
        choice_bias=False,
    )
