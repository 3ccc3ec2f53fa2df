"""What a layer is on the card: addresses of its weights there, the same blocked bytes as in RAM."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from localr1.card.region import Region
from localr1.kernels.api import AttentionWeights, LatentWeights, MlpWeights, Weight
from localr1.kernels.gpu_layout import MatrixLayout, RouterArguments
from localr1.kernels.native_weight import SCALE_TYPES, matrix
from localr1.layers.router import Router


@dataclass(frozen=True)
class CardLinear:
    """A quantized matrix [rows, columns]. data, bias: addresses; bias 0 for none."""

    layout: MatrixLayout
    data: int
    bias: int

    @property
    def rows(self) -> int:
        return int(self.layout.rows)

    @property
    def columns(self) -> int:
        return int(self.layout.columns)


@dataclass(frozen=True)
class CardAttention:
    """`AttentionWeights` on the card; norms are addresses, 0 for none. projections: to queries,
    keys and values, in this order, of one matrix or of three."""

    norm: int
    projections: tuple[CardLinear, ...]
    o: CardLinear
    q_norm: int
    k_norm: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    scale: float


@dataclass(frozen=True)
class CardLatent:
    """`LatentWeights` on the card; norms, key_up and value_up are addresses. up_type: of the two, a
    ScaleType of cuda/blocks.h. projections: kv_down and the queries' matrix that reads the residual
    stream, to first_rows values, in this order, of one matrix or of two. q: the queries' second."""

    norm: int
    projections: tuple[CardLinear, ...]
    first_rows: int
    q_norm: int
    q: CardLinear | None
    kv_norm: int
    key_up: int
    value_up: int
    up_type: int
    o: CardLinear
    num_heads: int
    key_size: int
    latent_size: int
    rope_size: int
    value_size: int
    eps: float
    latent_eps: float
    scale: float


@dataclass(frozen=True)
class CardMlp:
    """`MlpWeights` on the card."""

    norm: int
    gate: CardLinear
    up: CardLinear
    down: CardLinear
    eps: float


@dataclass(frozen=True)
class Mixture:
    """A mixture but for its routed experts, as the CPU has it."""

    norm: Tensor
    router: Router
    shared: MlpWeights | None
    eps: float


@dataclass(frozen=True)
class CardMixture:
    """The same on the card. router [experts, hidden] and bias are addresses of float32, bias 0 for
    none."""

    norm: int
    router: int
    bias: int
    rule: RouterArguments
    shared: CardMlp | None
    eps: float


@dataclass(frozen=True)
class CardHead:
    """The last norm and the matrix behind it."""

    norm: int
    matrix: CardLinear
    eps: float


def place_linear(weight: Weight, bias: Tensor | None, region: Region) -> CardLinear:
    """Raises KernelError for a weight that is not the native kernels'."""
    native = matrix(weight)
    return CardLinear(
        MatrixLayout(*native.layout),
        region.copied(native.address, native.nbytes),
        region.tensor(bias),
    )


def place_side_by_side(
    parts: Sequence[tuple[Weight, Tensor | None]], region: Region
) -> tuple[CardLinear, ...]:
    """Matrices with their biases that read the same activations, as one matrix if they can be: what
    is one launch fills a card better than several that are a part of it each. Row blocks stand one
    behind another, so it takes those of the same layout, all but the last of whole blocks."""
    layouts = [matrix(weight).layout for weight, _ in parts]
    has_bias = [bias is not None for _, bias in parts]
    alike = len({layout[1:] for layout in layouts}) == 1
    rows_per_block = layouts[0][2]
    whole = all(layout[0] % rows_per_block == 0 for layout in layouts[:-1])
    if not (alike and whole and len(set(has_bias)) == 1):
        return tuple(place_linear(weight, bias, region) for weight, bias in parts)
    natives = [matrix(weight) for weight, _ in parts]
    rows = sum(layout[0] for layout in layouts)
    data = region.joined([(native.address, native.nbytes) for native in natives])
    biases = [bias for _, bias in parts if bias is not None]
    bias = region.tensor(torch.cat(biases)) if biases else 0
    return (CardLinear(MatrixLayout(rows, *layouts[0][1:]), data, bias),)


def place_attention(weights: AttentionWeights, region: Region) -> CardAttention:
    w = weights
    return CardAttention(
        norm=region.tensor(w.norm),
        projections=place_side_by_side([(w.q, w.q_bias), (w.k, w.k_bias), (w.v, w.v_bias)], region),
        o=place_linear(w.o, w.o_bias, region),
        q_norm=region.tensor(w.q_norm),
        k_norm=region.tensor(w.k_norm),
        num_heads=w.num_heads,
        num_kv_heads=w.num_kv_heads,
        head_dim=w.head_dim,
        eps=w.eps,
        scale=w.scale,
    )


def place_latent(weights: LatentWeights, region: Region) -> CardLatent:
    w = weights
    first = (w.q, w.q_bias) if w.q_down is None else (w.q_down, w.q_down_bias)
    return CardLatent(
        norm=region.tensor(w.norm),
        projections=place_side_by_side([(w.kv_down, w.kv_down_bias), first], region),
        first_rows=first[0].out_features,
        q_norm=region.tensor(w.q_norm),
        q=None if w.q_down is None else place_linear(w.q, w.q_bias, region),
        kv_norm=region.tensor(w.kv_norm),
        key_up=region.tensor(w.key_up),
        value_up=region.tensor(w.value_up),
        up_type=SCALE_TYPES[w.key_up.dtype],
        o=place_linear(w.o, w.o_bias, region),
        num_heads=w.num_heads,
        key_size=w.key_size,
        latent_size=w.latent_size,
        rope_size=w.rope_size,
        value_size=w.value_size,
        eps=w.eps,
        latent_eps=w.latent_eps,
        scale=w.scale,
    )


def place_mlp(weights: MlpWeights, region: Region) -> CardMlp:
    w = weights
    return CardMlp(
        norm=region.tensor(w.norm),
        gate=place_linear(w.gate, w.gate_bias, region),
        up=place_linear(w.up, w.up_bias, region),
        down=place_linear(w.down, w.down_bias, region),
        eps=w.eps,
    )


def place_mixture(mixture: Mixture, region: Region) -> CardMixture:
    """Raises KernelError for a rule that the router's kernel cannot hold."""
    router = mixture.router
    return CardMixture(
        norm=region.tensor(mixture.norm),
        router=region.tensor(router.weight),
        bias=region.tensor(router.choice_bias),
        rule=RouterArguments.of(router.rule),
        shared=None if mixture.shared is None else place_mlp(mixture.shared, region),
        eps=mixture.eps,
    )
