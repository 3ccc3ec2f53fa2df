"""What GGUF metadata says of latent attention and of mixtures of experts, as config.json says it.

Keys are llama.cpp's (gguf-py/gguf/constants.py); what they hold is what its converter puts there
(conversion/deepseek.py, conversion/qwen.py) and its loader reads back (src/models/deepseek2.cpp).
"""

from collections.abc import Mapping
from typing import Any

from localr1.checkpoint.gguf_metadata import Metadata
from localr1.errors import ConfigError, UnsupportedError

MAX_EXPERTS = 1 << 16
LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"

KEYS: Mapping[str, frozenset[str]] = {
    "qwen3moe": frozenset({"expert_count", "expert_used_count", "expert_feed_forward_length"}),
    "deepseek2": frozenset(
        {
            "leading_dense_block_count",
            "expert_count",
            "expert_used_count",
            "expert_shared_count",
            "expert_group_count",
            "expert_group_used_count",
            "expert_feed_forward_length",
            "expert_gating_func",
            "expert_weights_scale",
            "expert_weights_norm",
            "attention.q_lora_rank",
            "attention.kv_lora_rank",
            "attention.key_length_mla",
            "attention.value_length_mla",
            LOG_MULTIPLIER,
        }
    ),
}
"""Keys that are read here, by general.architecture."""

_SOFTMAX, _SIGMOID = 1, 2
NEUTRAL: Mapping[str, Mapping[str, int | bool | float]] = {
    "qwen3moe": {
        "expert_gating_func": _SOFTMAX,
        "expert_shared_count": 0,
        "expert_shared_feed_forward_length": 0,
        "expert_weights_norm": True,
        "expert_weights_scale": 1.0,
    }
}
"""Keys that may only say what is so in every file of that architecture."""


def num_experts(metadata: Metadata) -> int:
    prefix = metadata.string("general.architecture")
    return metadata.size(f"{prefix}.expert_count", MAX_EXPERTS)


def read_mixture(metadata: Metadata, prefix: str, num_layers: int) -> dict[str, Any]:
    """The fields of experts and router, for the architecture `prefix`."""
    experts = num_experts(metadata)
    common = {
        "num_experts_per_tok": metadata.size(f"{prefix}.expert_used_count", experts),
        "moe_intermediate_size": metadata.size(f"{prefix}.expert_feed_forward_length"),
    }
    if prefix == "qwen3moe":
        # llama.cpp always makes the chosen weights sum to one, as the released models do.
        return {**common, "num_experts": experts, "norm_topk_prob": True}
    return {**common, "n_routed_experts": experts, **_deepseek(metadata, prefix, num_layers)}


def _deepseek(metadata: Metadata, prefix: str, num_layers: int) -> dict[str, Any]:
    """A sigmoid router is V3's; V2's files of before V3 do not name theirs. Older files do
    not name groups either: what they say is one group."""
    groups = metadata.size(f"{prefix}.expert_group_count", MAX_EXPERTS, default=1)
    gating = metadata.integer(f"{prefix}.expert_gating_func", _SOFTMAX)
    if gating not in (_SOFTMAX, _SIGMOID):
        raise UnsupportedError(
            f"{metadata.shown}: metadata {prefix}.expert_gating_func",
            expected=f"{_SOFTMAX}, softmax, or {_SIGMOID}, sigmoid",
            found=gating,
        )
    if gating == _SIGMOID:
        kind = {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        }
    else:
        kind = {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "scoring_func": "softmax",
            "topk_method": "greedy" if groups == 1 else "group_limited_greedy",
        }
    return {
        **kind,
        "n_group": groups,
        "topk_group": metadata.size(f"{prefix}.expert_group_used_count", groups, default=1),
        "n_shared_experts": metadata.size(f"{prefix}.expert_shared_count", MAX_EXPERTS, smallest=0),
        "first_k_dense_replace": metadata.size(
            f"{prefix}.leading_dense_block_count", num_layers, smallest=0
        ),
        "routed_scaling_factor": metadata.positive(f"{prefix}.expert_weights_scale", 1.0),
        "norm_topk_prob": metadata.boolean(f"{prefix}.expert_weights_norm", False),
    }


def read_latent(metadata: Metadata, prefix: str, heads: int) -> dict[str, Any]:
    """The fields of latent attention.

    Since April 2025 key_length and value_length are those of the absorbed form, with one head of
    keys (latent + rope) and values (latent), and the true lengths stand in keys that end in _mla;
    before, the first were the true ones, with as many heads of keys as of queries.
    """
    key = f"{prefix}.attention"
    rank = None
    if f"{key}.q_lora_rank" in metadata:
        rank = metadata.size(f"{key}.q_lora_rank")
    latent = metadata.size(f"{key}.kv_lora_rank")
    rope = metadata.size(f"{prefix}.rope.dimension_count")
    is_absorbed = f"{key}.key_length_mla" in metadata or f"{key}.value_length_mla" in metadata
    ending = "_mla" if is_absorbed else ""
    head_dim = metadata.size(f"{key}.key_length{ending}")
    value = metadata.size(f"{key}.value_length{ending}")
    if is_absorbed:
        _must_be(metadata, f"{key}.key_length", latent + rope)
        _must_be(metadata, f"{key}.value_length", latent)
    _must_be(metadata, f"{key}.head_count_kv", 1 if is_absorbed else heads)
    if head_dim <= rope:
        raise ConfigError(
            f"{metadata.shown}: metadata {key}.key_length{ending}",
            expected=f"more than rope.dimension_count ({rope:,})",
            found=f"{head_dim:,}",
        )
    return {
        "num_key_value_heads": heads,
        "q_lora_rank": rank,
        "kv_lora_rank": latent,
        "qk_nope_head_dim": head_dim - rope,
        "qk_rope_head_dim": rope,
        "v_head_dim": value,
        "attention_bias": False,
    }


def read_magnitudes(metadata: Metadata, prefix: str) -> dict[str, float]:
    """YaRN's mscale and mscale_all_dim. The file holds a tenth of the latter; llama.cpp takes the
    former to be the same, as it is in every DeepSeek and Kimi release, so that only the scores grow
    and not the rotated part by itself."""
    key = f"{prefix}.{LOG_MULTIPLIER}"
    stored = metadata.number(key, 0.0)
    if stored < 0:
        raise ConfigError(f"{metadata.shown}: metadata {key}", expected="at least 0", found=stored)
    if not stored:
        return {}
    magnitude = float(f"{10 * stored:.6g}")
    return {"mscale": magnitude, "mscale_all_dim": magnitude}


def _must_be(metadata: Metadata, key: str, expected: int) -> None:
    found = metadata.uniform_integer(key, expected)
    if found != expected:
        raise ConfigError(
            f"{metadata.shown}: metadata {key}",
            expected=f"{expected:,}, as the other lengths say",
            found=f"{found:,}",
        )
