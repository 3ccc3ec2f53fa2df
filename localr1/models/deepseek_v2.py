"""DeepSeek-V2 and V2-Lite: latent attention, a softmax router, its weights scaled."""

from collections.abc import Mapping

from localr1.kernels.api import RouterRule, Scoring
from localr1.models.config import ModelConfig, read_layers, read_model
from localr1.models.deepseek import read_groups, read_latent, read_mixture, read_router_sizes
from localr1.models.fields import Fields

EPSILON = 1e-20
MAX_SCALE = 1e6
GREEDY, GROUPED = "greedy", "group_limited_greedy"


def parse_config(config: Mapping[str, object]) -> ModelConfig:
    """The rope's pairs lie side by side in every V2 file."""
    fields = Fields(config, "config.json")
    fields.only("rope_interleave", True)
    attention = read_latent(fields, interleaved=True)
    moe = read_mixture(fields, read_layers(fields), _read_router(fields), choice_bias=False)
    return read_model(fields, attention, mlp_bias=fields.boolean("mlp_bias", False), moe=moe)


def _read_router(fields: Fields) -> RouterRule:
    fields.only("scoring_func", "softmax")
    fields.only("topk_method", GREEDY, GROUPED)
    num_experts, per_token = read_router_sizes(fields)
    num_groups = kept = 1
    if fields.text("topk_method", GREEDY) == GROUPED:
        num_groups, kept = read_groups(fields, num_experts, per_token, judged_by=1)
    fields.skip("n_group", "topk_group")
    # As in DeepSeek's own code, where weights that are made to sum to one are not scaled, and a
    # single weight is never made to. Released files have it off.
    normalized = fields.boolean("norm_topk_prob", False) and per_token > 1
    scale = fields.number("routed_scaling_factor", 0.0, MAX_SCALE, 1.0)
    return RouterRule(
        num_experts=num_experts,
        experts_per_token=per_token,
        scoring=Scoring.SOFTMAX,
        normalized=normalized,
        num_groups=num_groups,
        groups_per_token=kept,
        epsilon=EPSILON,
        scale=1.0 if normalized else scale,
    )
