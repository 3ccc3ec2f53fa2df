"""The config.json of a GGUF file, rebuilt from its metadata.

Keys are llama.cpp's (gguf-py/gguf/constants.py, Keys). A key of the architecture that is not known
here is an error naming it, because it may change the mathematics.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from localr1.checkpoint.gguf_header import GgufTensor
from localr1.checkpoint.gguf_metadata import Metadata
from localr1.checkpoint.gguf_names import Architecture
from localr1.checkpoint.paths import quoted
from localr1.errors import ConfigError, TensorError, UnsupportedError

MAX_LAYERS = 4096
DEFAULT_ROPE_THETA = 10_000.0
LLAMA3_TOLERANCE = 1e-4
"""Largest relative difference between stored and recomputed rope factors. The file holds float32
factors (6e-8) computed from float32 frequencies (about 1e-6 after the powers); the next other
choice of parameters, an original context of 8191 for 8192, moves a factor by more than 1e-4
(tested)."""

_KNOWN_KEYS = frozenset(
    {
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.freq_base",
        "rope.dimension_count",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.attn_factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
    }
)
_NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "attention.sliding_window": 0,
    "use_parallel_residual": False,
}
"""Keys that change nothing at this value, and are not honoured at another."""


def num_layers(metadata: Metadata) -> int:
    return _size(metadata, f"{metadata.string('general.architecture')}.block_count", MAX_LAYERS)


def build_config(
    metadata: Metadata,
    kind: Architecture,
    tensors: Mapping[str, GgufTensor],
    rope_factors: Sequence[float] | None,
) -> dict[str, Any]:
    """The document that transformers' config class for `kind` reads.

    tensors: by their GGUF names. rope_factors: the tensor rope_freqs.weight, [head_dim / 2], or
    None. Raises FormatError for absent keys and wrong types, ConfigError for values that make no
    model, UnsupportedError for what is not honoured.
    """
    prefix = metadata.string("general.architecture")
    _reject_unknown(metadata, prefix)
    hidden = _size(metadata, f"{prefix}.embedding_length")
    heads = _size(metadata, f"{prefix}.attention.head_count")
    kv_heads = _size(metadata, f"{prefix}.attention.head_count_kv", default=heads)
    head_dim = _head_dim(metadata, prefix, hidden, heads)
    config: dict[str, Any] = {
        "architectures": [kind.class_name],
        "model_type": kind.model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": _size(metadata, f"{prefix}.feed_forward_length"),
        "num_hidden_layers": num_layers(metadata),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": _size(metadata, f"{prefix}.context_length"),
        "rms_norm_eps": metadata.number(f"{prefix}.attention.layer_norm_rms_epsilon"),
        "rope_theta": _positive(metadata, f"{prefix}.rope.freq_base", DEFAULT_ROPE_THETA),
        "vocab_size": _vocab_size(metadata, prefix, tensors),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if kind.model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    elif kind.model_type == "qwen3":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    scaling = _rope_scaling(metadata, prefix, config, rope_factors)
    if scaling is not None:
        config["rope_scaling"] = scaling
    for key, source in (("bos_token_id", "bos"), ("eos_token_id", "eos")):
        if f"tokenizer.ggml.{source}_token_id" in metadata:
            config[key] = metadata.integer(f"tokenizer.ggml.{source}_token_id")
    return config


def _reject_unknown(metadata: Metadata, prefix: str) -> None:
    for key in metadata:
        if not key.startswith(f"{prefix}."):
            continue
        name = key.removeprefix(f"{prefix}.")
        if name in _KNOWN_KEYS:
            continue
        neutral = _NEUTRAL.get(name)
        if neutral is None:
            raise UnsupportedError(f"{metadata.shown}: metadata {quoted(key)} is not honoured")
        found = metadata.boolean(key) if isinstance(neutral, bool) else metadata.integer(key)
        if found != neutral:
            raise UnsupportedError(
                f"{metadata.shown}: metadata {key}", expected=neutral, found=found
            )


def _size(metadata: Metadata, key: str, limit: int = 1 << 30, default: int | None = None) -> int:
    value = metadata.uniform_integer(key, default)
    if not 1 <= value <= limit:
        raise ConfigError(
            f"{metadata.shown}: metadata {key}", expected=f"1 to {limit:,}", found=f"{value:,}"
        )
    return value


def _positive(metadata: Metadata, key: str, default: float | None = None) -> float:
    value = metadata.number(key, default)
    if value <= 0:
        raise ConfigError(f"{metadata.shown}: metadata {key}", expected="above 0", found=value)
    return value


def _head_dim(metadata: Metadata, prefix: str, hidden: int, heads: int) -> int:
    key = f"{prefix}.attention.key_length"
    if key not in metadata and hidden % heads:
        raise ConfigError(
            f"{metadata.shown}: embedding_length",
            expected=f"a multiple of {heads} heads",
            found=f"{hidden:,}",
        )
    head_dim = _size(metadata, key, default=hidden // heads or 1)
    for name in ("attention.value_length", "rope.dimension_count"):
        found = _size(metadata, f"{prefix}.{name}", default=head_dim)
        if found != head_dim:
            raise UnsupportedError(
                f"{metadata.shown}: metadata {prefix}.{name}",
                expected=f"{head_dim}, the length of a key",
                found=found,
            )
    return head_dim


def _vocab_size(metadata: Metadata, prefix: str, tensors: Mapping[str, GgufTensor]) -> int:
    """Rows of the embedding, which the tokenizer may fall short of by padding rows."""
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise TensorError(f"{metadata.shown}: there is no tensor token_embd.weight")
    rows = embedding.shape[0]
    stated = metadata.integer(f"{prefix}.vocab_size", rows)
    if stated != rows:
        raise ConfigError(
            f"{metadata.shown}: metadata {prefix}.vocab_size",
            expected=f"{rows:,}, the rows of token_embd.weight",
            found=f"{stated:,}",
        )
    return rows


def _rope_scaling(
    metadata: Metadata, prefix: str, config: Mapping[str, Any], factors: Sequence[float] | None
) -> dict[str, Any] | None:
    """Hugging Face's `rope_scaling`, None for plain rope."""
    scaling = f"{prefix}.rope.scaling"
    kind = metadata.string(f"{scaling}.type", "none")
    if kind == "none" and f"{prefix}.rope.scale_linear" in metadata:
        kind = "linear"  # How files of 2023 say it.
    if factors is not None:
        if kind != "none":
            raise UnsupportedError(
                f"{metadata.shown}: rope_freqs.weight together with {scaling}.type {quoted(kind)}"
            )
        return _llama3(factors, config, metadata.shown)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UnsupportedError(
            f"{metadata.shown}: metadata {scaling}.type",
            expected="none, linear or yarn",
            found=quoted(kind),
        )
    factor_key = f"{scaling}.factor"
    if kind == "linear" and factor_key not in metadata:
        factor_key = f"{prefix}.rope.scale_linear"
    factor = _positive(metadata, factor_key)
    result: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "linear":
        return None if factor == 1.0 else result
    result["original_max_position_embeddings"] = _size(
        metadata, f"{scaling}.original_context_length"
    )
    for name, source in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if f"{scaling}.{source}" in metadata:
            result[name] = _positive(metadata, f"{scaling}.{source}")
    if (scale := _positive(metadata, f"{scaling}.attn_factor", 1.0)) != 1.0:
        # llama.cpp multiplies its own magnitude correction by this; Hugging Face replaces it.
        result["attention_factor"] = scale * (0.1 * math.log(factor) + 1.0)
    return result


def llama3_factors(scaling: Mapping[str, float], theta: float, head_dim: int) -> list[float]:
    """What llama3 rope scaling divides each frequency by: the tensor rope_freqs.weight.

    scaling: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings, as in
    transformers' llama3 rope (modeling_rope_utils).
    """
    factor, low, high = (scaling[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = scaling["original_max_position_embeddings"]
    result = []
    for turns in _turns_per_token(theta, head_dim):
        # How often the pair turns within the original context, between `low` and `high`.
        smooth = min(max((original * turns - low) / (high - low), 0.0), 1.0)
        result.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return result


def _turns_per_token(theta: float, head_dim: int) -> list[float]:
    return [theta ** (-2 * pair / head_dim) / (2 * math.pi) for pair in range(head_dim // 2)]


def _llama3(factors: Sequence[float], config: Mapping[str, Any], shown: str) -> dict[str, Any]:
    """Recover llama3 parameters from the factors and verify them by computing the factors again.

    Between its two bounds 1/factor is a line in the frequency. The line fixes low : high : original
    context; that they can be scaled together without effect is settled by low = 1, as all released
    models have it.
    """
    theta, head_dim = config["rope_theta"], config["head_dim"]
    turns = _turns_per_token(theta, head_dim)
    if len(factors) != len(turns):
        raise TensorError(
            f"{shown}: rope_freqs.weight", expected=f"{len(turns)} values", found=f"{len(factors)}"
        )
    unsupported = UnsupportedError(
        f"{shown}: rope_freqs.weight", expected="the factors of llama3 rope scaling"
    )
    if not all(math.isfinite(value) and value > 0 for value in factors):
        raise unsupported
    largest = max(factors)
    if largest == 1.0:
        raise unsupported
    middle = [
        (turn, (1 / value - 1 / largest) / (1 - 1 / largest))
        for turn, value in zip(turns, factors, strict=True)
        if 1.0 + LLAMA3_TOLERANCE < value < largest * (1 - LLAMA3_TOLERANCE)
    ]
    for high in (4.0, _fitted_high(middle)):
        if high is None or not middle:
            continue
        turn, smooth = middle[len(middle) // 2]
        scaling = {
            "factor": float(f"{largest:.6g}"),
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": round((smooth * (high - 1.0) + 1.0) / turn),
        }
        again = llama3_factors(scaling, theta, head_dim)
        if all(
            abs(one - two) <= LLAMA3_TOLERANCE * one
            for one, two in zip(factors, again, strict=True)
        ):
            return {"rope_type": "llama3", **scaling}
    raise unsupported


def _fitted_high(middle: Sequence[tuple[float, float]]) -> float | None:
    """high / low from two points of smooth = (original * turns - low) / (high - low), low = 1."""
    if len(middle) < 2:
        return None
    (turn_a, smooth_a), (turn_b, smooth_b) = middle[0], middle[-1]
    slope = (smooth_a - smooth_b) / (turn_a - turn_b)
    intercept = smooth_a - slope * turn_a
    return round(1.0 - 1.0 / intercept, 3) if intercept < 0 else None
