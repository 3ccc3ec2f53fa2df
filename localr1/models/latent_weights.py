"""From tensors to multi-head latent attention (DeepSeek-V2 and V3)."""

import torch
from torch import Tensor

from localr1.layers.linear import PackedLinear
from localr1.layers.mla import LatentAttention, LatentAttentionParts, build_latent_attention
from localr1.models.config import LatentConfig, ModelConfig
from localr1.models.weights import WeightLoader


def load_latent_attention(
    loader: WeightLoader, prefix: str, config: ModelConfig, latent: LatentConfig
) -> LatentAttention:
    """Interleaved rope rows are put in the "half" layout here, once: scores are the same, since
    queries and keys are reordered alike, and one layout is all that any kernel has to rotate."""
    name = f"{prefix}.self_attn"
    hidden, heads, rank = config.hidden_size, config.num_heads, latent.query_rank
    cached, width = latent.latent_size + latent.rope_size, heads * config.head_dim
    rows_of_head = _row_order(latent, latent.key_size)
    rows_of_query = (torch.arange(heads)[:, None] * config.head_dim + rows_of_head).flatten()
    norm = loader.vector(f"{prefix}.input_layernorm.weight", hidden)
    q_down = q_norm = None
    if rank is None:
        q = loader.linear(f"{name}.q_proj", width, hidden, bias=False, row_order=rows_of_query)
    else:
        q_down = loader.linear(f"{name}.q_a_proj", rank, hidden, bias=latent.bias)
        q_norm = loader.vector(f"{name}.q_a_layernorm.weight", rank)
        q = loader.linear(f"{name}.q_b_proj", width, rank, bias=False, row_order=rows_of_query)
    kv_down = loader.linear(
        f"{name}.kv_a_proj_with_mqa",
        cached,
        hidden,
        bias=latent.bias,
        row_order=_row_order(latent, latent.latent_size),
    )
    o = loader.linear(f"{name}.o_proj", hidden, heads * latent.value_size, bias=latent.bias)
    # Half the memory where the kernels read it as it is stored; torch would widen it at every step.
    packed = all(isinstance(m, PackedLinear) for m in (q, kv_down, o))
    key_up, value_up = _load_up(loader, f"{name}.kv_b_proj", heads, latent, widen=not packed)
    return build_latent_attention(
        LatentAttentionParts(
            norm=norm,
            q_down=q_down,
            q_norm=q_norm,
            q=q,
            kv_down=kv_down,
            kv_norm=loader.vector(f"{name}.kv_a_layernorm.weight", latent.latent_size),
            key_up=key_up,
            value_up=value_up,
            o=o,
            rope_size=latent.rope_size,
            eps=config.rms_norm_eps,
            scale=config.head_dim**-0.5 * config.rope.score_factor,
        )
    )


def _row_order(latent: LatentConfig, before: int) -> Tensor:
    """Rows without a position, which stay, then the rope's in the "half" layout."""
    rope = torch.arange(latent.rope_size)
    if latent.interleaved:
        rope = rope.view(-1, 2).T.flatten()
    return torch.cat((torch.arange(before), before + rope))


def _load_up(
    loader: WeightLoader, prefix: str, heads: int, latent: LatentConfig, *, widen: bool
) -> tuple[Tensor, Tensor]:
    """The matrix from the latent to each head's key, [heads, key, latent], and to its value,
    [heads, latent, value]: so that the absorbed form, which multiplies by the transpose of the
    keys', reads both row by row. A packed one becomes the values it stands for."""
    rows = latent.key_size + latent.value_size
    both = loader.unpacked(prefix, heads * rows, latent.latent_size, widen=widen)
    per_head = both.view(heads, rows, latent.latent_size)
    keys, values = per_head[:, : latent.key_size], per_head[:, latent.key_size :]
    return loader.at_hand(keys), loader.at_hand(values.transpose(1, 2))
