"""What the configs of DeepSeek-V2 and V3 share: latent attention, and which layers are mixtures."""

from localr1.kernels.api import RouterRule
from localr1.models.config import (
    MAX_EXPERTS,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_WIDTH,
    Attention,
    LatentConfig,
    MoeConfig,
    read_heads,
)
from localr1.models.fields import Fields

TRAINING = ("aux_loss_alpha", "seq_aux", "output_router_logits", "ep_size")
"""Fields that speak of the load-balancing loss, of what a call returns, and of how many machines
the experts were spread over."""


def read_latent(fields: Fields, *, interleaved: bool) -> Attention:
    """Multi-head latent attention. Raises ConfigError."""
    num_heads = read_heads(fields)
    if fields.integer("num_key_value_heads", 1, MAX_HEADS, num_heads) != num_heads:
        raise fields.error(
            "num_key_value_heads",
            f"num_attention_heads ({num_heads}): each head has keys and values of its own",
            fields.integer("num_key_value_heads", 1, MAX_HEADS),
        )
    query_rank = None
    if fields.has("q_lora_rank"):
        query_rank = fields.integer("q_lora_rank", 1, MAX_WIDTH)
    rope_size = fields.integer("qk_rope_head_dim", 2, MAX_HEAD_DIM)
    if rope_size % 2:
        raise fields.error("qk_rope_head_dim", "an even number (rope turns pairs)", rope_size)
    latent = LatentConfig(
        query_rank=query_rank,
        latent_size=fields.integer("kv_lora_rank", 1, MAX_WIDTH),
        key_size=fields.integer("qk_nope_head_dim", 1, MAX_HEAD_DIM),
        rope_size=rope_size,
        value_size=fields.integer("v_head_dim", 1, MAX_HEAD_DIM),
        interleaved=interleaved,
        bias=fields.boolean("attention_bias", False),
    )
    head_dim = latent.key_size + rope_size
    # Both follow from the sizes above; transformers writes them out.
    fields.only("qk_head_dim", head_dim)
    fields.only("head_dim", rope_size, head_dim)
    return Attention(num_kv_heads=num_heads, head_dim=head_dim, latent=latent)


def read_router_sizes(fields: Fields) -> tuple[int, int]:
    """Routed experts, and how many of them a token goes to."""
    num_experts = fields.integer("n_routed_experts", 1, MAX_EXPERTS)
    return num_experts, fields.integer("num_experts_per_tok", 1, num_experts)


def read_groups(
    fields: Fields, num_experts: int, per_token: int, judged_by: int
) -> tuple[int, int]:
    """(n_group, topk_group): groups, each judged by so many of its experts, and how many of them a
    token may choose from."""
    num_groups = fields.integer("n_group", 1, num_experts)
    kept = fields.integer("topk_group", 1, num_groups)
    if num_experts % num_groups:
        raise fields.error("n_group", f"a divisor of n_routed_experts ({num_experts})", num_groups)
    size = num_experts // num_groups
    if kept < num_groups and size < judged_by:
        raise fields.error("n_group", f"groups of at least {judged_by} experts", num_groups)
    if kept * size < per_token:
        raise fields.error(
            "topk_group",
            f"groups that hold num_experts_per_tok ({per_token}) experts, {size} in each",
            kept,
        )
    return num_groups, kept


def read_mixture(
    fields: Fields, num_layers: int, router: RouterRule, *, choice_bias: bool
) -> MoeConfig:
    """The experts' sizes, and which layers have them."""
    fields.skip(*TRAINING)
    intermediate_size = fields.integer("moe_intermediate_size", 1, MAX_WIDTH)
    num_shared = fields.integer("n_shared_experts", 0, MAX_EXPERTS, 0)
    num_dense = fields.integer("first_k_dense_replace", 0, MAX_LAYERS)
    every = fields.integer("moe_layer_freq", 1, MAX_LAYERS, 1)
    return MoeConfig(
        router=router,
        intermediate_size=intermediate_size,
        shared_size=num_shared * intermediate_size,
        layers=tuple(layer for layer in range(num_dense, num_layers) if layer % every == 0),
        choice_bias=choice_bias,
    )
