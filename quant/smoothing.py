"""Columns whose inputs are large lend some of their size to the weights, before either is rounded.

A group of 32 activations shares one int8 scale, so its largest column decides how coarsely the
others are rounded. Dividing column j of the activations by s_j, and multiplying column j of every
matrix that reads them by it, changes nothing in the product but evens out the group (Xiao et al.
2022, "SmoothQuant", section 4; weights of large inputs also get finer codes, as in Lin et al. 2023,
"AWQ"). The division costs nothing when the model runs: it goes into what makes the activations, a
norm's weight or the rows of the matrix before. So a smoothed model is a model as any other.

s_j is SmoothQuant's with its exponent of 1/2, of root mean squares instead of maxima: the square
root of the size of the inputs over that of the weights, which leaves both equally uneven.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from localr1.models.config import LAYER_PREFIX, ModelConfig
from localr1.quant.moments import Columns, floored

STEPS = 8
"""Of s_j between a power of 2 and the next: measurements that differ by rounding, as those of
machines do, give the same s_j but for one in millions."""


@dataclass(frozen=True)
class Smoothing:
    """Keys are names without ".weight". replaced: norms, as they are stored. columns: float32 [in],
    what the columns of a matrix are multiplied by. rows: float32 [out], what the rows of a matrix
    and of its bias ("X.bias") are divided by."""

    replaced: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]

    def touches(self, name: str) -> bool:
        """Whether `applied` changes the tensor `name`."""
        name = name.removesuffix(".weight")
        return name in self.replaced or name in self.columns or name in self.rows

    def applied(self, name: str, value: Tensor, first_row: int = 0) -> Tensor:
        """The tensor `name` of the smoothed model, made from that of the source; of a part of its
        rows, from `first_row` on, that part."""
        name = name.removesuffix(".weight")
        if name in self.replaced:
            return self.replaced[name][first_row : first_row + len(value)]
        if name not in self.columns and name not in self.rows:
            return value
        value = value.to(torch.float32, copy=True)  # The caller's stays as it is.
        if name in self.columns:
            value *= self.columns[name]
        if name in self.rows:
            rows = self.rows[name][first_row : first_row + len(value)]
            value /= rows[:, None] if value.dim() == 2 else rows
        return value


@dataclass(frozen=True)
class Link:
    """readers: the modules that read what `maker` makes, a norm or a matrix."""

    maker: str
    readers: tuple[str, ...]

    @property
    def is_norm(self) -> bool:
        return self.maker.endswith("norm")


def links(config: ModelConfig, quantized: Collection[str]) -> list[Link]:
    """Where a dense decoder can be smoothed: the matrices must be quantized, since those kept in 16
    bits would be rounded anew. None in a mixture of experts, whose norms a router reads too and
    whose every expert would have to be run, and none with latent attention.
    """
    if config.latent is not None or config.moe is not None:
        return []
    every = [Link("model.norm", ("lm_head",))]
    for index in range(config.num_layers):
        layer = f"{LAYER_PREFIX}{index}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        every += [
            Link(f"{layer}.input_layernorm", tuple(f"{attention}.{x}_proj" for x in "qkv")),
            Link(f"{attention}.v_proj", (f"{attention}.o_proj",)),
            Link(f"{layer}.post_attention_layernorm", (f"{mlp}.gate_proj", f"{mlp}.up_proj")),
            Link(f"{mlp}.up_proj", (f"{mlp}.down_proj",)),
        ]
    return [
        link
        for link in every
        if all(reader in quantized for reader in link.readers)
        and (link.is_norm or link.maker in quantized)
    ]


def smoothing(
    wanted: Collection[Link],
    measured: Mapping[str, Columns],
    norms: Mapping[str, Tensor],
    kept_dtype: torch.dtype,
    config: ModelConfig,
) -> Smoothing:
    """measured: of `calibrate.Calibration`. norms: the weights of the makers that are norms.
    kept_dtype: what norms are stored as; the columns make up for that rounding exactly."""
    replaced: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for link in wanted:
        scale = _scale([measured[reader] for reader in link.readers])
        if link.is_norm:
            replaced[link.maker], scale = _divided_norm(norms[link.maker], scale, kept_dtype)
        else:
            if link.maker.endswith(".v_proj"):
                scale = _shared_by_heads(scale, config)
                made = scale.view(config.num_kv_heads, -1, config.head_dim)[:, 0].flatten()
            else:
                made = scale
            rows[link.maker] = rows[f"{link.maker}.bias"] = made
        columns.update(dict.fromkeys(link.readers, scale))
    return Smoothing(replaced, columns, rows)


def _scale(readers: Sequence[Columns]) -> Tensor:
    """float32 [in], its geometric mean 1: the model's weights stay as large as they were. The
    readers saw the same inputs."""
    weights = torch.stack([columns.weights for columns in readers]).sum(0)
    # Of squares: a quarter power for the square root of a ratio of root mean squares.
    logarithm = 0.25 * (floored(readers[0].inputs).log2() - floored(weights).log2())
    logarithm -= logarithm.mean()
    return torch.exp2(torch.round(logarithm * STEPS) / STEPS).to(torch.float32)


def _divided_norm(norm: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What is stored of norm / scale, and the scale that it really was divided by. A weight of 0
    stays so, with a scale of 1."""
    norm = norm.to(torch.float32)
    stored = (norm / scale).to(dtype)
    divided = norm / stored.to(torch.float32)
    usable = torch.isfinite(divided) & (divided > 0)
    return torch.where(usable, stored, norm.to(dtype)), torch.where(usable, divided, 1.0)


def _shared_by_heads(scale: Tensor, config: ModelConfig) -> Tensor:
    """[heads * head_dim]: query heads that read the same values are given one scale, the geometric
    mean of theirs."""
    heads = scale.log().view(config.num_kv_heads, -1, config.head_dim)
    return heads.mean(1, keepdim=True).exp().expand_as(heads).flatten()
