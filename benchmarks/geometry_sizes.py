"""The sizes of released mixtures of experts, and how their routers behave.

Sizes are those of the config.json that each model was published with (facts, not prose); a test
holds them to it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GROUP = 32
"""Every width stays a multiple of it when it is shrunk: a group of weights, and of activations."""

SHARES = (0.06, 0.125, 0.25, 0.4, 0.5, 0.6, 0.75)
"""Of a layer's experts in a cache, as in HIT_RATES."""

# LRU and Belady, percent of choices hit by a cache of each of SHARES, digitized from the figures of
# Jie Peng and others 2025 (arXiv 2505.16056).
_V2_LITE_HITS = ((19, 39), (33, 55), (49, 72), (64, 84), (73, 88), (80, 92), (90, 96))
_QWEN3_HITS = ((47, 64), (65, 80), (83, 92), (94, 97), (97, 98), (98, 99), (100, 100))


@dataclass(frozen=True)
class Stream:
    """What a token's embedding is made of, as shares of its variance that add up to 1; a random
    router's logits are made of the same, since every part lies in directions of its own.

    common: the same for all tokens, which makes some experts popular for good. topic: the same for
    the tokens of a topic, which makes others popular for a while. The rest is the token's own.
    topic_tokens: how long a topic lasts, on average, when the model's own words are sampled at
    temperature 1: the head prefers tokens of the topic that was read.
    """

    common: float
    topic: float
    topic_tokens: float


@dataclass(frozen=True)
class Geometry:
    """config: what config.json says. hit_rates: (LRU, Belady) for each of SHARES, in percent, of
    the released model; None where nobody published them."""

    config: Mapping[str, Any]
    stream: Stream
    hit_rates: tuple[tuple[int, int], ...] | None


_DEEPSEEK: dict[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "v_head_dim": 128,
}


def _yarn(magnitude: float) -> dict[str, Any]:
    return {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": magnitude,
        "mscale_all_dim": magnitude,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    }


V2_LITE: dict[str, Any] = {
    **_DEEPSEEK,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rope_scaling": _yarn(0.707),
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
    "vocab_size": 102400,
}

R1: dict[str, Any] = {
    **_DEEPSEEK,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "rope_scaling": _yarn(1.0),
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}

QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}

# Fitted with `geometry.py check`. R1's hit rates were never published: it gets V2-Lite's stream.
GEOMETRIES: Mapping[str, Geometry] = {
    "v2-lite": Geometry(V2_LITE, Stream(0.12, 0.33, 10.0), _V2_LITE_HITS),
    "qwen3-30b-a3b": Geometry(QWEN3_30B_A3B, Stream(0.45, 0.10, 20.0), _QWEN3_HITS),
    "r1": Geometry(R1, Stream(0.12, 0.33, 10.0), None),
}

_SHRUNK = (
    *("hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim", "vocab_size"),
    *("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
)


def sized(
    config: Mapping[str, Any], *, layers: int | None = None, small: int = 1
) -> dict[str, Any]:
    """The config with fewer layers, and with widths divided by `small`, each still a multiple of
    GROUP. The experts, their number and their choice stay. With fewer layers than the model has
    dense ones all but the last are dense."""
    result = dict(config)
    for name in _SHRUNK:
        if result.get(name) is not None:
            result[name] = max(result[name] // small // GROUP, 1) * GROUP
    for name in ("num_attention_heads", "num_key_value_heads"):
        result[name] = max(result[name] // small, 1)
    if layers is not None:
        result["num_hidden_layers"] = layers
    if "first_k_dense_replace" in result:
        dense = result["first_k_dense_replace"]
        result["first_k_dense_replace"] = min(dense, result["num_hidden_layers"] - 1)
    return result
