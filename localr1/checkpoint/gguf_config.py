"""The config.json of a GGUF file, rebuilt from its metadata.

Keys are llama.cpp's (gguf-py/gguf/constants.py, Keys). A key of the architecture that is not known
here is an error naming it, because it may change the mathematics.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from localr1.checkpoint import gguf_mixtures as mixtures
from localr1.checkpoint.gguf_header import GgufTensor
from localr1.checkpoint.gguf_metadata import Metadata
from localr1.checkpoint.gguf_names import Architecture
from localr1.checkpoint.gguf_rope import rope_scaling
from localr1.checkpoint.paths import quoted
from localr1.errors import ConfigError, TensorError, UnsupportedError

MAX_LAYERS = 4096
DEFAULT_ROPE_THETA = 10_000.0

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
    "nextn_predict_layers": 0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
}
"""Keys that change nothing at this value, and are not honoured at another."""


def num_layers(metadata: Metadata) -> int:
    return metadata.size(f"{metadata.string('general.architecture')}.block_count", MAX_LAYERS)


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
    layers = num_layers(metadata)
    hidden = metadata.size(f"{prefix}.embedding_length")
    heads = metadata.size(f"{prefix}.attention.head_count")
    config: dict[str, Any] = {
        "architectures": [kind.class_name],
        "model_type": kind.model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": metadata.size(f"{prefix}.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **_attention(metadata, prefix, kind, hidden, heads),
        "max_position_embeddings": metadata.size(f"{prefix}.context_length"),
        "rms_norm_eps": metadata.number(f"{prefix}.attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.positive(f"{prefix}.rope.freq_base", DEFAULT_ROPE_THETA),
        "vocab_size": _vocab_size(metadata, prefix, tensors),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if kind.experts:
        config |= mixtures.read_mixture(metadata, prefix, layers)
    if kind.model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    elif kind.model_type in ("qwen3", "qwen3_moe"):
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    scaling = rope_scaling(metadata, prefix, kind, config, rope_factors)
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
        if name in _KNOWN_KEYS or name in mixtures.KEYS.get(prefix, ()):
            continue
        neutral = mixtures.NEUTRAL.get(prefix, {}).get(name, _NEUTRAL.get(name))
        if neutral is None:
            raise UnsupportedError(f"{metadata.shown}: metadata {quoted(key)} is not honoured")
        found: int | float
        if isinstance(neutral, bool):
            found = metadata.boolean(key)
        elif isinstance(neutral, float):
            found = metadata.number(key)
        else:
            found = metadata.integer(key)
        if found != neutral:
            raise UnsupportedError(
                f"{metadata.shown}: metadata {key}", expected=neutral, found=found
            )


def _attention(
    metadata: Metadata, prefix: str, kind: Architecture, hidden: int, heads: int
) -> dict[str, Any]:
    if kind.has_latent:
        return mixtures.read_latent(metadata, prefix, heads)
    return {
        "num_key_value_heads": metadata.size(f"{prefix}.attention.head_count_kv", default=heads),
        "head_dim": _head_dim(metadata, prefix, hidden, heads),
    }


def _head_dim(metadata: Metadata, prefix: str, hidden: int, heads: int) -> int:
    key = f"{prefix}.attention.key_length"
    if key not in metadata and hidden % heads:
        raise ConfigError(
            f"{metadata.shown}: embedding_length",
            expected=f"a multiple of {heads} heads",
            found=f"{hidden:,}",
        )
    head_dim = metadata.size(key, default=hidden // heads or 1)
    for name in ("attention.value_length", "rope.dimension_count"):
        found = metadata.size(f"{prefix}.{name}", default=head_dim)
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
