"""DeepSeek-V3, R1, R1-0528, V3.1, and Kimi-K2 and Moonlight, which share the architecture: latent
attention, a sigmoid router balanced by a bias on the choice alone."""

from collections.abc import Mapping

from localr1.kernels.api import GroupScore, RouterRule, Scoring
from localr1.models.config import MAX_LAYERS, ModelConfig, read_layers, read_model
from localr1.models.deepseek import read_groups, read_latent, read_mixture, read_router_sizes
from localr1.models.fields import Fields

EPSILON = 1e-20
MAX_SCALE = 1e6


def parse_config(config: Mapping[str, object]) -> ModelConfig:
    """Multi-token-prediction layers are counted, so that their tensors are known and left out."""
    fields = Fields(config, "config.json")
    attention = read_latent(fields, interleaved=fields.boolean("rope_interleave", True))
    moe = read_mixture(fields, read_layers(fields), _read_router(fields), choice_bias=True)
    mtp_layers = fields.integer("num_nextn_predict_layers", 0, MAX_LAYERS, 0)
    return read_model(fields, attention, moe=moe, mtp_layers=mtp_layers)


def _read_router(fields: Fields) -> RouterRule:
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    num_experts, per_token = read_router_sizes(fields)
    judged_by = GroupScore.BEST_TWO
    num_groups, kept = read_groups(fields, num_experts, per_token, judged_by.value)
    return RouterRule(
        num_experts=num_experts,
        experts_per_token=per_token,
        scoring=Scoring.SIGMOID,
        normalized=fields.boolean("norm_topk_prob", True),
        num_groups=num_groups,
        groups_per_token=kept,
        group_score=judged_by,
        epsilon=EPSILON,
        scale=fields.number("routed_scaling_factor", 0.0, MAX_SCALE),
    )
