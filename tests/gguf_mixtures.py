"""GGUF files of tiny mixtures, as llama.cpp's converter would make them of a transformers model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tiny_models import MemoryCheckpoint

Array = np.ndarray[Any, Any]
Keys = dict[str, Any]

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


def converted_tensors(model: Any, *, legacy: bool = False) -> dict[str, Array]:
    """By GGUF name, float32. legacy: of before April 2025, with attn_kv_b whole."""
    checkpoint = MemoryCheckpoint.of(model)
    result: dict[str, Array] = {}
    experts: dict[str, list[Array]] = {}
    for name in checkpoint.tensors:
        value = checkpoint.read(name).float().numpy()
        prefix, inner = "", name
        if name.startswith("model.layers."):
            _, _, layer, inner = name.split(".", 3)
            prefix = f"blk.{layer}."
        if inner.startswith("mlp.experts."):
            part = inner.split(".")[3].removesuffix("_proj")
            experts.setdefault(f"{prefix}ffn_{part}_exps.weight", []).append(value)
        elif inner == "mlp.gate.e_score_correction_bias":
            result[f"{prefix}exp_probs_b.bias"] = value
        elif inner == "self_attn.kv_b_proj.weight" and not legacy:
            result.update(split_up(value, prefix, model.config))
        else:
            module, _, suffix = inner.rpartition(".")
            result[f"{prefix}{NAMES[module]}.{suffix}"] = value
    return result | {name: np.stack(values) for name, values in experts.items()}


def split_up(value: Array, prefix: str, config: Any) -> dict[str, Array]:
    """Per head, keys transposed for the absorbed form, then values."""
    per_head = value.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
    keys, values = np.split(per_head, [config.qk_nope_head_dim], axis=1)
    return {
        f"{prefix}attn_k_b.weight": np.ascontiguousarray(keys.transpose(0, 2, 1)),
        f"{prefix}attn_v_b.weight": np.ascontiguousarray(values),
    }


def converted_keys(config: Any, *, legacy: bool = False) -> Keys:
    """Metadata of a transformers config, without the architecture's prefix. legacy: as
    `converted_tensors`, and without what later converters added."""
    keys: Keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }
    if config.model_type == "qwen3_moe":
        return keys | {
            "expert_count": config.num_experts,
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
        }
    return keys | latent_keys(config, legacy=legacy) | yarn_keys(config, legacy=legacy)


def latent_keys(config: Any, *, legacy: bool) -> Keys:
    head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    keys: Keys = {
        "vocab_size": config.vocab_size,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_count": config.n_routed_experts,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "attention.kv_lora_rank": config.kv_lora_rank,
        "rope.dimension_count": config.qk_rope_head_dim,
    }
    if config.q_lora_rank is not None:
        keys["attention.q_lora_rank"] = config.q_lora_rank
    if config.norm_topk_prob:
        keys["expert_weights_norm"] = True
    is_v3 = config.model_type == "deepseek_v3"
    if is_v3 or not legacy:
        keys["expert_gating_func"] = 2 if is_v3 else 1
    if legacy:
        return keys | {
            "attention.key_length": head_dim,
            "attention.value_length": config.v_head_dim,
        }
    return keys | {
        "attention.head_count_kv": 1,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
    }


def yarn_keys(config: Any, *, legacy: bool) -> Keys:
    rope = config.rope_parameters
    if rope["rope_type"] != "yarn":
        return {}
    keys: Keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"],
    }
    if not legacy:
        keys["rope.scaling.yarn_beta_fast"] = float(rope["beta_fast"])
        keys["rope.scaling.yarn_beta_slow"] = float(rope["beta_slow"])
    return keys


def architecture_of(model: Any) -> str:
    return "qwen3moe" if model.config.model_type == "qwen3_moe" else "deepseek2"


def write_gguf(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    tensors: Mapping[str, Array],
    raw_type: gguf.GGMLQuantizationType | None = None,
    tensors_a_file: int = 0,
    vocabulary: int = 0,
) -> None:
    """With the library's writer. keys: without the prefix; None leaves one out. raw_type: of the
    tensors given as bytes. tensors_a_file: 0 for a single file. vocabulary: tokens of a
    tokenizer, if there is to be one."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_a_file)
    if vocabulary:
        words = ["a", "b", "ab", "<end>"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([*words, *(f"[PAD{n}]" for n in range(4, vocabulary))])
        writer.add_token_types([1, 1, 1, 3] + [5] * (vocabulary - 4))
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(3)
    adders = {
        bool: writer.add_bool,
        int: writer.add_int32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    for key, value in keys.items():
        if value is not None:
            adders[type(value)](f"{architecture}.{key}", value)
    for name, values in tensors.items():
        writer.add_tensor(name, values, raw_dtype=raw_type if values.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert(path: Path, model: Any, *, legacy: bool = False, **changes: Any) -> Path:
    """The whole file. changes: metadata keys, "__" for "."."""
    keys = converted_keys(model.config, legacy=legacy)
    keys |= {key.replace("__", "."): value for key, value in changes.items()}
    write_gguf(path, architecture_of(model), keys, converted_tensors(model, legacy=legacy))
    return path
