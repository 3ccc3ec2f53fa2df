"""What a forward pass takes beside weights and cache: the temporaries of a prompt's chunk, the
kernels' own buffer, the position table, the logits. Pure Python: never imports torch.

Every figure follows the code it speaks of, in the order that code allocates: layers/*.py,
cuda/cpu/*.cpp (the sums each operation reserves), layers/rope.py, sampler.py. They are bytes at
the same moment; the largest moment counts. T tokens of the chunk, S positions in the cache.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from localr1.errors import UsageError

if TYPE_CHECKING:
    from localr1.models.config import LatentConfig, ModelConfig, MoeConfig

# Of engine/engine.py, layers/rope.py, layers/mla.py; tests hold them equal.
PREFILL_CHUNK = 512
FIRST_ROPE_ROWS = 512
LATENT_WORKING_VALUES = 1 << 24
LATENT_POSITIONS = 512

# Of cuda/cpu/kernels.h and units.h.
KEY_CHUNK, QUERY_ROWS, TILE_ROWS, SPAN_CHUNKS, SPLIT_TILES = 64, 96, 32, 8, 16
TASK_ROWS = 4 * 32

SAMPLER_BYTES = 64
"""A token of the vocabulary: logits, their exponentials and, where nearly all are candidates, the
arrays that sort them (sampler.py)."""
TOKEN_BYTES = 128
"""A token of the conversation in Python's lists: prompt, history and cached ids."""
FLOAT = 4


def cache_in_8_bits(kv_bits: int | None) -> bool:
    """Raises UsageError for what is neither 8 nor 16."""
    if kv_bits not in (None, 8, 16):
        raise UsageError("--kv-bits", expected="8 or 16", found=kv_bits)
    return kv_bits == 8


@dataclass(frozen=True)
class Packed:
    """Which parts of a model are quantized throughout, so that one kernel call computes them: the
    others are one torch operation after another, with a temporary for each. cache_in_8_bits: its
    rows, whatever the weights are."""

    attention: bool
    mlp: bool
    experts: bool
    cache_in_8_bits: bool = False


@dataclass(frozen=True)
class Workspace:
    """Bytes. forward: of one pass at the longest context, position table included. logits: those of
    a token and what sampling makes of them. text: the conversation's ids."""

    forward: int
    logits: int
    text: int

    @property
    def nbytes(self) -> int:
        return self.forward + self.logits + self.text


def workspace(config: "ModelConfig", packed: Packed, context: int, threads: int) -> Workspace:
    """At its largest while a conversation fills `context` tokens: the last chunk of a prompt that
    long, or a token after it."""
    chunk = min(PREFILL_CHUNK, context)
    forward = max(
        _forward(config, packed, tokens, context, threads) for tokens in {chunk, 1, min(16, chunk)}
    )
    rows = FIRST_ROPE_ROWS
    while rows < context:
        rows *= 2
    table = FLOAT * rows * config.rope_size // 2
    # Cos and sin stay; angles and the unscaled two, beside the table of half the size, do not.
    growing = 4 * table
    return Workspace(
        forward=2 * table + max(forward, growing, _cache_growth(config, packed, context)),
        logits=SAMPLER_BYTES * config.vocab_size,
        text=TOKEN_BYTES * context,
    )


def cache_bytes_per_token(config: "ModelConfig", packed: Packed) -> int:
    """Of all layers: float16 where attention is quantized, else float32 (models/decoder.py); or 8
    bits a value and a float16 scale for each group of 32 of a row (kernels/cache_rows.py)."""
    if packed.cache_in_8_bits:
        row = config.cached_values if config.latent is not None else config.head_dim
        rows = config.cached_values // row
        return config.num_layers * rows * (row + 2 * -(-row // 32))
    return config.num_layers * config.cached_values * (2 if packed.attention else FLOAT)


def _cache_growth(config: "ModelConfig", packed: Packed, context: int) -> int:
    """The cache doubles layer by layer: one of them is there twice (cache/sequence.py)."""
    return cache_bytes_per_token(config, packed) // config.num_layers * context


def _forward(
    config: "ModelConfig", packed: Packed, tokens: int, positions: int, threads: int
) -> int:
    hidden = FLOAT * tokens * config.hidden_size
    if config.latent is not None:
        attention, native = _latent(config, config.latent, packed, tokens, positions, threads)
    else:
        attention, native = _attention(config, packed, tokens, positions, threads)
    feed_forward, buffer = _mlp(config.hidden_size, config.intermediate_size, packed.mlp, tokens)
    native = max(native, buffer)
    if config.moe is not None:
        mixture, buffer = _mixture(config.hidden_size, config.moe, packed, tokens, threads)
        feed_forward, native = max(feed_forward, mixture), max(native, buffer)
    # Each thread's copy of a row of activations.
    native += FLOAT * threads * config.hidden_size
    return 2 * hidden + native + max(attention, feed_forward)


def _activations(tokens: int, columns: int) -> int:
    """Quantized: a byte a value, a scale and an offset for each group of 32."""
    return tokens * columns + 2 * FLOAT * tokens * (columns // 32)


def _attention(
    config: "ModelConfig", packed: Packed, tokens: int, positions: int, threads: int
) -> tuple[int, int]:
    """(torch's temporaries, the kernels' buffer) of dense attention."""
    hidden, dim = config.hidden_size, config.head_dim
    width, keys = config.num_heads * dim, config.num_kv_heads * dim
    if packed.attention:
        padded = -(-dim // 16) * 16
        scratch = KEY_CHUNK * 2 * padded + QUERY_ROWS * KEY_CHUNK
        scratch += QUERY_ROWS * padded + 2 * QUERY_ROWS * (padded + 2)
        rows = tokens * config.num_heads // config.num_kv_heads
        partials = 0
        if rows <= QUERY_ROWS // 4:  # Few rows: the chunks of keys are computed side by side.
            chunks = -(-positions // KEY_CHUNK)
            partials = config.num_kv_heads * chunks * rows * (padded + 2)
        floats = tokens * (3 * width + 2 * keys) + threads * scratch + partials
        buffer = _activations(tokens, hidden) + _activations(tokens, width) + FLOAT * floats
        return 0, buffer
    # norm; q, k, v; q turned and regrouped; the product and its two copies; the mask, twice as
    # bool and once as the float32 that torch makes of it.
    floats = tokens * (3 * hidden + 7 * width + 4 * keys)
    mask = 6 * tokens * positions if tokens > 1 else 0
    return FLOAT * floats + mask, _activations(tokens, max(hidden, width))


def _latent(
    config: "ModelConfig",
    latent: "LatentConfig",
    packed: Packed,
    tokens: int,
    positions: int,
    threads: int,
) -> tuple[int, int]:
    """(torch's temporaries, the kernels' buffer) of latent attention: layers/mla.py says which of
    its two forms a chunk takes."""
    hidden, heads, rank = config.hidden_size, config.num_heads, latent.query_rank or 0
    cached, width = latent.latent_size + latent.rope_size, config.num_heads * config.head_dim
    values = heads * latent.value_size
    products = _activations(tokens, hidden) + _activations(tokens, rank)
    products += _activations(tokens, values)
    absorbed = tokens * (2 * latent.latent_size + latent.rope_size)
    expanded = tokens * (config.head_dim + latent.value_size)
    expanded += latent.latent_size * (latent.key_size + latent.value_size)
    absorbs = absorbed <= expanded
    in_latent = tokens * heads * cached
    if packed.attention and absorbs and in_latent <= LATENT_WORKING_VALUES:
        padded, summed = -(-cached // 16) * 16, -(-latent.latent_size // 16) * 16
        rows, state = tokens * heads, TILE_ROWS * (summed + 2)
        scratch = KEY_CHUNK * (padded + summed) + QUERY_ROWS * KEY_CHUNK + 3 * state
        floats = tokens * (cached + rank + width + values) + rows * (padded + summed)
        floats += threads * (scratch + max(hidden, rank, cached))
        tiles = -(-rows // TILE_ROWS)
        if tiles <= SPLIT_TILES:
            floats += tiles * -(-positions // (SPAN_CHUNKS * KEY_CHUNK)) * state
        return 0, products + FLOAT * floats
    if packed.attention and not absorbs:  # cuda/cpu/latent_expanded.cpp
        wide, value = -(-latent.latent_size // 16) * 16, -(-latent.value_size // 16) * 16
        state = QUERY_ROWS * (value + 2)
        scratch = latent.key_size * wide + latent.latent_size * value + QUERY_ROWS * KEY_CHUNK
        scratch += KEY_CHUNK * (cached + wide + config.head_dim + value)
        scratch += (1 + -(-tokens // QUERY_ROWS)) * state
        floats = tokens * (cached + rank + width + values)
        floats += threads * (scratch + max(hidden, rank, cached))
        return 0, products + FLOAT * floats
    # norm, the queries' latent, queries whole, scaled and side by side, the row for the cache.
    floats = tokens * (3 * hidden + 3 * rank + 4 * width + 3 * cached)
    if absorbs:
        # Queries in the latent's space twice, scores of a block, the sums and their next ones.
        block = min(positions, max(LATENT_WORKING_VALUES // (tokens * heads + cached), 1))
        floats += 2 * in_latent + block * (tokens * heads + 2 * cached)
        floats += 4 * tokens * heads * latent.latent_size + heads * config.head_dim * cached
    else:
        size = config.head_dim + latent.value_size
        per_head = LATENT_POSITIONS * (2 * tokens + size)
        at_once = min(heads, max(LATENT_WORKING_VALUES // per_head, 1))
        block = min(positions, LATENT_POSITIONS)
        # Scores, the mask over them, keys twice (before and after the rope's part joins), values.
        floats += at_once * block * (2 * tokens + 2 * size) + block * cached
        # The matrices of these heads as float32; the sums of these heads and their next ones.
        floats += at_once * size * latent.latent_size + 4 * at_once * tokens * latent.value_size
    floats += tokens * (3 * values + hidden)
    return FLOAT * floats, products


def _mlp(hidden: int, inner: int, packed: bool, tokens: int) -> tuple[int, int]:
    if packed:
        return 0, _activations(tokens, hidden) + _activations(tokens, inner)
    return FLOAT * tokens * (3 * hidden + 3 * inner), _activations(tokens, max(hidden, inner))


def _mixture(
    hidden: int, moe: "MoeConfig", packed: Packed, tokens: int, threads: int
) -> tuple[int, int]:
    pairs, inner = tokens * moe.router.experts_per_token, moe.intermediate_size
    floats = 3 * tokens * hidden + 3 * pairs
    torch, buffer = _mlp(hidden, moe.shared_size, packed.mlp, tokens)
    if packed.experts:
        mixing = _activations(pairs, hidden) + _activations(pairs, inner)
        mixing += FLOAT * threads * TASK_ROWS * pairs + 6 * 8 * pairs
        buffer = max(buffer, mixing)
        floats += pairs * hidden  # Outputs, where experts come from several places.
    else:  # All pairs' outputs; the tokens of one expert, at most all of them; their sum.
        floats += pairs * hidden + tokens * (4 * inner + 2 * hidden) + 2 * tokens * hidden
    routing = FLOAT * (tokens + 6 * threads) * moe.router.num_experts
    return FLOAT * floats + torch, max(buffer, routing)
