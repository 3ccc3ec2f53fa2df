"""What a model takes in memory, from its config and the names, types and shapes of its tensors
alone. Pure Python: never imports torch.

load.py and `localr1 plan` both measure with it: before any weight is read, and before any is there.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import TYPE_CHECKING

from localr1.experts.workspace import Packed, Workspace, cache_bytes_per_token, workspace

if TYPE_CHECKING:
    from localr1.checkpoint.api import TensorInfo
    from localr1.models.config import ModelConfig

PACKED_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
LATENT_UP = ".kv_b_proj"
EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
EXPERTS_PART = ".mlp.experts."
ROUTER = ".mlp.gate."
ATTENTION_PART = ".self_attn."
OF_LAYER = re.compile(r"model\.layers\.([0-9]+)\.")

BLOCK_ROWS = (8, 16)
"""Rows of a block in memory, by instruction set (cuda/blocks.h)."""
BLOCK_ALIGNMENT = 64
LARGE_PAGE = 2 << 20
OWN_PAGES = 8 << 20
"""A larger matrix has pages of its own; smaller ones share chunks (cuda/cpu/memory.cpp)."""
LARGEST_GROUP = 128
FLOAT = 4


@dataclass(frozen=True)
class Footprint:
    """A model's bytes, before it is decided what lies where.

    dense: every weight but the two below. embedding: the token table, of which a token reads one
    row; 0 where the output head is the same matrix, which is then dense. expert: one routed expert
    in the blocked layout, a slot of any tier. num_experts: that can be moved, in all layers; 0 for
    a dense model and where experts are floats or not all alike, which then are dense.
    rounding: what large pages add. loading: the most that is held beside the weights while they are
    read. cache_per_token: of all layers.
    """

    config: "ModelConfig"
    packed: Packed
    dense: int
    embedding: int
    expert: int
    num_experts: int
    rounding: int
    loading: int
    cache_per_token: int

    @property
    def experts(self) -> int:
        return self.expert * self.num_experts

    @property
    def weights(self) -> int:
        """As `Decoder.weight_bytes` counts them."""
        return self.dense + self.embedding + self.experts

    @property
    def experts_per_token(self) -> int:
        """That a token reads in one layer, of those that can be moved."""
        moe = self.config.moe
        return 0 if moe is None or not self.num_experts else moe.router.experts_per_token

    @property
    def routed_per_token(self) -> int:
        """Bytes of movable experts that one token reads."""
        layers = 0 if self.config.moe is None else len(self.config.moe.layers)
        return layers * self.experts_per_token * self.expert

    def all_resident(self) -> "Footprint":
        """The same model with experts that must all lie in memory, as other dense weights do."""
        return replace(self, dense=self.dense + self.experts, expert=0, num_experts=0)

    def cache(self, context: int) -> int:
        return self.cache_per_token * context

    def with_cache_in_8_bits(self) -> "Footprint":
        packed = replace(self.packed, cache_in_8_bits=True)
        per_token = cache_bytes_per_token(self.config, packed)
        return replace(self, packed=packed, cache_per_token=per_token)

    def workspace(self, context: int, threads: int) -> Workspace:
        return workspace(self.config, self.packed, context, threads)


@dataclass(frozen=True)
class Module:
    """A matrix or vector with its parts. count: modules of the model that are like it."""

    name: str
    parts: "dict[str, TensorInfo]"
    count: int

    @property
    def is_packed(self) -> bool:
        return "weight_packed" in self.parts

    @property
    def stored(self) -> int:
        return sum(info.nbytes for info in self.parts.values())


def measure(
    tensors: "Iterable[tuple[TensorInfo, int]]", config: "ModelConfig", *, for_card: bool = False
) -> Footprint:
    """tensors: each with how many of the model are like it, itself included: 1 for those of a
    checkpoint. for_card: matrices are as a card takes them. What the config leaves out does not
    count."""
    modules = modules_of(tensors, config)
    packed = _packed(modules, config)
    dense = embedding = rounding = loading = small = 0
    experts: dict[str, list[Module]] = defaultdict(list)
    for module in modules:
        nbytes = _bytes_in_memory(module, config, packed, for_card=for_card)
        if module.name != EMBEDDING:  # Which is read first, when nothing else is there.
            loading = max(loading, _loading(module, nbytes, for_card=for_card))
        if EXPERTS_PART in module.name:
            experts[".".join(module.name.split(".")[:-1])].append(module)
        elif module.name == EMBEDDING and not config.tie_embeddings:
            embedding += nbytes
        else:
            dense += module.count * nbytes
        if not module.is_packed or EXPERTS_PART in module.name:
            continue
        if nbytes > OWN_PAGES:
            rounding += module.count * (-nbytes % LARGE_PAGE)
        else:
            small += module.count * nbytes
    first = next((each.stored for each in modules if each.name == EMBEDDING), 0)
    loading = max(loading, first - dense)
    rounding += -(-small // (3 * OWN_PAGES)) * LARGE_PAGE
    expert, count, unmovable = _experts(experts, config, packed, for_card=for_card)
    if count and config.moe is not None:
        rounding += len(config.moe.layers) * LARGE_PAGE
    return Footprint(
        config=config,
        packed=packed,
        dense=dense + unmovable,
        embedding=embedding,
        expert=expert,
        num_experts=count,
        rounding=rounding,
        loading=loading,
        cache_per_token=cache_bytes_per_token(config, packed),
    )


def dense_bytes(
    tensors: "Iterable[tuple[TensorInfo, int]]", config: "ModelConfig", *, for_card: bool = False
) -> tuple[list[int], int]:
    """`Footprint.dense`, where all experts can be moved, by layer, and of what is in none: the last
    norm and the head. tensors: as `measure` takes them; those that are like one are of the layers
    behind its."""
    modules = modules_of(tensors, config)
    packed = _packed(modules, config)
    layers, others = [0] * config.num_layers, 0
    for module in modules:
        is_table = module.name == EMBEDDING and not config.tie_embeddings
        if is_table or EXPERTS_PART in module.name:
            continue
        nbytes = _bytes_in_memory(module, config, packed, for_card=for_card)
        match = OF_LAYER.match(module.name)
        if match is None:
            others += nbytes
            continue
        first = int(match[1])
        for index in range(first, first + module.count):
            layers[index] += nbytes
    return layers, others


def blocked_bytes(
    rows: int,
    words: int,
    groups: int,
    scale_bytes: int,
    *,
    zeros: bool,
    block_rows: tuple[int, ...] | None = None,
) -> int:
    """A packed matrix in the layout of cuda/blocks.h, on the instruction set where it is larger.

    words: int32 of codes a row. groups: scales a row. zeros: whether there are zero points.
    block_rows: rows of a block that there may be; None for those of every instruction set.
    """

    def with_blocks_of(rows_of_block: int) -> int:
        block = rows_of_block * (4 * words + groups * (scale_bytes + zeros))
        padded = -(-block // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
        return -(-rows // rows_of_block) * padded

    return max(with_blocks_of(rows_of_block) for rows_of_block in block_rows or BLOCK_ROWS)


def modules_of(tensors: "Iterable[tuple[TensorInfo, int]]", config: "ModelConfig") -> list[Module]:
    """All that the config does not leave out; tensors as `measure` takes them."""
    found: dict[str, Module] = {}
    for info, count in tensors:
        if config.is_left_out(info.name):
            continue
        name, _, part = info.name.rpartition(".")
        if part in ("bias", "e_score_correction_bias"):
            name = info.name  # A vector of its own.
        module = found.setdefault(name, Module(name, {}, count))
        module.parts[part] = info
    return list(found.values())


def _packed(modules: list[Module], config: "ModelConfig") -> Packed:
    """Attention is in one call where all its matrices are packed; latent attention but for kv_b,
    which is multiplied either way round (models/latent_weights.py)."""
    attention = mlp = experts = True
    for module in modules:
        if module.is_packed or "weight" not in module.parts:
            continue
        if len(module.parts["weight"].shape) < 2 or module.name.endswith(ROUTER.rstrip(".")):
            continue
        if EXPERTS_PART in module.name:
            experts = False
        elif ATTENTION_PART in module.name:
            attention &= module.name.endswith(LATENT_UP)
        elif module.name not in (EMBEDDING, HEAD):
            mlp = False
    return Packed(attention=attention, mlp=mlp, experts=experts)


def _bytes_in_memory(
    module: Module, config: "ModelConfig", packed: Packed, *, for_card: bool
) -> int:
    """Packed: blocked. Floats: float32, but for what stays as narrow as it is stored: an embedding
    that is no head, and kv_b beside packed matrices. A packed kv_b is unpacked to float32."""
    latent = config.latent
    is_latent_up = latent is not None and module.name.endswith(LATENT_UP)
    if module.is_packed:
        if is_latent_up and latent is not None:
            per_head = (latent.key_size + latent.value_size) * latent.latent_size
            return FLOAT * config.num_heads * per_head
        return packed_bytes(module, for_card=for_card)
    info = next(iter(module.parts.values()))
    is_table = module.name == EMBEDDING and not config.tie_embeddings
    if (is_table or (is_latent_up and packed.attention)) and info.dtype in ("F16", "BF16"):
        return info.nbytes
    return FLOAT * prod(info.shape)


def packed_bytes(
    module: Module, block_rows: tuple[int, ...] | None = None, *, for_card: bool = False
) -> int:
    """In memory, as `blocked_bytes`. for_card: codes of 5 and 6
    bits as a card takes them."""
    codes, scale = module.parts["weight_packed"], module.parts.get("weight_scale")
    if scale is None or len(codes.shape) != 2 or len(scale.shape) != 2:
        return module.stored  # The loader will say what is wrong with it.
    rows, groups = scale.shape
    words = _words_on_card(codes.shape[1], groups) if for_card else codes.shape[1]
    if groups == 1 and words > LARGEST_GROUP // 4:
        # One scale a row, repeated for each group (checkpoint/quantization_config.py). 4 bits, of
        # which there are the more groups.
        groups = 8 * words // gcd(4 * words, LARGEST_GROUP)
    scale_bytes = scale.nbytes // max(prod(scale.shape), 1)
    zeros = "weight_zero_point" in module.parts
    return blocked_bytes(rows, words, groups, scale_bytes, zeros=zeros, block_rows=block_rows)


def _words_on_card(words: int, groups: int) -> int:
    """Of a row of packed codes. A group's take 1, 2 or 4 times as many words as a code has bits, so
    that only of 5 or 6 bits their number divides by 5 or 3: a card holds these as 8
    (checkpoint/packed.py)."""
    a_group = words // groups
    for bits, divisor in ((5, 5), (6, 3)):
        if a_group % divisor == 0 and words % groups == 0:
            return words * 8 // bits
    return words


def _loading(module: Module, nbytes: int, *, for_card: bool) -> int:
    """Beside the weights themselves: the matrix as it is stored and, where its rows change places
    (latent attention), the same again. For a card codes of 5 and 6 bits become bytes, with half of
    these in between."""
    stored = module.stored
    if for_card and module.is_packed and "weight_scale" in module.parts:
        rows, words = module.parts["weight_packed"].shape
        on_card = _words_on_card(words, module.parts["weight_scale"].shape[1])
        if on_card != words:
            stored += rows * on_card * 4 // 2
    if module.name.endswith(LATENT_UP):
        return nbytes + stored
    return 2 * stored if ATTENTION_PART in module.name else stored


def _experts(
    experts: dict[str, list[Module]], config: "ModelConfig", packed: Packed, *, for_card: bool
) -> tuple[int, int, int]:
    """(bytes of one, how many can be moved, bytes of those that cannot)."""
    if config.moe is None:
        return 0, 0, 0
    sizes = {
        name: sum(_bytes_in_memory(each, config, packed, for_card=for_card) for each in matrices)
        for name, matrices in experts.items()
    }
    counts = {name: min(m.count for m in matrices) for name, matrices in experts.items()}
    by_layer: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for name, matrices in experts.items():
        layer = name.partition(EXPERTS_PART)[0]
        by_layer[layer].add(tuple(sorted(module.stored for module in matrices)))
    if not packed.experts or any(len(forms) > 1 for forms in by_layer.values()):
        return 0, 0, sum(sizes[name] * counts[name] for name in sizes)
    return max(sizes.values(), default=0), sum(counts.values()), 0
