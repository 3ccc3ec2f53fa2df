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

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from localr1.models.config import LAYER_PREFIX, ModelConfig
from localr1.qtypes import QuantScheme
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
    """readers: the quantized modules that read what `maker` makes, a norm or a matrix. kept: those
    beside them that are not quantized: a router. searched: its scale is by awq.py."""

    maker: str
    readers: tuple[str, ...]
    kept: tuple[str, ...] = ()
    searched: bool = False

    @property
    def is_norm(self) -> bool:
        return self.maker.endswith("norm")


def links(
    config: ModelConfig, quantized: Mapping[str, QuantScheme], *, smooth: bool, awq: bool
) -> list[Link]:
    """Where a decoder can be smoothed: the matrices must be quantized, since those kept in 16 bits
    would be rounded anew. smooth: by the sizes of inputs and weights, dense models alone. awq:
    search the scales of matrices of fewer than 8 bits, of mixtures too; the activations of the
    others need more evening out than their weights.
    """
    every = [Link("model.norm", ("lm_head",))]
    for index in range(config.num_layers):
        every += _links_of_layer(config, index)
    found = []
    for link in every:
        makers = () if link.is_norm else (link.maker,)
        if any(module not in quantized for module in (*link.readers, *makers)):
            continue
        searched = awq and any(quantized[reader].bits < 8 for reader in link.readers)
        if searched or (smooth and config.latent is None and config.moe is None):
            found.append(replace(link, searched=searched))
    return found


def _links_of_layer(config: ModelConfig, index: int) -> list[Link]:
    layer = f"{LAYER_PREFIX}{index}"
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    before = f"{layer}.input_layernorm"
    if config.latent is None:
        found = [
            Link(before, tuple(f"{attention}.{x}_proj" for x in "qkv")),
            Link(f"{attention}.v_proj", (f"{attention}.o_proj",)),
        ]
    else:
        latent = f"{attention}.kv_a_proj_with_mqa"
        if config.latent.query_rank is None:
            found = [Link(before, (f"{attention}.q_proj", latent))]
        else:
            found = [
                Link(before, (f"{attention}.q_a_proj", latent)),
                Link(f"{attention}.q_a_layernorm", (f"{attention}.q_b_proj",)),
            ]
    after = f"{layer}.post_attention_layernorm"
    gated, kept = [mlp], tuple[str, ...]()
    if config.moe is not None and index in config.moe.layers:
        gated = [f"{mlp}.experts.{number}" for number in range(config.moe.router.num_experts)]
        if config.moe.shared_size:
            gated.append(f"{mlp}.shared_experts")
        kept = (f"{mlp}.gate",)
    readers = tuple(f"{each}.{part}_proj" for each in gated for part in ("gate", "up"))
    found.append(Link(after, readers, kept))
    return found + [Link(f"{each}.up_proj", (f"{each}.down_proj",)) for each in gated]


def smoothing(
    wanted: Collection[Link],
    scale_of: Callable[[Link], Tensor],
    norms: Mapping[str, Tensor],
    kept_dtype: torch.dtype,
    config: ModelConfig,
) -> Smoothing:
    """scale_of: float32 [in], what the columns of a link's readers are to be multiplied by. norms:
    the weights of the makers that are norms. kept_dtype: what norms are stored as; the columns make
    up for that rounding exactly."""
    replaced: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for link in wanted:
        scale = scale_of(link)
        if link.kept:
            # Columns of a router must stay powers of two: the norm's rounding is left as it is.
            replaced[link.maker] = (norms[link.maker].to(torch.float32) / scale).to(kept_dtype)
        elif link.is_norm:
            replaced[link.maker], scale = _divided_norm(norms[link.maker], scale, kept_dtype)
        else:
            if link.maker.endswith(".v_proj"):
                scale = shared_by_heads(scale, config)
                made = scale.view(config.num_kv_heads, -1, config.head_dim)[:, 0].flatten()
            else:
                made = scale
            rows[link.maker] = rows[f"{link.maker}.bias"] = made
        columns.update(dict.fromkeys((*link.readers, *link.kept), scale))
    return Smoothing(replaced, columns, rows)


def even_scale(readers: Sequence[Columns]) -> Tensor:
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


def shared_by_heads(scale: Tensor, config: ModelConfig) -> Tensor:
    """[heads * head_dim]: query heads that read the same values are given one scale, the geometric
    mean of theirs."""
    heads = scale.log().view(config.num_kv_heads, -1, config.head_dim)
    return heads.mean(1, keepdim=True).exp().expand_as(heads).flatten()
