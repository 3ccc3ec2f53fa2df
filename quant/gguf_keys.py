"""The metadata of a GGUF file that say what a model is: the inverse of checkpoint/gguf_config.py.

Keys are llama.cpp's (gguf-py/gguf/constants.py, Keys), values as its converter puts them there.
"""

import math
from typing import Any, Final

from localr1.errors import UnsupportedError
from localr1.kernels.api import Scoring
from localr1.layers.rope import DefaultRope, LinearRope, Llama3Rope, YarnRope
from localr1.models.config import LatentConfig, ModelConfig, MoeConfig

ARCHITECTURES: Final = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "kimi_k2": "deepseek2",
}
"""The registry's name -> `general.architecture`."""

_GATING: Final = {Scoring.SOFTMAX: 1, Scoring.SIGMOID: 2}

Keys = dict[str, Any]


def architecture_keys(config: ModelConfig) -> Keys:
    """Without the architecture's prefix. Raises UnsupportedError for what llama.cpp has no key
    for."""
    keys: Keys = {
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope.theta),
    }
    if config.latent is None:
        keys |= {
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "rope.dimension_count": config.head_dim,
        }
    else:
        keys |= _latent_keys(config.latent)
    if config.moe is not None:
        keys |= _mixture_keys(config, config.moe)
    return keys | _rope_keys(config)


def _latent_keys(latent: LatentConfig) -> Keys:
    """Of the absorbed form, in which all heads share one key and value, the latent."""
    if not latent.interleaved or latent.bias:
        raise UnsupportedError(
            "GGUF: latent attention",
            expected="interleaved rope and no bias",
            found="a bias" if latent.bias else "rope in halves",
        )
    keys: Keys = {
        "attention.head_count_kv": 1,
        "attention.key_length": latent.latent_size + latent.rope_size,
        "attention.value_length": latent.latent_size,
        "attention.key_length_mla": latent.key_size + latent.rope_size,
        "attention.value_length_mla": latent.value_size,
        "attention.kv_lora_rank": latent.latent_size,
        "rope.dimension_count": latent.rope_size,
    }
    if latent.query_rank is not None:
        keys["attention.q_lora_rank"] = latent.query_rank
    return keys


def _mixture_keys(config: ModelConfig, moe: MoeConfig) -> Keys:
    router = moe.router
    keys: Keys = {
        "expert_count": router.num_experts,
        "expert_used_count": router.experts_per_token,
        "expert_feed_forward_length": moe.intermediate_size,
    }
    first = moe.layers[0] if moe.layers else config.num_layers
    if moe.layers != tuple(range(first, config.num_layers)):
        raise UnsupportedError(
            "GGUF: mixture layers", expected="all from one layer on", found=f"{list(moe.layers)}"
        )
    if config.latent is None:
        if first or not router.normalized:
            raise UnsupportedError(
                "GGUF: qwen3moe",
                expected="experts in every layer, whose weights add up to one",
                found="dense layers" if first else "norm_topk_prob false",
            )
        return keys
    return keys | {
        "leading_dense_block_count": first,
        "expert_shared_count": moe.shared_size // moe.intermediate_size,
        "expert_weights_scale": float(router.scale),
        "expert_weights_norm": router.normalized,
        "expert_gating_func": _GATING[router.scoring],
        "expert_group_count": router.num_groups,
        "expert_group_used_count": router.groups_per_token,
    }


def _rope_keys(config: ModelConfig) -> Keys:
    """llama3's factors are a tensor of their own."""
    rope = config.rope
    if isinstance(rope, YarnRope):
        return _yarn_keys(rope, has_latent=config.latent is not None)
    if isinstance(rope, LinearRope):
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.factor)}
    assert isinstance(rope, (DefaultRope, Llama3Rope))
    return {}


def _yarn_keys(rope: YarnRope, *, has_latent: bool) -> Keys:
    keys: Keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope.factor),
        "rope.scaling.original_context_length": rope.original_positions,
        "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
        "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
    }
    if not rope.truncate:
        raise UnsupportedError("GGUF: yarn", expected="truncate true", found="false")
    if has_latent:
        if rope.mscale != rope.mscale_all_dim or rope.fixed_attention_factor is not None:
            raise UnsupportedError(
                "GGUF: yarn with latent attention",
                expected="mscale and mscale_all_dim alike",
                found=f"{rope.mscale} and {rope.mscale_all_dim}",
            )
        if rope.mscale_all_dim:
            keys["rope.scaling.yarn_log_multiplier"] = 0.1 * rope.mscale_all_dim
        return keys
    # llama.cpp multiplies its own magnitude by this, where Hugging Face states the product.
    own = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    factor = rope.attention_factor / own
    if abs(factor - 1.0) > 1e-6:
        keys["rope.scaling.attn_factor"] = factor
    return keys
