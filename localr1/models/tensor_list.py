"""Every tensor that a checkpoint of a model holds, by name and shape, from its config alone: what
models/decoder.py and its parts read, so that a model can be planned before any of it is there."""

from collections.abc import Iterator

from localr1.checkpoint.expert_ranges import DOWN, GATE, UP
from localr1.models.config import LAYER_PREFIX, LatentConfig, ModelConfig, MoeConfig

Entry = tuple[str, tuple[int, ...]]
EXPERTS_PART = ".mlp.experts."
CHOICE_BIAS = ".mlp.gate.e_score_correction_bias"
"""DeepSeek-V3's, stored in float32 whatever the weights are."""


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape in the model's order, matrices [out, in], unquantized. A tied head is not
    among them, nor are layers for multi-token prediction, which are not loaded."""
    num_experts = 0 if config.moe is None else config.moe.router.num_experts
    shapes = dict(_outside(config)[:1])
    for layer in range(config.num_layers):
        shapes.update(_layer(config, layer, num_experts))
    shapes.update(_outside(config)[1:])
    return shapes


def tensor_kinds(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], int]]:
    """Of tensors that differ by the numbers in their names alone, one: name -> (shape, how many
    there are). A hundred entries where `tensor_shapes` has a hundred thousand."""
    mixtures = () if config.moe is None else config.moe.layers
    dense = [layer for layer in range(config.num_layers) if layer not in set(mixtures)]
    num_experts = 0 if config.moe is None else config.moe.router.num_experts
    kinds = {name: (shape, 1) for name, shape in _outside(config)}
    for layers in (dense, mixtures):
        for name, shape in _layer(config, layers[0], 1) if layers else ():
            alike = num_experts if EXPERTS_PART in name else 1
            kinds[name] = (shape, len(layers) * alike)
    return kinds


def _outside(config: ModelConfig) -> list[Entry]:
    """Embedding, norm, head."""
    table = (config.vocab_size, config.hidden_size)
    entries: list[Entry] = [("model.embed_tokens.weight", table)]
    entries.append(("model.norm.weight", (config.hidden_size,)))
    if not config.tie_embeddings:
        entries.append(("lm_head.weight", table))
    return entries


def _layer(config: ModelConfig, layer: int, num_experts: int) -> Iterator[Entry]:
    """num_experts: how many of a mixture to list."""
    prefix = f"{LAYER_PREFIX}{layer}"
    yield f"{prefix}.input_layernorm.weight", (config.hidden_size,)
    yield f"{prefix}.post_attention_layernorm.weight", (config.hidden_size,)
    if config.latent is None:
        yield from _attention(config, f"{prefix}.self_attn")
    else:
        yield from _latent_attention(config, config.latent, f"{prefix}.self_attn")
    if config.moe is not None and layer in config.moe.layers:
        yield from _mixture(config, config.moe, prefix, num_experts)
    else:
        yield from _mlp(config, f"{prefix}.mlp", config.intermediate_size)


def _attention(config: ModelConfig, name: str) -> Iterator[Entry]:
    hidden, queries = config.hidden_size, config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    for part, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield from _linear(f"{name}.{part}", rows, hidden, config.qkv_bias)
    yield from _linear(f"{name}.o_proj", hidden, queries, config.output_bias)
    if config.qk_norm:
        yield f"{name}.q_norm.weight", (config.head_dim,)
        yield f"{name}.k_norm.weight", (config.head_dim,)


def _latent_attention(config: ModelConfig, latent: LatentConfig, name: str) -> Iterator[Entry]:
    hidden, heads, rank = config.hidden_size, config.num_heads, latent.query_rank
    queries = heads * config.head_dim
    if rank is None:
        yield from _linear(f"{name}.q_proj", queries, hidden, False)
    else:
        yield from _linear(f"{name}.q_a_proj", rank, hidden, latent.bias)
        yield f"{name}.q_a_layernorm.weight", (rank,)
        yield from _linear(f"{name}.q_b_proj", queries, rank, False)
    cached = latent.latent_size + latent.rope_size
    yield from _linear(f"{name}.kv_a_proj_with_mqa", cached, hidden, latent.bias)
    yield f"{name}.kv_a_layernorm.weight", (latent.latent_size,)
    up = heads * (latent.key_size + latent.value_size)
    yield from _linear(f"{name}.kv_b_proj", up, latent.latent_size, False)
    yield from _linear(f"{name}.o_proj", hidden, heads * latent.value_size, latent.bias)


def _mixture(config: ModelConfig, moe: MoeConfig, prefix: str, num_experts: int) -> Iterator[Entry]:
    name, routed = f"{prefix}.mlp", moe.router.num_experts
    yield f"{name}.gate.weight", (routed, config.hidden_size)
    if moe.choice_bias:
        yield f"{prefix}{CHOICE_BIAS}", (routed,)
    if moe.shared_size:
        yield from _mlp(config, f"{name}.shared_experts", moe.shared_size)
    hidden, inner = config.hidden_size, moe.intermediate_size
    for expert in range(num_experts):
        for part, shape in (
            (GATE, (inner, hidden)),
            (UP, (inner, hidden)),
            (DOWN, (hidden, inner)),
        ):
            yield f"{prefix}{EXPERTS_PART}{expert}.{part}.weight", shape


def _mlp(config: ModelConfig, name: str, inner: int) -> Iterator[Entry]:
    hidden, bias = config.hidden_size, config.mlp_bias
    yield from _linear(f"{name}.{GATE}", inner, hidden, bias)
    yield from _linear(f"{name}.{UP}", inner, hidden, bias)
    yield from _linear(f"{name}.{DOWN}", hidden, inner, bias)


def _linear(name: str, rows: int, columns: int, bias: bool) -> Iterator[Entry]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)
