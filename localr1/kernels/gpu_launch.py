"""Which GPU kernel computes what, and its grid. The comments in cuda/gpu say what each takes.

Every function refuses with KernelError what its kernel cannot hold.
"""

from typing import Final, NamedTuple

from localr1.errors import KernelError
from localr1.kernels.gpu_layout import ExpertLayout
from localr1.qtypes import code_name

UNIT_ROWS: Final = 16
"""Rows of a product that one block of a grid computes (cuda/gpu/products.h)."""
TOKEN_TILES: Final = (1, 2, 4, 8)
"""Tokens of one block of a product's grid: a kernel for each."""
TILE: Final = 64
"""Rows and tokens of a block of `matmul`'s grid (cuda/gpu/matmul.cu)."""
MATMUL_TOKENS: Final = 32
"""From so many tokens on a product is `matmul`'s, whose warps compute 32 of them; below it is
`matvec`'s, which reads the weights once for every 8. The bits are the same. Not measured yet: a
guess."""
EXPERT_TILE: Final = 32
"""Pairs of a token and an expert in a block of `gate_up_tiles`' and `down_tiles`' grids."""
BY_GROUP_STEP: Final = 32
"""Of the positions and groups that a block of `by_group` turns over."""
SPAN: Final = 128
"""Positions of the cache that one block of attention's grid reads (cuda/gpu/attention.cu)."""
QUERY_TILES: Final = (1, 4, 8)
"""Query heads of one block of attention's grid, which share their keys: a kernel for each."""
TOKENS_OF_TILE: Final = {1: 8, 4: 2, 8: 2}
"""Of such a block, where there are so many: another kernel for each."""
SAMPLING_TOKENS: Final = 1024
"""Of a vocabulary, that a block of cuda/gpu/sampling.cu looks at."""
MAX_HEAD_DIM: Final = 256
MAX_KEY_DIM: Final = 576
MAX_VALUE_DIM: Final = 512
KEY_DIM_STEP: Final = 8


class Launch(NamedTuple):
    """file: of cuda/gpu. grid: in blocks, x first. threads: of a block."""

    file: str
    kernel: str
    grid: tuple[int, ...]
    threads: int


def quantize_activations(num_groups: int) -> Launch:
    """num_groups: groups of 32 values, of all tokens."""
    return Launch("activations.cu", "quantize_activations", (_parts(num_groups, 8),), 256)


def silu_quantize(num_groups: int) -> Launch:
    return Launch("activations.cu", "silu_quantize", (_parts(num_groups, 8),), 256)


def rms_norm(num_rows: int) -> Launch:
    return Launch("activations.cu", "rms_norm", (num_rows,), 256)


def matvec(code: int, num_rows: int, num_tokens: int, tile: int | None = None) -> Launch:
    """code: of a MatrixLayout. tile: one of TOKEN_TILES; by itself the smallest that takes all
    tokens at once, else the largest."""
    if tile is None:
        tile = _smallest(TOKEN_TILES, num_tokens)
    grid = (_parts(num_rows, UNIT_ROWS), _parts(num_tokens, tile))
    return Launch("matvec.cu", f"matvec_{code_name(code)}_t{tile}", grid, 128)


def matmul(code: int, num_rows: int, num_tokens: int) -> Launch:
    """For many tokens, whose scales `by_group` has turned over."""
    grid = (_parts(num_tokens, TILE), _parts(num_rows, TILE))
    return Launch("matmul.cu", f"matmul_{code_name(code)}", grid, 256)


def positions_of(num_tokens: int) -> int:
    """That `matmul` reads scales of: whole tiles, the stride of what `by_group` makes."""
    return _parts(num_tokens, TILE) * TILE


def by_group(num_groups: int, num_positions: int) -> Launch:
    """num_groups: of 32 columns, of one token. num_positions: a multiple of BY_GROUP_STEP."""
    assert num_positions % BY_GROUP_STEP == 0
    grid = (_parts(num_groups, BY_GROUP_STEP), num_positions // BY_GROUP_STEP)
    return Launch("matmul.cu", "by_group", grid, 256)


def gate_up(layout: ExpertLayout, num_pairs: int) -> Launch:
    """num_pairs: of tokens and their experts."""
    gate = layout.gate
    _check_gate_and_up(layout)
    return Launch(
        "experts.cu", f"gate_up_{code_name(gate.code)}", (gate.rows // 32, num_pairs), 512
    )


def down(layout: ExpertLayout, num_pairs: int) -> Launch:
    units = _parts(layout.down.rows, UNIT_ROWS)
    return Launch("experts.cu", f"down_{code_name(layout.down.code)}", (units, num_pairs), 128)


def gate_up_tiles(layout: ExpertLayout, num_tiles: int) -> Launch:
    """num_tiles: of pairs in their experts' order (`gpu_pairs.order_pairs`)."""
    gate = layout.gate
    _check_gate_and_up(layout)
    grid = (num_tiles, _parts(gate.rows, 64))
    return Launch("expert_tiles.cu", f"gate_up_tiles_{code_name(gate.code)}", grid, 256)


def down_tiles(layout: ExpertLayout, num_tiles: int) -> Launch:
    grid = (num_tiles, _parts(layout.down.rows, 128))
    return Launch("expert_tiles.cu", f"down_tiles_{code_name(layout.down.code)}", grid, 256)


def fetch_outputs(hidden: int, num_pairs: int) -> Launch:
    return Launch("experts.cu", "fetch_outputs", (_parts(hidden, 256), num_pairs), 256)


def combine_experts(hidden: int, num_tokens: int) -> Launch:
    return Launch("experts.cu", "combine_experts", (_parts(hidden, 256), num_tokens), 256)


def route_logits(num_experts: int, num_tokens: int) -> Launch:
    return Launch("router.cu", "route_logits", (_parts(num_experts, 8), num_tokens), 256)


def route_choose(num_tokens: int) -> Launch:
    """Its rule is gpu_layout.RouterArguments, which refuses what the kernel cannot hold."""
    return Launch("router.cu", "route_choose", (num_tokens,), 32)


def largest_logits(vocabulary: int) -> Launch:
    return Launch("sampling.cu", "largest_logits", (sampling_blocks(vocabulary),), 256)


def weigh_logits(vocabulary: int) -> Launch:
    return Launch("sampling.cu", "weigh_logits", (sampling_blocks(vocabulary),), 256)


def gather_candidates(vocabulary: int) -> Launch:
    return Launch("sampling.cu", "gather_candidates", (sampling_blocks(vocabulary),), 256)


def sampling_blocks(vocabulary: int) -> int:
    """Of the grids of these three."""
    return _parts(vocabulary, SAMPLING_TOKENS)


def rope_append(num_heads: int, num_kv_heads: int, head_dim: int, num_tokens: int) -> Launch:
    if head_dim > MAX_HEAD_DIM:
        raise KernelError(
            "attention on a GPU: head dim", expected=f"up to {MAX_HEAD_DIM}", found=head_dim
        )
    grid = (num_heads + 2 * num_kv_heads, num_tokens)
    return Launch("attention.cu", "rope_append", grid, 32)


def num_spans(capacity: int) -> int:
    """Of a cache of so many positions: x of attention's grid, and the stride of its partials."""
    return _parts(capacity, SPAN)


def attend(
    group: int,
    num_kv_heads: int,
    num_tokens: int,
    capacity: int,
    dims: tuple[int, int],
    half: bool,
    tile: int | None = None,
    at_once: int | None = None,
) -> Launch:
    """group: query heads of a key/value head. dims: of a key and of a value, both as the cache has
    them. half: the cache is float16, else float32. tile: one of QUERY_TILES. at_once: tokens of a
    block, 1 or as TOKENS_OF_TILE says."""
    key_dim, value_dim = dims
    if (
        key_dim % KEY_DIM_STEP
        or value_dim % 2
        or key_dim > MAX_KEY_DIM
        or value_dim > MAX_VALUE_DIM
    ):
        raise KernelError(
            "attention on a GPU: sizes of key and value",
            expected=f"a multiple of {KEY_DIM_STEP} up to {MAX_KEY_DIM}, and an even number up to "
            f"{MAX_VALUE_DIM}",
            found=f"{key_dim} and {value_dim}",
        )
    if tile is None:
        tile = _smallest(QUERY_TILES, group)
    if at_once is None:
        at_once = TOKENS_OF_TILE[tile] if num_tokens >= TOKENS_OF_TILE[tile] else 1
    grid = (num_spans(capacity), num_kv_heads * _parts(group, tile), _parts(num_tokens, at_once))
    kernel = f"attend_{'half' if half else 'float'}_r{tile}_t{at_once}"
    return Launch("attention.cu", kernel, grid, 256)


def merge_spans(num_heads: int, num_tokens: int) -> Launch:
    return Launch("attention.cu", "merge_spans", (num_heads, num_tokens), 256)


def latent_append(num_tokens: int) -> Launch:
    return Launch("latent.cu", "latent_append", (num_tokens,), 32)


def absorb_queries(latent: int, num_heads: int, num_tokens: int) -> Launch:
    return Launch("latent.cu", "absorb_queries", (_parts(latent, 64), num_heads, num_tokens), 256)


def expand_values(value: int, num_heads: int, num_tokens: int) -> Launch:
    return Launch("latent.cu", "expand_values", (_parts(value, 64), num_heads, num_tokens), 256)


def dequantize(num_rows: int, num_columns: int) -> Launch:
    return Launch("dequantize.cu", "dequantize", (_parts(num_columns, 256), num_rows), 256)


def embedding(num_columns: int, num_tokens: int) -> Launch:
    return Launch("dequantize.cu", "embedding", (_parts(num_columns, 256), num_tokens), 256)


def _check_gate_and_up(layout: ExpertLayout) -> None:
    gate, up = layout.gate, layout.up
    if gate.code != up.code or (gate.rows, gate.columns) != (up.rows, up.columns):
        raise KernelError(
            "experts on a GPU",
            expected=f"up like gate: {code_name(gate.code)} [{gate.rows}, {gate.columns}]",
            found=f"{code_name(up.code)} [{up.rows}, {up.columns}]",
            fix="The CPU computes them.",
        )


def _parts(count: int, size: int) -> int:
    return -(-count // size)


def _smallest(tiles: tuple[int, ...], count: int) -> int:
    return next((tile for tile in tiles if tile >= count), tiles[-1])
