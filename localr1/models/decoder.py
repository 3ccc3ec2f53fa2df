"""The decoder that all architectures share: embedding, blocks of attention (dense or latent) and
MLP (gated or a mixture of experts), norm, head. Tensor names are those of Hugging Face's
*ForCausalLM.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from localr1.cache.dense import DenseCache
from localr1.cache.mla import LatentCache
from localr1.cache.sequence import Cache
from localr1.checkpoint.api import Checkpoint
from localr1.errors import ContextError, TokenizerError
from localr1.kernels.api import Kernels, RopeTable
from localr1.layers.attention import (
    AttentionBlock,
    AttentionParts,
    FusedAttention,
    build_attention,
)
from localr1.layers.linear import Embedding, Linear, PackedLinear
from localr1.layers.mla import LatentAttention
from localr1.layers.mlp import FusedMlp, MlpBlock, build_mlp
from localr1.layers.moe import ExpertSource, MoeBlock, PassObserver
from localr1.layers.rope import Rope
from localr1.models.config import LAYER_PREFIX, ModelConfig
from localr1.models.latent_weights import load_latent_attention
from localr1.models.moe_weights import load_gated_mlp, load_mixture
from localr1.models.step import Step
from localr1.models.weights import WeightLoader

Attention = Callable[[Tensor, RopeTable, Any, int], None]
"""An AttentionBlock or LatentAttention: each reads the layers of its own kind of cache."""


class Decoder:
    """A loaded model (`localr1.models.api.Model`)."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Embedding,
        layers: list[tuple[Attention, MlpBlock]],
        norm: Tensor,
        head: Linear,
        weight_bytes: int,
    ) -> None:
        self.config = config
        self.weight_bytes = weight_bytes
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._head = head
        self._rope = Rope(config.rope, config.rope_size)
        # Half the bytes where the arithmetic is quantized anyway; exact for float weights.
        quantized = any(_is_quantized(attention) for attention, _ in layers)
        self.cache_dtype = torch.float16 if quantized else torch.float32
        self._observer: PassObserver | None = None

    @property
    def layers(self) -> Sequence[tuple[Attention, MlpBlock]]:
        return self._layers

    @property
    def norm(self) -> Tensor:
        """float32 [hidden], before the head."""
        return self._norm

    @property
    def head(self) -> Linear:
        return self._head

    def new_cache(self, limit: int) -> Cache[Any]:
        self.check_window(limit)
        return make_cache(self.config, self.cache_dtype, limit)

    def check_window(self, limit: int) -> None:
        """Raises ContextError when the model was not made for so many positions."""
        if limit > self.config.max_positions:
            raise ContextError(
                "context window",
                expected=f"at most the {self.config.max_positions} tokens this model was made for",
                found=limit,
            )

    def forward(self, step: Step, cache: Cache[Any]) -> Tensor:
        num_tokens = self.check(step, cache)
        cache.reserve(num_tokens)
        x = self.embed(step.token_ids)
        with self.observed(num_tokens):
            self.run_layers(x, cache, step.start)
        logits = self.logits(x if step.all_logits else x[-1:])
        cache.advance(num_tokens)
        return logits

    def quantize_cache(self) -> None:
        """Caches made from now on keep their rows in 8 bits (kernels/cache_rows.py)."""
        self.cache_dtype = torch.int8

    def same_bits(self, num_tokens: int) -> bool:
        """Where all but the embedding is packed, and attention takes one form for any number of
        tokens up to this one (docs/arithmetic.md); torch's products depend on their sizes."""
        if not isinstance(self._head, PackedLinear):
            return False
        return all(
            _splits_freely(attention, num_tokens) and _is_under_contract(mlp)
            for attention, mlp in self._layers
        )

    def check(self, step: Step, cache: Cache[Any]) -> int:
        """The number of tokens. Raises TokenizerError."""
        ids = step.token_ids
        assert ids.dtype == torch.int64
        assert ids.dim() == 1
        assert len(ids) > 0
        assert step.start == cache.length
        lowest, highest = (int(bound) for bound in torch.aminmax(ids))
        if lowest < 0 or highest >= self.config.vocab_size:
            raise TokenizerError(
                "token id",
                expected=f"0 to {self.config.vocab_size - 1}, the model's vocabulary",
                found=lowest if lowest < 0 else highest,
                fix="The tokenizer and the weights do not belong together.",
            )
        return len(ids)

    def embed(self, ids: Tensor) -> Tensor:
        """ids int64 [T] -> float32 [T, hidden], a new tensor."""
        return self._embedding(ids)

    def run_layers(self, x: Tensor, cache: Cache[Any], start: int, first: int = 0) -> None:
        """x float32 [T, hidden] goes through the layers from `first` on, in place. The cache must
        have room for these tokens."""
        rope = self.rope_table(start + len(x))
        for index in range(first, len(self._layers)):
            attention, mlp = self._layers[index]
            attention(x, rope, cache.layer(index), start)
            mlp(x)

    @contextmanager
    def observed(self, num_tokens: int) -> Iterator[None]:
        """A pass of so many tokens through all layers, wherever each is computed."""
        if self._observer is None:
            yield
            return
        self._observer.begin_pass(num_tokens)
        try:
            yield
        finally:
            self._observer.end_pass()

    def logits(self, x: Tensor) -> Tensor:
        """Of what the last layer made of these tokens."""
        return self._head.after_norm(x, self._norm, self.config.rms_norm_eps)

    def rope_table(self, positions: int) -> RopeTable:
        """Of at least so many."""
        return self._rope.table(positions)

    @property
    def mixtures(self) -> dict[int, MoeBlock]:
        """The blocks with routed experts, by the numbers of their layers."""
        return {i: mlp for i, (_, mlp) in enumerate(self._layers) if isinstance(mlp, MoeBlock)}

    def observe_passes(self, observer: PassObserver) -> None:
        """Tell it of every run through the layers from now on."""
        self._observer = observer

    def wrap_experts(self, wrap: Callable[[int, ExpertSource], ExpertSource]) -> None:
        """Put what `wrap` makes of a layer's number and its routed experts in their place."""
        self._layers = [
            (
                attention,
                replace(mlp, experts=wrap(index, mlp.experts))
                if isinstance(mlp, MoeBlock)
                else mlp,
            )
            for index, (attention, mlp) in enumerate(self._layers)
        ]


def _is_quantized(attention: Attention) -> bool:
    if isinstance(attention, LatentAttention):
        return isinstance(attention.parts.o, PackedLinear)
    return isinstance(attention, FusedAttention)


def _splits_freely(attention: Attention, num_tokens: int) -> bool:
    if isinstance(attention, LatentAttention):
        return attention.splits_freely(num_tokens)
    return isinstance(attention, FusedAttention) and attention.kernels.splits_freely


def _is_under_contract(mlp: MlpBlock) -> bool:
    if isinstance(mlp, MoeBlock):
        return mlp.is_under_contract
    return isinstance(mlp, FusedMlp)


def make_cache(config: ModelConfig, dtype: torch.dtype, limit: int) -> Cache[Any]:
    """An empty cache of the kind this model's attention reads."""
    if config.latent is not None:
        latent = config.latent
        return LatentCache(config.num_layers, latent.latent_size, latent.rope_size, dtype, limit)
    return DenseCache(config.num_layers, config.num_kv_heads, config.head_dim, dtype, limit)


def load_decoder(
    checkpoint: Checkpoint, config: ModelConfig, kernels: Kernels, *, leave_experts: bool = False
) -> Decoder:
    """Read every weight, but for packed experts where `leave_experts` (they are UnreadExperts then,
    until `wrap_experts` puts others in their place). Raises TensorError when one is missing,
    misshapen or left over."""
    loader = WeightLoader(checkpoint, kernels, leaves_experts=leave_experts)
    hidden = config.hidden_size
    embedding = loader.embedding(
        "model.embed_tokens", config.vocab_size, hidden, is_head=config.tie_embeddings
    )
    layers = [load_layer(loader, index, config, kernels) for index in range(config.num_layers)]
    norm = loader.vector("model.norm.weight", hidden)
    if config.tie_embeddings:
        head = embedding.as_head()
        loader.check_duplicate("lm_head", "model.embed_tokens")
    else:
        head = loader.linear("lm_head", config.vocab_size, hidden, bias=False)
    loader.finish(config.is_left_out)
    return Decoder(config, embedding, layers, norm, head, loader.nbytes)


def load_layer(
    loader: WeightLoader, index: int, config: ModelConfig, kernels: Kernels
) -> tuple[Attention, MlpBlock]:
    """One layer's blocks; quantization loads them so, one at a time."""
    prefix = f"{LAYER_PREFIX}{index}"
    attention: Attention
    if config.latent is None:
        attention = _load_attention(loader, prefix, config, kernels)
    else:
        attention = load_latent_attention(loader, prefix, config, config.latent)
    if config.moe is not None and index in config.moe.layers:
        return attention, load_mixture(loader, prefix, config, config.moe, kernels)
    return attention, _load_mlp(loader, prefix, config, kernels)


def _load_attention(
    loader: WeightLoader, prefix: str, config: ModelConfig, kernels: Kernels
) -> AttentionBlock:
    name = f"{prefix}.self_attn"
    hidden, head_dim = config.hidden_size, config.head_dim
    queries, keys = config.num_heads * head_dim, config.num_kv_heads * head_dim
    parts = AttentionParts(
        norm=loader.vector(f"{prefix}.input_layernorm.weight", hidden),
        q=loader.linear(f"{name}.q_proj", queries, hidden, bias=config.qkv_bias),
        k=loader.linear(f"{name}.k_proj", keys, hidden, bias=config.qkv_bias),
        v=loader.linear(f"{name}.v_proj", keys, hidden, bias=config.qkv_bias),
        o=loader.linear(f"{name}.o_proj", hidden, queries, bias=config.output_bias),
        q_norm=loader.vector(f"{name}.q_norm.weight", head_dim) if config.qk_norm else None,
        k_norm=loader.vector(f"{name}.k_norm.weight", head_dim) if config.qk_norm else None,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=head_dim,
        eps=config.rms_norm_eps,
        scale=head_dim**-0.5,
    )
    return build_attention(parts, kernels)


def _load_mlp(loader: WeightLoader, prefix: str, config: ModelConfig, kernels: Kernels) -> MlpBlock:
    norm = loader.vector(f"{prefix}.post_attention_layernorm.weight", config.hidden_size)
    parts = load_gated_mlp(loader, f"{prefix}.mlp", norm, config.intermediate_size, config)
    return build_mlp(parts, kernels)
