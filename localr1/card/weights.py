"""What a layer is on the card: addresses of its weights there, the same blocked bytes as in RAM."""

from dataclasses import dataclass

from torch import Tensor

from localr1.card.region import Region
from localr1.kernels.api import AttentionWeights, MlpWeights, Weight
from localr1.kernels.gpu_layout import MatrixLayout
from localr1.kernels.native_weight import matrix


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
    """`AttentionWeights` on the card; norms are addresses, 0 for none."""

    norm: int
    queries_keys_values: tuple[CardLinear, CardLinear, CardLinear]
    o: CardLinear
    q_norm: int
    k_norm: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
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


def place_attention(weights: AttentionWeights, region: Region) -> CardAttention:
    w = weights
    return CardAttention(
        norm=region.tensor(w.norm),
        queries_keys_values=(
            place_linear(w.q, w.q_bias, region),
            place_linear(w.k, w.k_bias, region),
            place_linear(w.v, w.v_bias, region),
        ),
        o=place_linear(w.o, w.o_bias, region),
        q_norm=region.tensor(w.q_norm),
        k_norm=region.tensor(w.k_norm),
        num_heads=w.num_heads,
        num_kv_heads=w.num_kv_heads,
        head_dim=w.head_dim,
        eps=w.eps,
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
