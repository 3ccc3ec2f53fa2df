"""r1-nano: DeepSeek-V3's architecture at 8 million parameters, in plain torch, for training.

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) and a mixture of experts
with a sigmoid router, group-limited choice and balance by a bias instead of an auxiliary loss
(DeepSeek-V3, arXiv 2412.19437, sections 2.1.2). `export.py` writes it under the names and in the
layout that Hugging Face transformers reads as `deepseek_v3`.
"""

import math
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 -- the name every torch program uses
from torch import Tensor, nn

ROOM_STEP: Final = 32


@dataclass(frozen=True)
class Config:
    """Sizes, under the names of `DeepseekV3Config`."""

    vocab_size: int = 512
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    intermediate_size: int = 768
    moe_intermediate_size: int = 96
    n_routed_experts: int = 16
    num_experts_per_tok: int = 2
    n_group: int = 4
    topk_group: int = 2
    n_shared_experts: int = 1
    first_k_dense_replace: int = 1
    routed_scaling_factor: float = 1.5
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 1024


class Linear(nn.Module):
    """A matrix [out, in] without bias."""

    def __init__(self, in_features: int, out_features: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.normal_(self.weight, std=gain / math.sqrt(in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # The norm is taken in float32; half the passes of torch's own rms_norm on CPU.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (norm * norm / x.shape[-1] + self.eps).rsqrt()
        out: Tensor = x * self.weight * scale.to(x.dtype)
        return out


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs: (x0, x1) is a complex number, turned by its angle.

    x [..., rope], turn complex [..., rope / 2], broadcast. transformers orders the result
    otherwise, which is free as long as queries and keys agree.
    """
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


class LatentCache:
    """Keys and values of one layer as MLA keeps them: the normed latent and the rotated key.

    rows [batch, capacity, kv_lora_rank + rope]; row b is filled up to its own position.
    """

    def __init__(self, batch: int, capacity: int, width: int, like: Tensor) -> None:
        self.rows = like.new_zeros(batch, capacity, width)

    def keep(self, index: Tensor) -> None:
        """Keeps only the sequences of `index`."""
        self.rows = self.rows[index]


class Attention(nn.Module):
    """Multi-head latent attention without a query latent."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value, self.rank = config.v_head_dim, config.kv_lora_rank
        self.scale = (self.nope + self.rope) ** -0.5
        hidden = config.hidden_size
        self.q_proj = Linear(hidden, self.heads * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = Linear(hidden, self.rank + self.rope)
        self.kv_a_layernorm = RMSNorm(self.rank, 1e-6)
        self.kv_b_proj = Linear(self.rank, self.heads * (self.nope + self.value))
        depth = 1 / math.sqrt(2 * config.num_hidden_layers)
        self.o_proj = Linear(self.heads * self.value, hidden, gain=depth)

    def _project(self, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query parts [B, T, heads, nope or rope], latent [B, T, rank], key [B, T, rope]."""
        batch, length, _ = x.shape
        query = self.q_proj(x).view(batch, length, self.heads, self.nope + self.rope)
        q_nope, q_rope = query[..., : self.nope], query[..., self.nope :]
        compressed = self.kv_a_proj_with_mqa(x)
        latent, k_rope = compressed[..., : self.rank], compressed[..., self.rank :]
        q_rope = rotate(q_rope, turn.unsqueeze(-2))
        return q_nope, q_rope, self.kv_a_layernorm(latent), rotate(k_rope, turn)

    def forward(self, x: Tensor, turn: Tensor, cache: LatentCache | None) -> Tensor:
        """Expanded form, causal over each row of x [B, T, hidden]; fills the cache if given."""
        batch, length, _ = x.shape
        q_nope, q_rope, latent, k_rope = self._project(x, turn)
        if cache is not None:
            cache.rows[:, :length] = torch.cat((latent, k_rope), dim=-1)
        key_value = self.kv_b_proj(latent).view(batch, length, self.heads, self.nope + self.value)
        k_nope, value = key_value[..., : self.nope], key_value[..., self.nope :]
        query = torch.cat((q_nope, q_rope), dim=-1)
        key = torch.cat((k_nope, k_rope.unsqueeze(2).expand(-1, -1, self.heads, -1)), dim=-1)
        # Written out: torch's fused attention is several times slower here on CPU (short rows).
        shape = (batch * self.heads, length, -1)
        query, key, value = (part.transpose(1, 2).reshape(shape) for part in (query, key, value))
        causal = torch.full((length, length), -math.inf, dtype=x.dtype, device=x.device).triu(1)
        scores = torch.baddbmm(
            causal.expand(batch * self.heads, -1, -1), query, key.transpose(1, 2), alpha=self.scale
        )
        mixed = torch.bmm(scores.softmax(-1), value)
        mixed = mixed.view(batch, self.heads, length, self.value).transpose(1, 2)
        out: Tensor = self.o_proj(mixed.flatten(2))
        return out

    def decode(
        self, x: Tensor, turn: Tensor, cache: LatentCache, positions: Tensor, limit: int
    ) -> Tensor:
        """Absorbed form for one new token per row: x [B, 1, hidden] at `positions` [B] < limit.

        kv_b's key half moves to the query and its value half behind the sum, so the scores are
        taken against the cached latents themselves (DeepSeek-V2, section 2.1.2).
        """
        q_nope, q_rope, latent, k_rope = self._project(x, turn)
        rows = torch.arange(x.shape[0], device=x.device)
        cache.rows[rows, positions] = torch.cat((latent, k_rope), dim=-1)[:, 0]
        expand = self.kv_b_proj.weight.view(self.heads, self.nope + self.value, self.rank)
        absorb_key, absorb_value = expand[:, : self.nope], expand[:, self.nope :]
        # [heads, B, nope] @ [heads, nope, rank] -> [B, heads, rank]
        absorbed = torch.bmm(q_nope[:, 0].transpose(0, 1), absorb_key).transpose(0, 1)
        query = torch.cat((absorbed, q_rope[:, 0]), dim=-1)
        kept = cache.rows[:, :limit]
        scores = torch.bmm(query, kept.transpose(1, 2)).float() * self.scale
        unseen = torch.arange(limit, device=x.device) > positions[:, None]
        weights = scores.masked_fill_(unseen[:, None], -math.inf).softmax(-1).to(x.dtype)
        mixed = torch.bmm(weights, kept)[..., : self.rank]
        value = torch.bmm(mixed.transpose(0, 1), absorb_value.transpose(1, 2))
        out: Tensor = self.o_proj(value.transpose(0, 1).flatten(1))
        return out.unsqueeze(1)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)): the dense first layer and the shared expert."""

    def __init__(self, hidden: int, intermediate: int, depth: float) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate)
        self.up_proj = Linear(hidden, intermediate)
        self.down_proj = Linear(intermediate, hidden, gain=depth)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Router(nn.Module):
    """Sigmoid scores; the bias takes part in the choice only (DeepSeek-V3, equations 12-16)."""

    e_score_correction_bias: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=1 / math.sqrt(config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, hidden] -> chosen experts [T, top_k] and their weights [T, top_k], float32."""
        config = self.config
        scores = F.linear(x.float(), self.weight).sigmoid()
        with torch.no_grad():
            biased = scores + self.e_score_correction_bias
            grouped = biased.view(len(x), config.n_group, -1)
            groups = grouped.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
            closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, groups, False)
            open_scores = grouped.masked_fill(closed.unsqueeze(-1), -math.inf).flatten(1)
            chosen = open_scores.topk(config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * config.routed_scaling_factor


class Experts(nn.Module):
    """All routed experts, stacked: gate_up [experts, 2 * intermediate, hidden] and down.

    Tokens are sorted by expert, so that each expert is two matrix products over its own tokens.
    Empty slots hold a copy of token 0 that nobody reads.
    """

    def __init__(self, config: Config, depth: float) -> None:
        super().__init__()
        count, hidden = config.n_routed_experts, config.hidden_size
        width = config.moe_intermediate_size
        self.gate_up = nn.Parameter(torch.empty(count, 2 * width, hidden))
        self.down = nn.Parameter(torch.empty(count, hidden, width))
        nn.init.normal_(self.gate_up, std=1 / math.sqrt(hidden))
        nn.init.normal_(self.down, std=depth / math.sqrt(width))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [T, hidden], chosen and weights [T, top_k] -> [T, hidden]."""
        top_k, count = chosen.shape[1], len(self.gate_up)
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        loads = torch.bincount(flat, minlength=count)
        # Rounded up: matrix shapes that repeat are much faster on CPU than new ones.
        room = (loads + ROOM_STEP - 1) // ROOM_STEP * ROOM_STEP
        first = room.cumsum(0) - room
        number = torch.arange(len(flat), device=x.device)
        rank = number - (loads.cumsum(0) - loads).repeat_interleave(loads)
        slot = first[flat[order]] + rank
        sizes = room.tolist()
        source = order.new_zeros(sum(sizes))
        source[slot] = order // top_k
        # Weighted before the way down, where rows are shortest.
        shares = (
            x.new_zeros(len(source))
            .index_copy(0, slot, weights.flatten()[order].to(x.dtype))
            .unsqueeze(-1)
        )
        parts = torch.split(x.index_select(0, source), sizes)
        gate_ups = self.gate_up.unbind(0)
        hidden = torch.cat([F.linear(part, w) for part, w in zip(parts, gate_ups, strict=True)])
        gate, up = hidden.chunk(2, dim=-1)
        parts = torch.split(F.silu(gate) * up * shares, sizes)
        downs = self.down.unbind(0)
        out = torch.cat([F.linear(part, w) for part, w in zip(parts, downs, strict=True)])
        back = torch.empty_like(order)
        back[order] = slot
        return out.index_select(0, back).view(len(x), top_k, -1).sum(1)


class MoE(nn.Module):
    """Routed experts plus the shared one; counts its load for the balancing step."""

    load: Tensor

    def __init__(self, config: Config, depth: float) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config, depth)
        shared = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = MLP(config.hidden_size, shared, depth)
        self.register_buffer("load", torch.zeros(config.n_routed_experts), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        chosen, weights = self.gate(flat)
        if self.training:
            self.load += torch.bincount(chosen.flatten(), minlength=len(self.load))
        routed: Tensor = self.experts(flat, chosen, weights) + self.shared_experts(flat)
        return routed.view_as(x)

    @torch.no_grad()
    def balance(self, rate: float) -> None:
        """Raises the bias of experts below the mean load, lowers the others (V3, 2.1.2)."""
        self.gate.e_score_correction_bias += rate * torch.sign(self.load.mean() - self.load)
        self.load.zero_()


class Block(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        depth = 1 / math.sqrt(2 * config.num_hidden_layers)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = layer < config.first_k_dense_replace
        self.mlp = (
            MLP(config.hidden_size, config.intermediate_size, depth)
            if dense
            else MoE(config, depth)
        )


class R1Nano(nn.Module):
    """The causal language model; its routers stay in float32, as DeepSeek-V3's do."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.1)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def _turns(self, positions: Tensor) -> Tensor:
        """e^(i angle) of every position, complex [..., rope / 2]."""
        rope = self.config.qk_rope_head_dim
        exponent = -torch.arange(0, rope, 2, device=positions.device).float() / rope
        frequency = self.config.rope_theta**exponent
        angle = positions.unsqueeze(-1).float() * frequency
        return torch.polar(torch.ones_like(angle), angle)

    def forward(self, ids: Tensor, caches: list[LatentCache] | None = None) -> Tensor:
        """Final hidden states [B, T, hidden] of rows of ids [B, T] that begin at position 0."""
        turn = self._turns(torch.arange(ids.shape[1], device=ids.device))
        x = self.embed_tokens(ids)
        for index, block in enumerate(self.blocks):
            cache = caches[index] if caches is not None else None
            x = x + block.self_attn(block.input_layernorm(x), turn, cache)
            x = x + block.mlp(block.post_attention_layernorm(x))
        out: Tensor = self.norm(x)
        return out

    def decode(
        self, ids: Tensor, positions: Tensor, caches: list[LatentCache], limit: int
    ) -> Tensor:
        """Final hidden states [B, hidden] of one new token per row, at its own position."""
        turn = self._turns(positions.unsqueeze(1))
        x = self.embed_tokens(ids.unsqueeze(1))
        for block, cache in zip(self.blocks, caches, strict=True):
            normed = block.input_layernorm(x)
            x = x + block.self_attn.decode(normed, turn, cache, positions, limit)
            x = x + block.mlp(block.post_attention_layernorm(x))
        out: Tensor = self.norm(x)
        return out[:, 0]

    @property
    def blocks(self) -> list[Block]:
        """The layers, typed."""
        return [block for block in self.layers if isinstance(block, Block)]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.embed_tokens.weight.device

    def to_bfloat16(self) -> "R1Nano":
        """Converts parameters in place, the routers excepted."""
        for name, parameter in self.named_parameters():
            if ".gate.weight" not in name:
                parameter.data = parameter.data.bfloat16()
        return self

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, float32."""
        out: Tensor = self.lm_head(hidden)
        return out.float()

    def new_caches(self, batch: int, capacity: int) -> list[LatentCache]:
        """One empty cache per layer."""
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        like = self.embed_tokens.weight
        return [LatentCache(batch, capacity, width, like.detach()) for _ in self.layers]

    def balance(self, rate: float) -> None:
        """One balancing step of every router, after an optimizer step."""
        for block in self.blocks:
            if isinstance(block.mlp, MoE):
                block.mlp.balance(rate)
