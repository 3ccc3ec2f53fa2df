"""What of a model a card has kernels for, as the CPU has it; and how much memory it takes there."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from localr1.card.region import Region
from localr1.card.step import CardRope, LayerMemory
from localr1.card.weights import (
    CardAttention,
    CardHead,
    CardLatent,
    CardMixture,
    CardMlp,
    Mixture,
    place_attention,
    place_latent,
    place_linear,
    place_mixture,
    place_mlp,
)
from localr1.card.workspace import FLOAT, Sizes
from localr1.errors import KernelError
from localr1.kernels import gpu_launch
from localr1.kernels.api import AttentionWeights, LatentWeights, MlpWeights, RopeTable
from localr1.kernels.gpu_layout import RouterArguments
from localr1.layers.attention import FusedAttention
from localr1.layers.linear import PackedLinear
from localr1.layers.mla import LatentAttention
from localr1.layers.mlp import FusedMlp, MlpBlock
from localr1.layers.moe import MoeBlock, UnreadExperts
from localr1.models.decoder import Attention, Decoder


@dataclass(frozen=True)
class PlacedLayer:
    """A layer on the card."""

    attention: CardAttention | CardLatent
    mlp: CardMlp | CardMixture


@dataclass(frozen=True)
class ModelLayer:
    """A layer that the card can compute. inner: of a routed expert."""

    attention: AttentionWeights | LatentWeights
    mlp: MlpWeights | Mixture
    inner: int = 0

    def place(self, region: Region) -> PlacedLayer:
        attention, mlp = self.attention, self.mlp
        return PlacedLayer(
            place_attention(attention, region)
            if isinstance(attention, AttentionWeights)
            else place_latent(attention, region),
            place_mlp(mlp, region) if isinstance(mlp, MlpWeights) else place_mixture(mlp, region),
        )

    def place_cache(self, capacity: int, half: bool, region: Region) -> LayerMemory:
        size, attention = 2 if half else FLOAT, self.attention
        if isinstance(attention, LatentWeights):
            rows = region.reserve(size * capacity * _cached(attention))
            return LayerMemory(rows, rows, capacity, half)
        nbytes = size * attention.num_kv_heads * capacity * attention.head_dim
        return LayerMemory(region.reserve(nbytes), region.reserve(nbytes), capacity, half)


@dataclass(frozen=True)
class ModelHead:
    """norm: [hidden], before the matrix."""

    norm: Tensor
    matrix: PackedLinear
    eps: float

    def place(self, region: Region) -> CardHead:
        matrix = place_linear(self.matrix.weight, self.matrix.bias, region)
        return CardHead(region.tensor(self.norm), matrix, self.eps)


def place_rope(table: RopeTable, capacity: int, region: Region) -> CardRope:
    cos, sin = (each[:capacity].contiguous() for each in (table.cos, table.sin))
    return CardRope(region.tensor(cos), region.tensor(sin), cos.shape[1])


def computable_layers(model: Decoder) -> list[ModelLayer]:
    """The first layers, up to one that the card has no kernels for."""
    found: list[ModelLayer] = []
    for attention, mlp in model.layers:
        weights, block = _attention(attention, model.config.max_positions), _mlp(mlp)
        if weights is None or block is None:
            break
        found.append(ModelLayer(weights, *block))
    return found


def computable_head(model: Decoder) -> ModelHead | None:
    head = model.head
    if not isinstance(head, PackedLinear):
        return None
    return ModelHead(model.norm, head, model.config.rms_norm_eps)


def sizes_of(layers: Sequence[ModelLayer], capacity: int) -> Sizes:
    """Of a workspace for all of them, without a head."""
    each = [_sizes(layer, capacity) for layer in layers]
    return Sizes(
        **{name: max(getattr(one, name) for one in each) for name in Sizes.__dataclass_fields__}
    )


def _attention(attention: Attention, capacity: int) -> AttentionWeights | LatentWeights | None:
    if isinstance(attention, FusedAttention):
        return attention.weights
    if not isinstance(attention, LatentAttention) or attention.weights is None:
        return None
    w = attention.weights
    try:
        gpu_launch.attend(w.num_heads, 1, 1, capacity, (_cached(w), w.latent_size), half=True)
    except KernelError:
        return None
    return w


def _mlp(mlp: MlpBlock) -> tuple[MlpWeights | Mixture, int] | None:
    if isinstance(mlp, FusedMlp):
        return mlp.weights, 0
    # Experts that all lie in memory, or are not alike, are the CPU's.
    if not isinstance(mlp, MoeBlock) or not isinstance(mlp.experts, UnreadExperts):
        return None
    if not (mlp.shared is None or isinstance(mlp.shared, FusedMlp)):
        return None
    try:
        RouterArguments.of(mlp.router.rule)
    except KernelError:
        return None
    shared = None if mlp.shared is None else mlp.shared.weights
    return Mixture(mlp.norm, mlp.router, shared, mlp.eps), mlp.experts.inner


def _sizes(layer: ModelLayer, capacity: int) -> Sizes:
    a, mlp = layer.attention, layer.mlp
    hidden, o = a.o.out_features, a.o.in_features
    gated = mlp.shared if isinstance(mlp, Mixture) else mlp
    rule = mlp.router.rule if isinstance(mlp, Mixture) else None
    if isinstance(a, LatentWeights):
        first = a.q_down or a.q
        projected = _cached(a) + first.out_features
        inputs, dim = max(hidden, o, first.out_features), a.latent_size
        absorbed, expanded, queries = a.num_heads * _cached(a), o, a.q.out_features
    else:
        projected = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim
        inputs, dim = max(hidden, o), a.head_dim
        absorbed, expanded, queries = 0, 0, o
    return Sizes(
        hidden=hidden,
        inputs=inputs,
        gated=0 if gated is None else gated.down.in_features,
        projected=projected,
        queries=queries,
        heads=a.num_heads,
        dim=dim,
        capacity=capacity,
        absorbed=absorbed,
        expanded=expanded,
        experts=0 if rule is None else rule.num_experts,
        chosen=0 if rule is None else rule.experts_per_token,
        expert_inner=layer.inner,
    )


def _cached(weights: LatentWeights) -> int:
    """Values that the cache keeps of a position."""
    return weights.latent_size + weights.rope_size
